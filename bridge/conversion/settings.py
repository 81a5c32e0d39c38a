"""What a user chose, checked: the options of a conversion, and of families, against what is converted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from bridge.conversion.options import Options
from bridge.errors import PluginRefused, Problem
from bridge.formats.contract import states
from bridge.graph import Form, State
from bridge.rules.family import Family, families
from bridge.rules.option import Option, declared, flag, unknown, value_problems, with_defaults


def family_options() -> dict[str, tuple[Option, list[Family]]]:
    """The options that installed families declare: keyword -> option, and the families that share it.

    Raises:
        PluginRefused: a family cannot be loaded, or its option contradicts another.
    """
    declaring: dict[str, tuple[Option, list[Family]]] = {}
    for family in families():
        for keyword, option in family.options.items():
            known, sharing = declaring.setdefault(keyword, (option, []))
            sharing.append(family)
            if keyword in (*declared(Options), "settings") or known.kind != option.kind:
                other = sharing[0].name if sharing[1:] else "bridge itself"
                raise PluginRefused(
                    Problem(
                        f"{family.name} and {other} both declare {flag(keyword)}",
                        "uninstall the package that registers one of the two",
                    )
                )
    return declaring


def read_options(keywords: Options) -> Options:
    """All options of a conversion: the values given, and defaults for the others.

    Args:
        keywords: values by keyword, those of families among them.

    Raises:
        TypeError: a keyword is not an option, or a value is of another type.
    """
    values: dict[str, Any] = dict(keywords)
    chosen: dict[str, Any] = dict(values.pop("settings", None) or {})
    chosen |= {keyword: values.pop(keyword) for keyword in list(values) if keyword not in declared(Options)}
    options = with_defaults(Options, values)
    known = family_options() if chosen else {}
    settings: dict[str, Any] = {}
    for keyword, value in chosen.items():
        if keyword not in known:
            raise unknown(keyword, (*declared(Options), *known))
        option, _ = known[keyword]
        settings[keyword] = option.convert(keyword, value)
    options["settings"] = {k: value for k, value in settings.items() if value != known[k][0].default}
    return options


def given(options: Options) -> list[str]:
    """Keywords of the options that differ from their defaults."""
    values = cast(Mapping[str, Any], options)
    return [
        *(keyword for keyword, option in declared(Options).items() if values[keyword] != option.default),
        *options["settings"],
    ]


def settings_of(family: Family, options: Options) -> dict[str, Any]:
    """The options of one family: the values given, and defaults for the others."""
    return {
        keyword: options["settings"].get(keyword, option.default)
        for keyword, option in family.options.items()
    }


def option_problems(options: Options, family: Family, source: State, target: State) -> list[Problem]:
    """Options whose values are not allowed, that would be ignored silently, or that need others."""
    problems = [
        *value_problems(declared(Options), cast(Mapping[str, Any], options)),
        *value_problems(family.options, options["settings"]),
        *_without_effect(declared(Options), cast(Mapping[str, Any], options), source, target),
        *_without_effect(family.options, options["settings"], source, target),
    ]
    for keyword in options["settings"]:
        if keyword not in family.options:
            _, owners = family_options()[keyword]
            problems.append(
                Problem(
                    f"{flag(keyword)} is an option of {' and '.join(owner.name for owner in owners)}, "
                    f"and this is a checkpoint of {family.name}",
                    f"leave {flag(keyword)} out",
                )
            )
    if options["value_suffix"] and target.form is Form.PYTREE and not family.tree.suffix:
        problems.append(
            Problem(
                f"--value-suffix has no effect: the leaf names of {family.runtime} have no suffix",
                "leave --value-suffix out",
            )
        )
    draws = target.contents == "base+lora" or any(
        keyword in family.resizes for keyword in options["settings"]
    )
    is_adapter = target.form is Form.ADAPTER
    if options["seed"] != declared(Options)["seed"].default and not draws and not is_adapter:
        problems.append(Problem("--seed has no effect: nothing is drawn", "leave --seed out"))
    if options["modules_to_save"] and is_adapter and options["base"] is None:
        problems.append(
            Problem(
                "--modules-to-save needs the base whose other weights the adapter should carry",
                "add --base PATH",
            )
        )
    if options["with_base"] and is_adapter and source.form is Form.ADAPTER and options["base"] is None:
        problems.append(Problem("--with-base needs the base, which an adapter is without", "add --base PATH"))
    if is_adapter and isinstance(options["rank"], Mapping):
        problems.append(
            Problem(
                "--rank is given by part, and --to peft-adapter compresses all modules", "give one number"
            )
        )
    return problems


def _without_effect(
    known: Mapping[str, Option], values: Mapping[str, Any], source: State, target: State
) -> Iterator[Problem]:
    for keyword, option in known.items():
        if values.get(keyword, option.default) == option.default or option.fits(source, target):
            continue
        # with another source, or other contents of the target, it may have one
        where = (
            f"from {source} to {target}"
            if any(
                option.fits(start, end) for start in states() for end in states() if end.name == target.name
            )
            else f"with --to {target.name}"
        )
        yield Problem(f"{flag(keyword)} has no effect {where}", f"leave {flag(keyword)} out")
