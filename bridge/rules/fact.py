"""Facts of a trained model that are in no weight: how a family declares them, reads them and completes them.

Data and pure functions, as everything of a family: the core reads the small files, decides between
origins that disagree (:mod:`bridge.facts.resolve`), and prints every fact with its origin.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import Problem
from bridge.rules.model import Model, Sizes

#: under this name a table's ``read`` gets arrays that are facts among the weights, as a safetensors file
IN_WEIGHTS = "(weights)"


def as_is(value: Any) -> Any:
    """The JSON form of a value that JSON has."""
    return value


def shown_apart(a: Any, b: Any) -> tuple[str, str]:
    """Two values as they are printed."""
    return str(a), str(b)


@dataclass(frozen=True, kw_only=True)
class FactKind:
    """One kind of fact, such as the length of what a model predicts at a time."""

    key: str
    """Its key in ``bridge.json``."""
    title: str
    """Its name in sentences."""
    show: Callable[[Any], str] = str
    same: Callable[[Any, Any], bool] = operator.eq
    """Whether two values are the same to the runtime."""
    contrast: Callable[[Any, Any], tuple[str, str]] = shown_apart
    """Two values that differ, each in words that show how."""
    matters: bool = False
    """Whether another value makes another model."""
    needed: bool = False
    """Whether a model without it cannot run, where another state of it has it."""
    flag: str = ""
    """Keyword of the family's option that decides it."""
    encode: Callable[[Any], Any] = as_is
    """Its JSON form, for ``bridge.json``."""
    decode: Callable[[Any], Any] = as_is
    """The value of a JSON form. Raises ValueError where it is not one."""


@dataclass(frozen=True)
class Fact:
    """A value, and the place it comes from."""

    kind: FactKind
    value: Any
    origin: str
    """A file's name, an option's flag, or ``"assumed: …"``."""
    assumed: bool = False
    """Whether no file and no flag states it."""

    @property
    def text(self) -> str:
        """The value, for people."""
        return self.kind.show(self.value)

    def as_json(self) -> dict[str, Any]:
        """The value and its origin."""
        return {
            "value": self.kind.encode(self.value),
            "origin": self.origin,
            **({"assumed": True} if self.assumed else {}),
        }


@dataclass(frozen=True)
class Damage:
    """What keeps a fact from being read."""

    kind: FactKind
    problem: Problem


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What small files, or options, state."""

    facts: tuple[Fact, ...] = ()
    """In the order in which they count."""
    damaged: tuple[Damage, ...] = ()
    """Refused, unless an option gives the fact."""
    notes: tuple[str, ...] = ()
    """What another layout cannot express, where that is harmless."""
    layout: str = ""
    """The layout that its files belong to."""
    kept: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Files that travel as they are while the layout stays: group -> name -> bytes. Of an adapter and its base,
    the adapter's group counts."""
    inexpressible: tuple[Problem, ...] = ()
    """What another layout cannot express, and what the model would not be the same without."""


@dataclass(frozen=True, kw_only=True)
class FactTable:
    """The facts that models of a family have."""

    kinds: tuple[FactKind, ...]
    files: tuple[str, ...]
    """Patterns of the paths of files that state some: small ones, directly beside the weights, and assets."""
    read: Callable[[Model, Mapping[str, bytes], Mapping[str, Any]], Reading]
    """From the files beside the weights, assets included, by their path; and the values that options give, by
    the key of their kind: which of several files counts may be one."""
    given: Callable[[Model, Mapping[str, Any]], Reading]
    """From the family's options, by keyword; of an option that is a file, its bytes."""
    complete: Callable[[Model, Sizes, Mapping[str, Fact]], tuple[Fact, ...]]
    """What follows from the facts stated, and defaults for what nothing states."""
    remarks: Callable[[Model, Sizes, Mapping[str, Fact]], tuple[str, ...]] = lambda model, sizes, facts: ()
    """What looks wrong about them, for people."""
