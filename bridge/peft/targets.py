"""The modules to which an adapter's config adds LoRA: PEFT silently ignores factors of any other.

Facts: peft 0.21, tuners/tuners_utils.py (``check_target_module_exists``,
``_maybe_include_all_linear_layers``) and tuners/lora/config.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import Problem
from bridge.peft.patterns import Clock, Patterns, endings

ALL_LINEAR = "all-linear"
RESTORE = "restore the adapter_config.json that was saved with the adapter"


@dataclass(frozen=True)
class Targets:
    """The fields of a config that select the modules with LoRA.

    A string is a pattern for whole paths; the names in a set match the ends of paths.
    """

    included: str | frozenset[str]
    excluded: str | frozenset[str]
    saved: Patterns | None
    """``modules_to_save``, which PEFT matches as patterns: neither they nor modules inside them get LoRA."""
    layers: frozenset[int]
    """The only layers that get LoRA; empty for all."""
    layers_patterns: tuple[str, ...]
    """Patterns of the path before the number of a layer."""

    def include(self, module: str, clock: Clock) -> bool:
        """Whether a linear layer gets LoRA.

        Raises:
            TimeoutError: the time budget is spent.
        """
        if self.excluded and _matches(self.excluded, module, clock):
            return False
        if self.saved is not None and _is_saved(self.saved, module):
            return False
        if isinstance(self.included, str) and self.included.lower() == ALL_LINEAR:
            return True
        if not _matches(self.included, module, clock):
            return False
        # to PEFT, a pattern or a whole path overrides layers_to_transform
        if not self.layers or isinstance(self.included, str) or module in self.included:
            return True
        return self._layer(module, clock) in self.layers

    def _layer(self, module: str, clock: Clock) -> int | None:
        before = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_patterns] or [r".*?\.[^.]*"]
        for path in before:
            match = clock.match(rf"{path}\.(?P<idx>\d+)\.", module)
            if match is not None:
                return int(match["idx"])
        return None


def _is_saved(saved: Patterns, module: str) -> bool:
    """Whether a module is one of those that are saved whole, or inside one."""
    paths = itertools.accumulate(module.split("."), "{}.{}".format)
    return any(saved.first(path) is not None for path in paths)


def _matches(wanted: str | frozenset[str], module: str, clock: Clock) -> bool:
    if isinstance(wanted, str):
        return clock.match(wanted, module, whole=True) is not None
    return any(ending in wanted for ending in endings(module))


def read_targets(
    config: Mapping[str, Any], saved: Collection[str], clock: Clock, where: str
) -> tuple[Targets | None, list[Problem]]:
    """Read the fields; the problems are what PEFT would refuse, too."""
    problems: list[Problem] = []

    def refuse(cause: str, fix: str = RESTORE) -> None:
        problems.append(Problem(f"{where}: {cause}", fix))

    def names_of(name: str) -> str | frozenset[str]:
        value = config.get(name)
        if isinstance(value, str):
            check(name, value)
            return value
        if value is not None and not (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            refuse(f"{name} is neither a pattern nor a list of names")
            return frozenset()
        return frozenset(value or ())

    def check(name: str, pattern: str) -> None:
        try:
            why = clock.check(pattern)
        except TimeoutError:
            why = f"{clock.spent} to match"
        if why:
            refuse(f"{name} has a pattern that {why}")

    included, excluded = names_of("target_modules"), names_of("exclude_modules")
    if config.get("target_modules") is None:
        refuse("target_modules is missing, and PEFT has no default for these models")
    patterns = config.get("layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if not (
        patterns is None or (isinstance(patterns, list) and all(isinstance(each, str) for each in patterns))
    ):
        refuse("layers_pattern is neither a pattern nor a list of patterns")
        patterns = None
    if not (layers is None or (isinstance(layers, list) and all(type(each) is int for each in layers))):
        refuse("layers_to_transform is neither a number nor a list of numbers")
        layers = None
    for pattern in patterns or ():
        check("layers_pattern", pattern)
    for name in saved:
        if not re.fullmatch(r"[\w.-]+", name):
            refuse(f"modules_to_save lists {name[:200]!r}, which is not a module path")
    if isinstance(included, str) and (layers is not None or patterns is not None):
        refuse(
            "layers_to_transform or layers_pattern is set although target_modules is a pattern, which PEFT rejects"
        )
    elif patterns and layers is None:
        refuse("layers_pattern is set without layers_to_transform, which PEFT rejects")
    if problems:
        return None, problems
    whole = Patterns(saved, clock) if saved else None
    return Targets(included, excluded, whole, frozenset(layers or ()), tuple(patterns or ())), []
