"""One architecture: its rules, and the facts that shapes do not determine.

A model is recognized in a checkpoint by names alone (:mod:`bridge.checkpoint.match`), its dimensions
by shapes (:mod:`bridge.checkpoint.sizes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from bridge.rules.equation import Index
from bridge.rules.names import NameIndex, Template
from bridge.rules.rule import Rule

Sizes = Mapping[str, int]
"""Size of every axis, by qualified name (``"decoder.width"``)."""

Wanted: TypeAlias = Callable[[Rule], bool]
"""Whether to take a rule."""


@dataclass(frozen=True)
class Part:
    """A named group of rules in which one axis name has one size: a vision tower, a decoder."""

    name: str
    rules: tuple[Rule, ...]
    stock_alpha: Mapping[int, float] = field(default_factory=dict)
    """LoRA alpha of the stock variants, by rank."""

    def __post_init__(self) -> None:
        ranks = {rule.lora.rank for rule in self.rules if rule.lora is not None and rule.lora.scaled}
        if len(ranks) > 1:
            raise ValueError(
                f"part {self.name}: scaled LoRA factors of two ranks, {' and '.join(sorted(ranks))}; a part has "
                "one alpha / rank: declare one rank, or two parts"
            )

    @cached_property
    def scaled(self) -> bool:
        """Whether the runtime scales any of its LoRA products: only then it has an alpha."""
        return any(rule.lora is not None and rule.lora.scaled for rule in self.rules)

    @cached_property
    def axes(self) -> frozenset[str]:
        """Every axis of its rules, rank axes included."""
        return frozenset(axis for rule in self.rules for axis in rule.named_axes)


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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to name the same weights: prefixes changed, longest match first."""

    name: str
    prefixes: tuple[tuple[str, str], ...] = ()
    ties: bool = True
    """Whether a tied weight is stored once (its alias in the header) or under both names."""
    loading: str = ""
    """Python that loads an adapter onto its base, ``BASE`` and ``ADAPTER``, for the model card."""
    needs_base_name: bool = False
    """Whether its loader finds an adapter's base by ``base_model_name_or_path`` alone."""
    replaced_by: str = ""
    """The layout that took its place: names of an earlier version, which are read and not written."""
    facts: str = ""
    """Pattern (re) of the names of arrays that are no weights: facts that the family reads."""

    def is_fact(self, name: str) -> bool:
        """Whether an array of this name is a fact beside the weights."""
        return self._fact is not None and self._fact.fullmatch(name) is not None

    @cached_property
    def _fact(self) -> re.Pattern[str] | None:
        return re.compile(self.facts) if self.facts else None

    @cached_property
    def _longest_first(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(self.prefixes, key=lambda pair: -len(pair[0])))

    def rename(self, weight: str) -> str:
        """The name (or template) ``weight`` has in this layout."""
        for old, new in self._longest_first:
            if weight.startswith(old):
                return new + weight.removeprefix(old)
        return weight


