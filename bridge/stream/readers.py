"""How the weights and factors of one leaf are read, whatever the container they lie in.

Every converter works on a *region*: a box of one weight, in the leaf's own axes, as much as a slab
of the container carries of it. Containers differ only in the readers here and the writers of
:mod:`bridge.stream.writers`. Readers hold no data and can be pickled. Who needs weights whole asks
for :func:`pieces`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import xxhash

from bridge.arrays import Spec, box, raw
from bridge.errors import Problem
from bridge.formats.contract import Source, Timings
from bridge.lora.factors import Factors, LowRank, Matrices
from bridge.rules.equation import UNIT, Index
from bridge.rules.factoring import RANK
from bridge.rules.rule import Rule

Tick = Callable[[int], None]
"""Called with the number of source bytes (uncompressed) processed since the last call."""

Sources = Mapping[str, Source]
"""The sources of a plan: ``"source"``, and ``"base"`` where one is given."""

Read = tuple[str, str]
"""An array that is read: which source, and its name there."""


Label = tuple[str, Index | None]
"""Name of an array, and which weight of it where the name does not tell."""


@dataclass(frozen=True)
class Region:
    """A box of one weight, in the leaf's axes (placeholders and unit axes taken out)."""

    index: Index
    at: tuple[int, ...]
    """Position of its first element."""
    w: np.ndarray
    """Valid until the next region."""


@dataclass(frozen=True)
class Piece:
    """The part of a leaf that becomes one weight (placeholders taken out of its axes).

    ``w`` may be a run of rows, starting at ``start``, where the leaf streams by rows.
    """

    index: Index
    start: int
    w: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """Values of an array that no source has."""

    values: int
    """How many."""
    initialiser: str
    """What they were drawn from."""


@dataclass
class Done:
    """What a step read and wrote, and what was wrong with it."""

    read: dict[Read, str] = field(default_factory=dict)
    """Checksum of every array read."""
    written: dict[str, str] = field(default_factory=dict)
    """Checksum of every tensor written, by name."""
    drawn: dict[str, Drawn] = field(default_factory=dict)
    """What was initialised, by the path of its leaf in the rules."""
    problems: list[Problem] = field(default_factory=list)
    spent: Timings = field(default_factory=Timings)


class WeightsReader(Protocol):
    """Reads the weights of one leaf."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """Every array it reads."""
        ...

    def regions(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Region]:
        """Every weight, a box at a time, as the container stores them."""
        ...

    def sizes(self, rule: Rule, sources: Sources) -> Mapping[str, int]:
        """Length of every axis of the rule."""
        ...

    def at(self, index: Index) -> Read:
        """The array that one weight lies in."""
        ...

    def only(self, indices: Collection[Index]) -> WeightsReader:
        """How some of the weights are read; others may come along where they lie in one array."""
        ...

    def names(self, rule: Rule) -> tuple[str, ...]:
        """What the plan shows that they are read from: the leaf's path, or tensors."""
        ...

    def spec(self, leaf: Spec, sources: Sources) -> Spec:
        """What the plan shows of them: the leaf's spec, or that of a tensor."""
        ...


class FactorReader(Protocol):
    """Reads the LoRA factors of one leaf's weights."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """Every array it reads."""
        ...

    @property
    def scale(self) -> float | None:
        """What the runtime multiplies the products by, where it is one number for all of them."""
        ...

    def open(
        self, rule: Rule, sources: Sources, done: Done, tick: Tick | None
    ) -> Callable[[Index], LowRank | None]:
        """Prepare to read; the result gives the change of one weight, None where it has none."""
        ...

    def labels(self, rule: Rule, index: Index) -> tuple[Label, Label]:
        """Where both factors of a weight lie, for messages."""
        ...

    def rank(self, rule: Rule, index: Index, sources: Sources) -> int:
        """Rank of a weight's factors, by their shapes; 0 where it has none."""
        ...

    def memory(self, sources: Sources) -> int:
        """Bytes that stay in memory while it is open."""
        ...


@dataclass(frozen=True)
class LeafWeights:
    """Weights that lie in a leaf of a JAX pytree."""

    source: str
    name: str

    @property
    def reads(self) -> tuple[Read, ...]:
        return ((self.source, self.name),)

    def regions(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Region]:
        """Every weight of the leaf, as it is stored: in C order."""
        source, equation = sources[self.source], rule.equation
        digest = xxhash.xxh3_128()
        for at, values in source.slabs(self.name, None, done.spent):
            digest.update(raw(values))
            named = {axis: n for axis, n in zip(equation.left, at, strict=True) if axis != UNIT}
            inside = tuple(named[axis] for axis in equation.of_weight.left)
            for index, part in equation.slices(values):
                numbers = zip(index, equation.placeholders, strict=True)
                yield Region(tuple(n + named[axis] for n, axis in numbers), inside, part)
            if tick is not None:
                tick(values.nbytes)
        done.read[self.reads[0]] = digest.hexdigest()

    def sizes(self, rule: Rule, sources: Sources) -> Mapping[str, int]:
        shape = sources[self.source].specs[self.name].shape
        return dict(zip(rule.equation.left, shape, strict=True))

    def at(self, index: Index) -> Read:
        return self.reads[0]

    def only(self, indices: Collection[Index]) -> LeafWeights:
        return self

    def names(self, rule: Rule) -> tuple[str, ...]:
        return (rule.leaf,)

    def spec(self, leaf: Spec, sources: Sources) -> Spec:
        return sources[self.source].specs[self.name]


