"""What every command prints with: the options they share, progress, and sizes for people."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from bridge.errors import printable

#: line breaks and styles, which are ours; what else is not printable came in with a name
_OURS = re.compile(r"(\n|\x1b\[[0-9;]*m)")

F = TypeVar("F", bound=Callable[..., Any])


def common(command: F) -> F:
    """The options of every command."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback on failure.")(
        command
    )
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")(command)


def say(text: str, *, as_json: bool = False) -> None:
    """Print for people: to stdout, or to stderr where stdout is kept for machines."""
    parts = _OURS.split(text)
    click.echo("".join(p if i % 2 else printable(p) for i, p in enumerate(parts)), err=as_json)


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
    from bridge.display import size

    began, tenth = time.perf_counter(), 0

    def show(done: int, total: int) -> None:
        nonlocal tenth
        now, took = done * 10 // max(total, 1), time.perf_counter() - began
        # small checkpoints are done before a second line could tell anything
        if now > tenth and took > 1:
            left = f"{(total - done) * took / done:.0f} s left" if done < total else "finishing"
            click.echo(
                f"{label}: {now * 10} %, {size(done)} of {size(total)}, {size(done / took)}/s, {left}",
                err=True,
            )
        tenth = max(tenth, now)

    return show
