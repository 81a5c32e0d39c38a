"""Click options from the library's declarations (:mod:`bridge.rules.option`), and ``--help`` under headings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from bridge.rules.option import GENERAL, Option, declared, flag

F = TypeVar("F", bound=Callable[..., Any])

#: width of the first column of ``--help``
COLUMN = 26


class Command(click.Command):
    """A command whose ``--help`` lists options under the headings of their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                groups.setdefault(getattr(param, "group", GENERAL), []).append(record)
        groups[GENERAL] = groups.pop(GENERAL)
        for group, records in groups.items():
            write_section(formatter, group, records)


def report_option(command: F) -> F:
    """The option ``--report``. What would keep it from being written is said before the work, not after it."""

    def check(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise click.BadParameter(f"{path.parent} is not a directory that can be written to", ctx, param)
        if path is not None and find_spec("matplotlib") is None:
            raise click.BadParameter("matplotlib is not installed: pip install matplotlib", ctx, param)
        return path

    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option("--report", type=kind, callback=check, help="Write an HTML report.")(command)


def write_section(formatter: click.HelpFormatter, heading: str, rows: list[tuple[str, str]]) -> None:
    """Write a section of ``--help`` with the columns that all sections have."""
    with formatter.section(heading):
        formatter.write_dl([(first.ljust(COLUMN), second) for first, second in rows], COLUMN)


class GroupedOption(click.Option):
    """An option below a heading. Only its first spelling is shown."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None:
            return None
        spelled, text = record
        for alias in self.opts[1:]:
            spelled = spelled.replace(f", {alias}", "")
        return spelled, text


class Names(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """One of the names that a function lists; it is called when they are needed, because it loads plug-ins."""

    name = "name"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        names = tuple(self.names())
        if value not in names:
            self.fail(f"{value!r} is not one of {', '.join(names)}", param, ctx)
        return value


def options(verb: type) -> Callable[[F], F]:
    """Give a command the options that a TypedDict declares, in its order."""

    def add(command: F) -> F:
        # what decorates first is listed last
        for keyword, option in reversed(list(declared(verb).items())):
            command = click.option(*spellings(keyword, option), cls=GroupedOption, **attributes(option))(
                command
            )
        return command

    return add


def spellings(keyword: str, option: Option) -> tuple[str, ...]:
    """What click is told of an option's names: the function's keyword, and the flags."""
    return keyword, flag(keyword), *option.aliases


def attributes(option: Option, group: str = "") -> dict[str, Any]:
    """What click is told of an option beside its names; below its own heading or another."""
    kind = option.kind

    def read(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
        if kind.flag or not given:
            return given or option.default
        try:
            value = kind.read(",".join(given) if kind.repeatable else given)
        except ValueError as error:
            raise click.BadParameter(f"{error}", ctx, param) from None
        if wrong := kind.wrong(value):
            raise click.BadParameter(f"{', '.join(wrong)} is not {kind.expects}", ctx, param)
        return value

    value = (
        {"is_flag": True}
        if kind.flag
        else {"type": str, "metavar": kind.metavar, "multiple": kind.repeatable}
    )
    return {
        "group": group or option.group,
        "default": option.default,
        "show_default": option.default is not None and not kind.flag,
        "help": option.help,
        "callback": read,
        **value,
    }