class _OneTensorEach:
    """What readers have in common whose weights are tensors of their own, of known lengths."""

    lengths: Mapping[str, int]

    @property
    def reads(self) -> tuple[Read, ...]:
        raise NotImplementedError

    def sizes(self, rule: Rule, sources: Sources) -> Mapping[str, int]:
        return self.lengths

    def names(self, rule: Rule) -> tuple[str, ...]:
        return tuple(name for _, name in self.reads)

    def spec(self, leaf: Spec, sources: Sources) -> Spec:
        source, name = self.reads[0]
        return sources[source].specs[name]


@dataclass(frozen=True)
class TensorWeights(_OneTensorEach):
    """Weights that lie in a state_dict, each a tensor of its own."""

    tensors: Mapping[Index, Read]
    lengths: Mapping[str, int]
    twins: Mapping[Index, Read] = field(default_factory=dict)
    """Tensors that must equal these: a tied weight that was stored under both its names."""
    runtime: str = ""
    """Whose model ties them, for messages."""

    @property
    def reads(self) -> tuple[Read, ...]:
        return (*self.tensors.values(), *self.twins.values())

    def at(self, index: Index) -> Read:
        return self.tensors[index]

    def only(self, indices: Collection[Index]) -> TensorWeights:
        tensors, twins = (
            {index: read for index, read in each.items() if index in indices}
            for each in (self.tensors, self.twins)
        )
        return replace(self, tensors=tensors, twins=twins)

    def regions(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Region]:
        """Every weight, one tensor after the other."""
        for index in self.tensors:
            yield from self.regions_of(index, rule, sources, done, tick)
        for index, twin in self.twins.items():
            digest = xxhash.xxh3_128()
            for _, values in sources[twin[0]].slabs(twin[1], None, done.spent):
                digest.update(raw(values))
                if tick is not None:
                    tick(values.nbytes)
            done.read[twin] = digest.hexdigest()
            if done.read[twin] != done.read[self.tensors[index]]:
                done.problems.append(
                    Problem(
                        f"{sources[twin[0]].location}: {twin[1]} and {self.tensors[index][1]} are tied in "
                        f"{self.runtime} but differ in this checkpoint",
                        f"{self.runtime} has one tensor for both: train them tied, or keep this checkpoint as it is",
                    )
                )

    def regions_of(
        self, index: Index, rule: Rule, sources: Sources, done: Done, tick: Tick | None
    ) -> Iterator[Region]:
        """One weight, from its tensor."""
        read, equation = self.tensors[index], rule.equation.of_weight
        order = [equation.weight_axes.index(axis) for axis in equation.left]
        digest = xxhash.xxh3_128()
        for at, values in sources[read[0]].slabs(
            read[1], tuple(self.lengths[axis] for axis in equation.weight_axes), done.spent
        ):
            digest.update(raw(values))
            yield Region(index, tuple(at[axis] for axis in order), values.transpose(order))
            if tick is not None:
                tick(values.nbytes)
        done.read[read] = digest.hexdigest()


@dataclass(frozen=True)
class ReplacedWeights(_OneTensorEach):
    """Weights of which some are taken from elsewhere, each a tensor of its own."""

    weights: WeightsReader
    own: Mapping[Index, Read]
    lengths: Mapping[str, int]

    @property
    def reads(self) -> tuple[Read, ...]:
        return (*self.weights.reads, *self.own.values()) if self.rule_has_more else tuple(self.own.values())

    @property
    def rule_has_more(self) -> bool:
        """Whether any weight still comes from where the others are."""
        return self.own.keys() != {()}

    def at(self, index: Index) -> Read:
        return self.own.get(index) or self.weights.at(index)

    def only(self, indices: Collection[Index]) -> ReplacedWeights:
        own = {index: read for index, read in self.own.items() if index in indices}
        return replace(self, weights=self.weights.only(indices), own=own)

    def regions(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Region]:
        """Every weight, from where it is taken."""
        own = TensorWeights(self.own, self.lengths)
        if not self.rule_has_more:
            yield from own.regions(rule, sources, done, tick)
            return
        taken: set[Index] = set()
        for region in self.weights.regions(rule, sources, done, tick):
            if region.index not in self.own:
                yield region
            elif region.index not in taken:
                taken.add(region.index)
                yield from own.regions_of(region.index, rule, sources, done, tick)


