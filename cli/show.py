"""What every command prints with: the options they share, progress, and sizes for people."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click

from bridge.display import byte_size, printable

#: stands for the escape character of a style of ours: what else is not printable came in with a name. A name can
#: contain anything, but not a number that is drawn for each run
_ESCAPE = f"\ufdd0{secrets.token_hex(8)}"
_STYLES = re.compile(rf"{_ESCAPE}(\[[0-9;]*m)")

F = TypeVar("F", bound=Callable[..., Any])


def common(command: F) -> F:
    """The options of every command."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback on failure.")(
        command
    )
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")(command)


def style(text: str, **how: Any) -> str:
    """Text in a colour or weight, for :func:`say`."""
    return click.style(printable(text), **how).replace("\x1b", _ESCAPE)


def say(text: str, *, as_json: bool = False) -> None:
    """Print a line for people: to stdout, or to stderr where stdout is kept for machines.

    A line break or an escape sequence in a name is shown, not obeyed.
    """
    if as_json:
        complain(text)
    else:
        _echo(_line(text))


def complain(text: str) -> None:
    """Print a line for people to stderr; where nobody reads that, nothing else can be done."""
    try:
        click.echo(_line(text), err=True)
    except OSError:
        _silence(sys.stderr)


def waiting(text: str) -> None:
    """Show a line in place on stderr while something takes long, and take it away with an empty one."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{printable(text)}")
            sys.stderr.flush()


def emit(found: Any) -> None:
    """Print for machines: one JSON object to stdout."""
    _echo(json.dumps(found, indent=2))


def _line(text: str) -> str:
    return "".join(
        f"\x1b{part}" if number % 2 else printable(part) for number, part in enumerate(_STYLES.split(text))
    )


def _echo(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        # a reader that has gone is no error: the exit status says it
        if error.errno != errno.EPIPE:
            error.filename = "standard output"
        raise


def open_streams() -> None:
    """Open the standard streams that were closed, on the null device.

    Their numbers would go to the first files that are opened: an output, into which libraries would print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def _silence(stream: Any) -> None:
    """Let what is printed from here on go nowhere, so that the end of the process does not fail at it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def table(
    rows: Sequence[Sequence[str]], *, right: bool = False, colours: Sequence[str | None] | None = None
) -> None:
    """Print aligned columns below a dim head, the first of ``rows``.

    Args:
        right: align all columns but the first to the right.
        colours: of each row, the head included.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, (row, colour) in enumerate(zip(rows, colours or [None] * len(rows), strict=True)):
        cells = [
            cell.rjust(width) if right and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say(style("  " + "  ".join(cells).rstrip(), dim=number == 0 or None, fg=colour))


def columns() -> int:
    """Width of the terminal, or a generous one where there is none."""
    import shutil

    return shutil.get_terminal_size((200, 50)).columns


@contextlib.contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show bytes done, the rate and the time left on stderr: a bar on a terminal, a line every tenth elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        with bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(
                task, completed=done, total=total, description=label if done < total else "finishing"
            )
    else:
        yield _lines(label)


def _lines(label: str) -> Callable[[int, int], None]:
    began, tenth = time.perf_counter(), 0

    def show(done: int, total: int) -> None:
        nonlocal tenth
        now, took = done * 10 // max(total, 1), time.perf_counter() - began
        # small checkpoints are done before a second line could tell anything
        if now > tenth and took > 1:
            left = f"{(total - done) * took / done:.0f} s left" if done < total else "finishing"
            complain(
                f"{label}: {now * 10} %, {byte_size(done)} of {byte_size(total)}, {byte_size(done / took)}/s, {left}"
            )
        tenth = max(tenth, now)

    return show
