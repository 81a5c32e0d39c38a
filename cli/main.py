"""The command ``bridge``: its sub-commands, and the one place that turns failures into exit codes."""

from __future__ import annotations

import json
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from bridge.errors import Problem, Refusal

from .convert import convert
from .demo import demo
from .diff import diff
from .inspect import inspect
from .routes import routes
from .verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="openpi-bridge", prog_name="bridge", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """openpi's pi0 and pi0.5 policies between JAX and PyTorch, LoRA included.

    \b
    bridge inspect checkpoints/my_run/29999
    bridge convert --to torch-merged checkpoints/my_run/29999 my_policy
    """
    ctx.meta["debug"] = debug


for command in (convert, verify, diff, inspect, routes, demo):
    cli.add_command(command)


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what is half written is removed on the way out."""


def main() -> NoReturn:
    """Run the command. Exit status: 0 done, 1 refused or failed, 2 usage, 130 or 143 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    arguments = sys.argv[1:]
    try:
        sys.exit(cli.main(arguments, prog_name="bridge", standalone_mode=False) or 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: nothing was written", err=True)
        sys.exit(130)
    except Terminated:
        click.echo("terminated: nothing was written", err=True)
        sys.exit(143)
    except BrokenPipeError:
        # the reader of our output went away (`bridge inspect … | head`): not a failure to report
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if "--debug" in arguments:
            raise
        _report(_problems(error), as_json="--json" in arguments)
        sys.exit(1)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _problems(error: Exception) -> tuple[Problem, ...]:
    if isinstance(error, Refusal):
        return error.problems
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return (Problem(f"{where}{error.strerror or error}", "free space, check permissions, and run again"),)
    if isinstance(error, MemoryError):
        return (Problem("out of memory", "use --workers 1, or a machine with more of it"),)
    return (
        Problem(
            f"{type(error).__name__}: {error} (a fault of bridge's own, nothing was written)",
            "run again with --debug and report what it prints",
        ),
    )


def _report(problems: tuple[Problem, ...], *, as_json: bool) -> None:
    for problem in problems:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {problem.cause}", err=True)
        click.echo(f"  {click.style('fix:', bold=True)} {problem.fix}", err=True)
    if as_json:
        found: list[dict[str, Any]] = [{"cause": each.cause, "fix": each.fix} for each in problems]
        click.echo(json.dumps({"errors": found}, indent=2))