@dataclass(frozen=True)
class LeafFactors:
    """Factors that lie in two leaves of a JAX pytree."""

    source: str
    a: str
    b: str
    scale: float

    @property
    def reads(self) -> tuple[Read, ...]:
        return (self.source, self.a), (self.source, self.b)

    def open(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Callable[[Index], Factors]:
        """Read both leaves; the result gives the factors of one weight."""
        a, b = (whole(sources[self.source], read, done, tick) for read in self.reads)
        axes = rule.factor_axes
        parts = {
            index: Factors(axes.of_weight, part_a, part_b, self.scale)
            for index, part_a, part_b in axes.slices(a, b)
        }
        return parts.__getitem__

    def labels(self, rule: Rule, index: Index) -> tuple[Label, Label]:
        assert rule.factor_leaves is not None
        a, b = rule.factor_leaves
        return (a, index), (b, index)

    def rank(self, rule: Rule, index: Index, sources: Sources) -> int:
        axes = rule.factor_axes
        return sources[self.source].specs[self.a].shape[axes.a.index(RANK)]

    def memory(self, sources: Sources) -> int:
        return sum(sources[source].specs[name].nbytes for source, name in self.reads)


@dataclass(frozen=True)
class ModuleFactors:
    """Factors that lie in a PEFT adapter: ``lora_A`` and ``lora_B`` of each module."""

    modules: Mapping[Index, tuple[Read, Read, float]]

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(read for a, b, _ in self.modules.values() for read in (a, b))

    @property
    def scale(self) -> float | None:
        return None

    def open(
        self, rule: Rule, sources: Sources, done: Done, tick: Tick | None
    ) -> Callable[[Index], Matrices | None]:
        """Nothing is read yet; the result reads the factors of one weight as they are."""

        def read(index: Index) -> Matrices | None:
            if index not in self.modules:
                return None
            a, b, scale = self.modules[index]
            matrix_a, matrix_b = (whole(sources[read[0]], read, done, tick) for read in (a, b))
            return Matrices(matrix_a, matrix_b, scale)

        return read

    def labels(self, rule: Rule, index: Index) -> tuple[Label, Label]:
        (_, a), (_, b), _ = self.modules[index]
        return (a, None), (b, None)

    def rank(self, rule: Rule, index: Index, sources: Sources) -> int:
        if index not in self.modules:
            return 0
        source, name = self.modules[index][0]
        return sources[source].specs[name].shape[0]

    def memory(self, sources: Sources) -> int:
        return 0  # a pair at a time


def pieces(
    weights: WeightsReader, rule: Rule, sources: Sources, done: Done, tick: Tick | None
) -> Iterator[Piece]:
    """Weights put together from their regions: whole, or in runs of whole rows where a leaf is a single
    weight that streams (an embedding). A piece is valid until the next.

    Its axes lie in memory in the order in which they are stored, so that putting it together
    transposes nothing.
    """
    equation = rule.equation
    sizes = weights.sizes(rule, sources)
    full = tuple(sizes[axis] for axis in equation.of_weight.left)
    in_rows = equation.streams and not equation.placeholders
    building: dict[Index, tuple[np.ndarray, list[int]]] = {}
    spare: list[np.ndarray] = []
    for region in weights.regions(rule, sources, done, tick):
        shape = region.w.shape
        if shape == full or (in_rows and shape[1:] == full[1:]):
            yield Piece(region.index, region.at[0] if region.at else 0, region.w)
            continue
        if region.index not in building:
            fits = spare.pop() if spare and spare[-1].dtype == region.w.dtype else None
            weight = _empty_like(region.w, full) if fits is None else fits
            building[region.index] = (weight, [math.prod(full)])
        weight, left = building[region.index]
        weight[box(region.at, shape)] = region.w
        left[0] -= region.w.size
        if not left[0]:
            del building[region.index]
            yield Piece(region.index, 0, weight)
            spare.append(weight)


def _empty_like(w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised array of a shape, its axes in memory in the order that those of ``w`` have."""
    order = sorted(range(w.ndim), key=lambda axis: (-abs(w.strides[axis]), axis))
    stored: np.ndarray = np.empty([shape[axis] for axis in order], w.dtype)
    return stored.transpose([order.index(axis) for axis in range(w.ndim)])


def whole(source: Source, read: Read, done: Done, tick: Tick | None) -> np.ndarray:
    """Read an array in one go and note its checksum."""
    spec = source.specs[read[1]]
    array = np.empty(spec.shape, spec.dtype)
    digest = xxhash.xxh3_128()
    for at, values in source.slabs(read[1], None, done.spent):
        digest.update(raw(values))
        array[box(at, values.shape)] = values
        if tick is not None:
            tick(values.nbytes)
    done.read[read] = digest.hexdigest()
    return array