@dataclass(frozen=True, kw_only=True)
class Model:
    """One architecture of a family."""

    name: str
    parts: tuple[Part, ...]
    same: tuple[tuple[str, ...], ...] = ()
    """Axes of different parts that have one size."""
    multiples: tuple[Multiple, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    """Alias -> the weight it is the same tensor as."""
    applied: frozenset[str] = frozenset()
    """Of two tied names, that of the tensor which the runtime uses alone. Where training untied them it is the
    weight, and the other is of no use; of any other pair both are used, and must be equal."""
    unused: tuple[Unused, ...] = ()
    stock: Mapping[str, int] = field(default_factory=dict)
    """Sizes to assume where shapes and configs do not tell: how rows are split into heads."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Leaves that no rule reads -> the reason."""
    layouts: tuple[Layout, ...] = (Layout(name="plain"),)
    """The first is the default."""

    def __post_init__(self) -> None:
        for kind, names in (
            ("leaf", [leaf for rule in self.rules for leaf in (rule.leaf, *(rule.factor_leaves or ()))]),
            ("weight", [rule.weight for rule in self.rules] + [unused.weight for unused in self.unused]),
            ("part", [part.name for part in self.parts]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"model {self.name}: {kind} declared twice: {', '.join(twice)}")
        known = {f"{part.name}.{axis}" for part in self.parts for axis in part.axes}
        for axis in (*(axis for axes in self.same for axis in axes), *self._multiple_axes()):
            if axis not in known:
                raise ValueError(f"model {self.name}: no rule has the axis {axis}")
        for name in self.applied - {*self.tied, *self.tied.values()}:
            raise ValueError(f"model {self.name}: {name} is tied to no other weight")
        for rule in self.rules:
            rule.check_runtime()

    def check_resizable(self, axis: str) -> None:
        """Whether an axis, by its qualified name, can be cut and padded.

        Raises:
            ValueError: no rule has it, or one that has cannot follow.
        """
        canonical = self.canonical.get(axis, axis)
        having = [
            (part, rule)
            for part in self.parts
            for rule in part.rules
            if canonical in {self.qualified(part.name, each) for each in rule.named_axes}
        ]
        if not having:
            raise ValueError(f"model {self.name}: no rule has the axis {axis}")
        for part, rule in having:
            alone = [self.qualified(part.name, group[0]) for group in rule.equation.right if len(group) == 1]
            if canonical not in alone or rule.start is None:
                raise ValueError(
                    f"rule for {rule.leaf}: {axis} may be resized, so it must be an axis of the weight by itself, "
                    "and the rule must say what fresh entries start as"
                )
        if any(
            canonical in (self.canonical.get(each, each) for each in (m.axis, m.of)) for m in self.multiples
        ):
            raise ValueError(f"model {self.name}: {axis} may be resized, and a size is a multiple of it")

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

    def local_sizes(self, part: Part, sizes: Sizes) -> dict[str, int]:
        """The sizes that the rules of ``part`` speak of, by their own axis names."""
        return {axis: sizes[q] for axis in part.axes if (q := self.qualified(part.name, axis)) in sizes}

    def bind(self, sizes: Sizes, wanted: Wanted | None = None) -> Iterator[Bound]:
        """Every rule with its sizes, once for each leaf it stands for.

        Args:
            sizes: of the placeholders at least; rules that lack some are left out.
            wanted: which rules, if not all.
        """
        for part in self.parts:
            local = self.local_sizes(part, sizes)
            for rule in _leaves(part, local, wanted):
                if all(axis in local for axis in rule.equation.placeholders):
                    yield Bound(part, rule, local)

    def leaves(self, sizes: Sizes) -> Iterator[tuple[Part, Rule]]:
        """Every rule, once for each leaf it stands for.

        Args:
            sizes: of the placeholders of paths at least; rules that lack some are left out.
        """
        for part in self.parts:
            yield from ((part, rule) for rule in _leaves(part, self.local_sizes(part, sizes)))

    @cached_property
    def weight_index(self) -> NameIndex[tuple[Part, Rule]]:
        """What a weight's name stands for."""
        return NameIndex({rule.template: (part, rule) for part in self.parts for rule in part.rules})

    def index(self, layout: Layout) -> NameIndex[tuple[Part, Rule]]:
        """What a name stands for in a layout's names."""
        if layout not in self._indexes:
            self._indexes[layout] = NameIndex(
                {
                    Template(layout.rename(rule.weight)): (part, rule)
                    for part in self.parts
                    for rule in part.rules
                }
            )
        return self._indexes[layout]

    @cached_property
    def _indexes(self) -> dict[Layout, NameIndex[tuple[Part, Rule]]]:
        """By layout, once they were needed."""
        return {}

    def optional(self, layout: Layout) -> dict[str, str]:
        """Names that may be there and are read by no rule -> why."""
        aliases = {
            layout.rename(alias): f"the same tensor as {layout.rename(of)}" for alias, of in self.tied.items()
        }
        return aliases | self.spare(layout)

    def spare(self, layout: Layout) -> dict[str, str]:
        """Names of tensors that the runtime never uses, whatever they contain -> why."""
        tied = ((name, other) for pair in self.tied.items() for name, other in (pair, pair[::-1]))
        return {
            layout.rename(name): f"{layout.rename(other)} is used in its place"
            for name, other in tied
            if other in self.applied and layout.rename(name) != layout.rename(other)
        } | {layout.rename(unused.weight): unused.reason for unused in self.unused}

    def used(self, weight: str) -> str:
        """The name of a rule's weight that the runtime reads, where it has two."""
        return next(
            (alias for alias, of in self.tied.items() if of == weight and alias in self.applied), weight
        )

    @property
    def written(self) -> tuple[Layout, ...]:
        """The layouts that are written; the first is the default."""
        return tuple(layout for layout in self.layouts if not layout.replaced_by)

    def layout(self, name: str) -> Layout | None:
        """The layout of a name, where it is written."""
        return next((layout for layout in self.written if layout.name == name), None)


def _leaves(part: Part, local: Mapping[str, int], wanted: Wanted | None = None) -> Iterator[Rule]:
    """The rules of a part, once for each leaf: those whose paths' sizes are known."""
    for rule in part.rules:
        if (wanted is None or wanted(rule)) and all(axis in local for axis in rule.path.axes):
            yield from rule.bind(local)


@dataclass(frozen=True)
class Bound:
    """One leaf of a model whose sizes are known, with the weights it becomes."""

    part: Part
    rule: Rule
    """Without placeholders in the leaf's path."""
    sizes: Mapping[str, int]
    """By the rule's own axis names: of the placeholders at least."""

    @cached_property
    def names(self) -> dict[Index, str]:
        """Name of each weight, by its index."""
        return dict(self.rule.weights(self.sizes))

    @property
    def first(self) -> tuple[Index, str]:
        """Index and name of the first weight."""
        return next(self.rule.weights(self.sizes))

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        return self.rule.equation.leaf_shape(self.sizes)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of each weight."""
        return self.rule.equation.weight_shape(self.sizes)

    def flat(self, shape: tuple[int, ...]) -> Bound:
        """The same leaf with the axes of its weights as one each: see :attr:`Rule.flat`.

        Args:
            shape: of one weight.
        """
        rule = self.rule.flat
        groups = dict(zip((group[0] for group in rule.equation.right), shape, strict=True))
        placeholders = {axis: self.sizes[axis] for axis in rule.equation.placeholders}
        return Bound(self.part, rule, {**placeholders, **groups})
