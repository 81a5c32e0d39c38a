"""The command ``bridge``: its sub-commands, and the one place that turns failures into exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from bridge.display import printable
from bridge.errors import Problem, Refusal, system_problem

from .convert import convert
from .demo import demo
from .diff import diff
from .inspect import inspect
from .routes import routes
from .signals import Stopped, catch_signals, leave_on_signals
from .verify import verify

#: what comes of too little memory, but for MemoryError
_NO_MEMORY = ("can't start new thread", "failed to map segment", "cannot allocate memory")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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

    0 done, 1 refused or failed, 2 wrong usage, and 129, 130 or 143 on SIGHUP, SIGINT or SIGTERM.
    """
    catch_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names on disk may be bytes of no encoding, and must not make a message fail
            stream.reconfigure(errors="backslashreplace")
    try:
        return cli.main(arguments, prog_name="bridge", standalone_mode=False) or 0
    except click.exceptions.Exit as done:
        return int(done.exit_code)
    except click.ClickException as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except Stopped as stopped:
        said = ": ".join((stopped.word, *getattr(stopped, "__notes__", ())))
        click.echo(printable(said), err=True)
        return stopped.status
    except BrokenPipeError:
        # the reader of our output went away (`bridge inspect … | head`): not a failure to report
        sys.stderr.close()
        return 1
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        else:
            _report(_problems(error), as_json="--json" in arguments)
            for note in getattr(error, "__notes__", ()):
                click.echo(f"  {click.style('note:', bold=True)} {printable(note)}", err=True)
        return 1
    finally:
        leave_on_signals()


def _problems(error: Exception) -> tuple[Problem, ...]:
    if isinstance(error, Refusal):
        return error.problems
    if isinstance(error, OSError):
        return (system_problem(error),)
    if isinstance(error, MemoryError) or any(said in str(error) for said in _NO_MEMORY):
        said = str(error).splitlines()[0] if str(error) else "no more can be had"
        fix = "raise the limit on memory (ulimit -v), use --workers 1, or a machine with more"
        return (Problem(f"out of memory: {said}", fix),)
    return (
        Problem(
            f"{type(error).__name__}: {error} (internal error in bridge; please report it)",
            "run again with --debug, and report what it prints",
        ),
    )


def _report(problems: tuple[Problem, ...], *, as_json: bool) -> None:
    for problem in problems:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {printable(problem.cause)}", err=True)
        click.echo(f"  {click.style('fix:', bold=True)} {printable(problem.fix)}", err=True)
    if as_json:
        found: list[dict[str, Any]] = [{"cause": each.cause, "fix": each.fix} for each in problems]
        click.echo(json.dumps({"errors": found}, indent=2))
