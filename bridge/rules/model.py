"""What bridge knows of a model family: its rules, and the facts that shapes do not tell.

An adapter is a plugin that declares :class:`Model`\\ s; it does no I/O. A model is found in a
checkpoint by names alone (:mod:`bridge.checkpoint.match`), its dimensions by shapes (:mod:`bridge.checkpoint.sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bridge.rules.rule import Rule

Sizes = Mapping[str, int]
"""Size of every axis, by qualified name (``"paligemma.width"``)."""


@dataclass(frozen=True)
class Part:
    """A named group of rules in which one axis name has one size: a tower, an expert."""

    name: str
    rules: tuple[Rule, ...]
    stock_alpha: Mapping[int, float] = field(default_factory=dict)
    """LoRA alpha of the stock variants, by rank."""


@dataclass(frozen=True)
class Unused:
    """A weight that the PyTorch model declares and never uses: written as zeros, read by no rule."""

    weight: str
    axes: tuple[str, ...]
    """Qualified axes of its shape."""
    reason: str


@dataclass(frozen=True)
class Multiple:
    """A relation between sizes that the architecture fixes: ``axis == factor * of``."""

    axis: str
    factor: int
    of: str


@dataclass(frozen=True)
class Layout:
    """A way to name the same weights: prefixes changed, longest match first."""

    name: str
    prefixes: tuple[tuple[str, str], ...] = ()
    ties: bool = True
    """Whether a tied weight is stored once (its alias in the header) or under both names."""

    def rename(self, weight: str) -> str:
        """The name (or template) ``weight`` has in this layout."""
        for old, new in sorted(self.prefixes, key=lambda pair: -len(pair[0])):
            if weight.startswith(old):
                return new + weight.removeprefix(old)
        return weight


@dataclass(frozen=True)
class Model:
    """One architecture of a family."""

    name: str
    parts: tuple[Part, ...]
    same: tuple[tuple[str, ...], ...] = ()
    """Axes of different parts that have one size."""
    multiples: tuple[Multiple, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    """Alias -> the weight it is the same tensor as."""
    unused: tuple[Unused, ...] = ()
    stock: Mapping[str, int] = field(default_factory=dict)
    """Sizes to assume where shapes and configs do not tell: how rows are split into heads."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Leaves that no rule reads -> the reason."""
    layouts: tuple[Layout, ...] = (Layout("openpi"),)

    def __post_init__(self) -> None:
        for kind, names in (
            ("leaf", [leaf for rule in self.rules for leaf in (rule.leaf, *(rule.factor_leaves or ()))]),
            ("weight", [rule.weight for rule in self.rules] + [unused.weight for unused in self.unused]),
            ("part", [part.name for part in self.parts]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"model {self.name}: {kind} declared twice: {', '.join(twice)}")
        known = {
            f"{part.name}.{axis}" for part in self.parts for rule in part.rules for axis in axes_of(rule)
        }
        for axis in (*(axis for axes in self.same for axis in axes), *self._multiple_axes()):
            if axis not in known:
                raise ValueError(f"model {self.name}: no rule has the axis {axis}")

    def _multiple_axes(self) -> Iterator[str]:
        for multiple in self.multiples:
            yield from (multiple.axis, multiple.of)

    @property
    def rules(self) -> Iterator[Rule]:
        return (rule for part in self.parts for rule in part.rules)

    @cached_property
    def rules_key(self) -> tuple[str, ...]:
        """What tells models of one name apart: the leaves they have."""
        return tuple(rule.leaf for rule in self.rules)

    @cached_property
    def canonical(self) -> Mapping[str, str]:
        """Qualified axis -> the name under which its size is kept, where ``same`` joins several."""
        return {axis: axes[0] for axes in self.same for axis in axes}

    def qualified(self, part: str, axis: str) -> str:
        """The name under which the size of ``axis`` of ``part`` is kept."""
        return self.canonical.get(f"{part}.{axis}", f"{part}.{axis}")

    def local_sizes(self, part: str, sizes: Sizes) -> dict[str, int]:
        """The sizes that the rules of ``part`` speak of, by their own axis names."""
        axes = {axis for p in self.parts if p.name == part for rule in p.rules for axis in axes_of(rule)}
        return {axis: sizes[q] for axis in axes if (q := self.qualified(part, axis)) in sizes}

    def layout(self, name: str) -> Layout | None:
        return next((layout for layout in self.layouts if layout.name == name), None)


def axes_of(rule: Rule) -> tuple[str, ...]:
    """Every named axis of a rule, its rank axis included."""
    named = tuple(axis for axis in rule.equation.left if axis.isidentifier())
    return (*named, rule.lora.rank) if rule.lora else named


@dataclass(frozen=True)
class Facts:
    """What the files beside the weights are made from."""

    model: Model
    sizes: Sizes
    layout: Layout
    holds: str
    """``"base"`` for weights, ``"lora"`` for an adapter."""
    dtype: str
    """dtype of most weights."""
    settings: Mapping[str, Any]
    """Facts that only the user knows, by name."""
    assets: Mapping[str, bytes]
    """Files that travel with the checkpoint, by path."""


@dataclass(frozen=True)
class Companions:
    """Files that loaders of the PyTorch model want beside the weights, and what to say of them."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """A plugin: what bridge knows of one model family. Registered as ``bridge.adapters``."""

    name: str
    models: tuple[Model, ...]
    companions: Callable[[Facts], Companions] | None = None
    """Makes ``config.json`` and the like. Pure: bridge writes the files."""
    known_sizes: Callable[[Mapping[str, Any]], Mapping[str, int]] | None = None
    """Reads sizes, by qualified axis, from a ``config.json`` found beside PyTorch weights."""
