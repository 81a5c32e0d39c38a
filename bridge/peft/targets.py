"""Which modules an adapter's config gives LoRA: PEFT ignores the factors of all others in silence.

Facts: peft 0.21, tuners/tuners_utils.py (``check_target_module_exists``,
``_maybe_include_all_linear_layers``) and tuners/lora/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import Problem
from bridge.peft.patterns import SECONDS, Clock

ALL_LINEAR = "all-linear"
RESTORE = "restore the config that was saved with the adapter"


@dataclass(frozen=True)
class Targets:
    """The fields of a config that say which modules get LoRA.

    A string is a pattern that matches whole paths; names in a set match the ends of paths.
    """

    named: str | frozenset[str]
    excluded: str | frozenset[str]
    saved: tuple[str, ...]
    """``modules_to_save``: they and what is inside them get none."""
    layers: frozenset[int]
    """Where not empty, the only layers that get any."""
    layers_patterns: tuple[str, ...]
    """Patterns of the path before a layer's number."""

    def include(self, module: str, clock: Clock) -> bool:
        """Whether a linear layer gets LoRA.

        Raises:
            TimeoutError: the patterns take too long.
        """
        if self.excluded and _matches(self.excluded, module, clock):
            return False
        # PEFT takes each name for a pattern; as one, a thousand names cost no more than one
        if self.saved and clock.match(rf"(^|.*\.)({'|'.join(self.saved)})($|\..*)", module) is not None:
            return False
        if isinstance(self.named, str) and self.named.lower() == ALL_LINEAR:
            return True
        if not _matches(self.named, module, clock):
            return False
        # PEFT takes a whole path as it is, whatever the layers say
        if not self.layers or isinstance(self.named, str) or module in self.named:
            return True
        return self._layer(module, clock) in self.layers

    def _layer(self, module: str, clock: Clock) -> int | None:
        before = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_patterns] or [r".*?\.[^.]*"]
        for path in before:
            found = clock.match(rf"{path}\.(?P<idx>\d+)\.", module)
            if found is not None:
                return int(found["idx"])
        return None


def _matches(wanted: str | frozenset[str], module: str, clock: Clock) -> bool:
    if isinstance(wanted, str):
        return clock.match(wanted, module, whole=True) is not None
    return any(ending in wanted for ending in _endings(module))


def _endings(module: str) -> Iterator[str]:
    """The path, and what is left of it after each dot."""
    while module:
        yield module
        module = module.partition(".")[2]


def read_targets(
    config: Mapping[str, Any], saved: Iterable[str], clock: Clock, where: str
) -> tuple[Targets | None, list[Problem]]:
    """Read the fields, refusing what PEFT would refuse."""
    problems: list[Problem] = []

    def refuse(cause: str, fix: str = RESTORE) -> None:
        problems.append(Problem(f"{where}: {cause}", fix))

    def words(name: str) -> str | frozenset[str]:
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
            why = f"takes longer than {SECONDS:g} s to read"
        if why:
            refuse(f"{name} holds a pattern that {why}")

    named, excluded = words("target_modules"), words("exclude_modules")
    if config.get("target_modules") is None:
        refuse("target_modules is missing, and PEFT knows no default for these models")
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
            refuse(f"modules_to_save names {name[:200]!r}, which is no path of a module")
    if isinstance(named, str) and (layers is not None or patterns is not None):
        refuse("layers_to_transform stands beside a pattern of target_modules, which PEFT refuses")
    elif patterns and layers is None:
        refuse("layers_pattern stands without layers_to_transform, which PEFT refuses")
    if problems:
        return None, problems
    return Targets(named, excluded, tuple(saved), frozenset(layers or ()), tuple(patterns or ())), []
