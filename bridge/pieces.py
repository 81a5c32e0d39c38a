"""How one rule's weight is read: pieces of a leaf, whatever the container it lies in.

Every converter works on the same thing, a *piece*: what a leaf holds of one weight, in the
leaf's own axes, and the LoRA factors that belong to it. Containers differ only in the readers
here and the writers of :mod:`bridge.writers`. Readers hold no data and can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import xxhash

from bridge.axes import Index
from bridge.errors import Problem
from bridge.formats import Source
from bridge.lora import join
from bridge.rule import Rule
from bridge.specs import raw

Tick = Callable[[int], None]
"""Called with the number of source bytes (uncompressed) dealt with since the last call."""

Sources = Mapping[str, Source]
"""The sources of a plan: ``"source"``, and ``"base"`` where one is given."""

Read = tuple[str, str]
"""An array that is read: which source, and its name there."""


@dataclass(frozen=True)
class Piece:
    """The part of a leaf that becomes one weight (placeholders taken out of its axes).

    ``w`` may be a run of rows, starting at ``start``, where the leaf streams by rows.
    """

    index: Index
    start: int
    w: np.ndarray


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one weight, in the leaf's axes, and the factor of their product."""

    a: np.ndarray
    """(…shared, inner, rank)"""
    b: np.ndarray
    """(…shared, rank, outer)"""
    scale: float


@dataclass(frozen=True)
class Matrices:
    """LoRA factors of one weight as PEFT holds them, and the scale of their product."""

    a: np.ndarray
    """(rank, in)"""
    b: np.ndarray
    """(out, rank)"""
    scale: float


@dataclass
class Done:
    """What a step found while it ran."""

    read: dict[Read, str] = field(default_factory=dict)
    """Checksum of every array read."""
    written: dict[str, str] = field(default_factory=dict)
    """Checksum of every tensor written, by name."""
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class LeafWeights:
    """Weights that lie in a leaf of a JAX pytree."""

    source: str
    name: str

    @property
    def reads(self) -> tuple[Read, ...]:
        return ((self.source, self.name),)

    def pieces(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Piece]:
        source, equation = sources[self.source], rule.equation
        if not equation.streams:
            for index, one in equation.slices(whole(source, self.reads[0], done, tick)):
                yield Piece(index, 0, one)
            return
        digest = xxhash.xxh3_128()
        for first, rows in source.blocks(self.name):
            digest.update(raw(rows))
            if equation.placeholders:
                for index, one in equation.slices(rows):
                    # the first placeholder is the axis that the blocks run along
                    yield Piece((index[0] + first, *index[1:]), 0, one)
            else:
                yield Piece((), first, rows)
            if tick is not None:
                tick(rows.nbytes)
        done.read[self.reads[0]] = digest.hexdigest()


@dataclass(frozen=True)
class TensorWeights:
    """Weights that lie in a state_dict, each a tensor of its own."""

    tensors: Mapping[Index, Read]
    sizes: Mapping[str, int]
    twins: Mapping[Index, Read] = field(default_factory=dict)
    """Tensors that must equal these: a tied weight that was stored under both its names."""

    @property
    def reads(self) -> tuple[Read, ...]:
        return (*self.tensors.values(), *self.twins.values())

    def pieces(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Piece]:
        equation = rule.equation
        for index, read in self.tensors.items():
            source = sources[read[0]]
            if equation.placeholders or not equation.streams:
                tensor = whole(source, read, done, tick)
                yield Piece(index, 0, equation.restore(tensor, self.sizes))
                continue
            digest = xxhash.xxh3_128()
            for first, rows in source.blocks(read[1]):
                digest.update(raw(rows))
                sizes = {**self.sizes, equation.left[0]: len(rows)}
                yield Piece(index, first, equation.restore(rows, sizes))
                if tick is not None:
                    tick(rows.nbytes)
            done.read[read] = digest.hexdigest()
        for index, twin in self.twins.items():
            digest = xxhash.xxh3_128()
            for _, rows in sources[twin[0]].blocks(twin[1]):
                digest.update(raw(rows))
                if tick is not None:
                    tick(rows.nbytes)
            done.read[twin] = digest.hexdigest()
            if done.read[twin] != done.read[self.tensors[index]]:
                done.problems.append(
                    Problem(
                        f"{sources[twin[0]].location}: {twin[1]} and {self.tensors[index][1]} are one tensor in "
                        "openpi, and differ here",
                        "training untied them: save the checkpoint with the one that is used under both names",
                    )
                )


@dataclass(frozen=True)
class ReplacedWeights:
    """Weights of which some are taken from elsewhere, each a tensor of its own."""

    weights: LeafWeights | TensorWeights
    own: Mapping[Index, Read]
    sizes: Mapping[str, int]

    @property
    def reads(self) -> tuple[Read, ...]:
        return (*self.weights.reads, *self.own.values()) if self.rule_has_more else tuple(self.own.values())

    @property
    def rule_has_more(self) -> bool:
        """Whether any weight still comes from where the others are."""
        return self.own.keys() != {()}

    def pieces(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Piece]:
        if not self.rule_has_more:
            yield from TensorWeights(self.own, self.sizes).pieces(rule, sources, done, tick)
            return
        for piece in self.weights.pieces(rule, sources, done, tick):
            if piece.index in self.own:
                read = self.own[piece.index]
                tensor = whole(sources[read[0]], read, done, tick)
                yield Piece(piece.index, 0, rule.equation.restore(tensor, self.sizes))
            else:
                yield piece


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

    def open(
        self, rule: Rule, sources: Sources, done: Done, tick: Tick | None
    ) -> Callable[[Index], Factors | None]:
        """Read both leaves; the result gives the factors of one weight."""
        a, b = (
            dict(rule.equation.slices(whole(sources[self.source], read, done, tick))) for read in self.reads
        )
        return lambda index: Factors(a[index], b[index], self.scale)


@dataclass(frozen=True)
class ModuleFactors:
    """Factors that lie in a PEFT adapter: ``lora_A`` and ``lora_B`` of each module."""

    modules: Mapping[Index, tuple[Read, Read, float]]
    sizes: Mapping[str, int]

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(read for a, b, _ in self.modules.values() for read in (a, b))

    def open(
        self, rule: Rule, sources: Sources, done: Done, tick: Tick | None
    ) -> Callable[[Index], Factors | None]:
        """Read nothing yet; the result reads the factors of one weight, or gives None."""

        def at(index: Index) -> Factors | None:
            found = self.matrices(index, sources, done, tick)
            if found is None:
                return None
            return Factors(*join(rule.equation.one, found.a, found.b, self.sizes), found.scale)

        return at

    def matrices(self, index: Index, sources: Sources, done: Done, tick: Tick | None) -> Matrices | None:
        """Read the factors of one weight as they are, or give None where it has none."""
        if index not in self.modules:
            return None
        a, b, scale = self.modules[index]
        matrix_a, matrix_b = (whole(sources[read[0]], read, done, tick) for read in (a, b))
        return Matrices(matrix_a, matrix_b, scale)


Weights = LeafWeights | TensorWeights | ReplacedWeights
FactorReader = LeafFactors | ModuleFactors


def whole(source: Source, read: Read, done: Done, tick: Tick | None) -> np.ndarray:
    """Read an array in one go and note its checksum."""
    array = np.ascontiguousarray(source.read(read[1]))
    done.read[read] = xxhash.xxh3_128(raw(array)).hexdigest()
    if tick is not None:
        tick(array.nbytes)
    return array
