"""The command ``bridge``: its sub-commands, and the one place that turns failures into exit codes."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from bridge.errors import Problem, Refusal, SourceRefused, system_problem
from bridge.formats.disk.bucket import tell_waits

from .convert import convert
from .demo import demo
from .diff import diff
from .inspect import inspect
from .routes import routes
from .show import complain, emit, open_streams, style, waiting
from .signals import Stopped, catch_signals, leave_on_signals
from .verify import verify

#: what comes of too little memory, but for MemoryError
_NO_MEMORY = ("can't start new thread", "failed to map segment", "cannot allocate memory")


class Commands(click.Group):
    """The sub-commands. Click would end them with 1 where nobody reads on (``bridge inspect … | head``), and take the
    end of a file for that of the terminal's input."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _not_clicks():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _not_clicks():
            return super().invoke(ctx)


class ReaderGone(BaseException):
    """The reader of stdout has gone."""


@contextlib.contextmanager
def _not_clicks() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGone from error
    except EOFError as error:
        fix = "see that the files given are whole, and not empty"
        raise SourceRefused(Problem(f"a file ends before its data: {error}", fix)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="openpi-bridge", prog_name="bridge", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Convert models fine-tuned in JAX to PyTorch and back, LoRA included, with proof.

    \b
    bridge inspect checkpoints/my_run/29999
    bridge convert --to torch-merged checkpoints/my_run/29999 my_policy
    """
    ctx.meta["debug"] = debug


for command in (convert, verify, diff, inspect, routes, demo):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command, and end the process whatever threads are still running."""
    # a hundred thousand names are many objects and no cycles
    gc.set_threshold(100_000, 20, 20)
    open_streams()
    status = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status:
        # a thread that waits for a disk or a network would keep a failed process alive
        os._exit(status)
    sys.exit(0)


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status.

    0 done, 1 refused or failed, 2 wrong usage, 129, 130 or 143 on SIGHUP, SIGINT or SIGTERM, and 141, as for SIGPIPE,
    where the reader of stdout has gone.
    """
    catch_signals()
    tell_waits(waiting)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names on disk may be bytes of no encoding, and must not make a message fail
            stream.reconfigure(errors="backslashreplace")
    try:
        return cli.main(arguments, prog_name="bridge", standalone_mode=False) or 0
    except click.exceptions.Exit as done:
        return int(done.exit_code)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            complain(error.ctx.get_usage())
        complain(f"Error: {error.format_message()}")
        return int(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        return 130
    except Stopped as stopped:
        complain(": ".join((stopped.word, *getattr(stopped, "__notes__", ()))))
        return stopped.status
    except ReaderGone:
        return 128 + signal.SIGPIPE
    except Exception as error:
        return _failed(error, arguments)
    finally:
        leave_on_signals()


def _failed(error: Exception, arguments: list[str]) -> int:
    """Report an error; returns the exit status."""
    if "--debug" in arguments:
        traceback.print_exception(error)
        return 1
    problems = _problems(error)
    for problem in problems:
        complain(f"{style('error:', fg='red', bold=True)} {problem.cause}")
        complain(f"  {style('fix:', bold=True)} {problem.fix}")
    for note in getattr(error, "__notes__", ()):
        complain(f"  {style('note:', bold=True)} {note}")
    if "--json" in arguments:
        with contextlib.suppress(OSError):
            emit({"errors": [{"cause": each.cause, "fix": each.fix} for each in problems]})
    return 1


def _problems(error: Exception) -> tuple[Problem, ...]:
    if isinstance(error, Refusal):
        return error.problems
    if isinstance(error, OSError):
        return (system_problem(error),)
    if isinstance(error, MemoryError) or any(said in str(error) for said in _NO_MEMORY):
        said = str(error).splitlines()[0] if str(error) else "no more can be had"
        fix = "raise the limit on memory (ulimit -v), use --workers 1, or a machine with more"
        return (Problem(f"out of memory: {said}", fix),)
    if isinstance(error, ImportError):
        cause = f"{error.name or 'a package'} cannot be imported, and this needs it: {error}"
        return (Problem(cause, f"install it: pip install {error.name or 'openpi-bridge'}"),)
    return (
        Problem(
            f"{type(error).__name__}: {error} (internal error in bridge; please report it)",
            "run again with --debug, and report what it prints",
        ),
    )
