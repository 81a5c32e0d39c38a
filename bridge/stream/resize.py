"""Weights and factors whose axes are cut or padded on their way from a source to an output.

Readers around other readers: what is read is the container's own, what comes out has the new
lengths, so that no writer knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bridge.arrays import Spec, box
from bridge.lora.factors import LowRank, Matrices
from bridge.rules.equation import Index
from bridge.rules.initialiser import Initialiser
from bridge.rules.rule import Rule
from bridge.stream.readers import (
    Done,
    Drawn,
    FactorReader,
    Label,
    Read,
    Region,
    Sources,
    Tick,
    WeightsReader,
)


@dataclass(frozen=True, kw_only=True)
class ResizedWeights:
    """Weights of other lengths than they are stored in: entries at the end are left out, or drawn."""

    weights: WeightsReader
    stored: Mapping[str, int]
    """Lengths in the source, of the axes whose length changes."""
    lengths: Mapping[str, int]
    """Of every axis, as they come out."""
    start: Initialiser
    seed: int

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.weights.reads

    def sizes(self, rule: Rule, sources: Sources) -> Mapping[str, int]:
        return self.lengths

    def at(self, index: Index) -> Read:
        return self.weights.at(index)

    def only(self, indices: Collection[Index]) -> ResizedWeights:
        return replace(self, weights=self.weights.only(indices))

    def names(self, rule: Rule) -> tuple[str, ...]:
        return self.weights.names(rule)

    def spec(self, leaf: Spec, sources: Sources) -> Spec:
        return self.weights.spec(leaf, sources)

    @cached_property
    def _grown(self) -> frozenset[str]:
        return frozenset(axis for axis, length in self.stored.items() if self.lengths[axis] > length)

    def regions(self, rule: Rule, sources: Sources, done: Done, tick: Tick | None) -> Iterator[Region]:
        """The source's regions without what is left out; those at an end that grows reach the new one."""
        axes = rule.equation.of_weight.left
        fresh: dict[Index, np.ndarray] = {}
        for region in self.weights.regions(rule, sources, done, tick):
            kept = [
                max(0, min(n, self.lengths[axis] - at))
                for axis, at, n in zip(axes, region.at, region.w.shape, strict=True)
            ]
            if not all(kept):
                continue
            w = region.w[box((0,) * len(kept), tuple(kept))]
            shape = tuple(
                self.lengths[axis] - at if axis in self._grown and at + n == self.stored[axis] else n
                for axis, at, n in zip(axes, region.at, w.shape, strict=True)
            )
            if shape != w.shape:
                if region.index not in fresh:
                    fresh[region.index] = self._fresh(rule, region.index)
                wide = fresh[region.index][box(region.at, shape)].astype(w.dtype)
                wide[box((0,) * len(kept), w.shape)] = w
                self._note(rule, done, wide.size - w.size)
                w = wide
            yield Region(region.index, region.at, w)

    def _fresh(self, rule: Rule, index: Index) -> np.ndarray:
        """A weight as the runtime would start it, in the axes of the leaf.

        Drawn in the order of the weight's own axes: one number, whichever container it is read from.
        """
        equation = rule.equation.of_weight
        shape = equation.weight_shape(self.lengths)
        drawn = self.start.fill(f"{self.seed}:{rule.leaf}:{index}", shape, math.prod(shape[1:]))
        apart = drawn.reshape([self.lengths[axis] for axis in equation.weight_axes])
        leaf: np.ndarray = apart.transpose([equation.weight_axes.index(axis) for axis in equation.left])
        return leaf

    def _note(self, rule: Rule, done: Done, more: int) -> None:
        known = done.drawn.get(rule.leaf)
        done.drawn[rule.leaf] = Drawn((known.values if known else 0) + more, str(self.start))


@dataclass(frozen=True)
class ResizedFactors:
    """Factors of resized weights: what is left out of a weight goes from its change, what is new has none."""

    factors: FactorReader
    lengths: Mapping[str, int]
    """Of every axis of the weight, as it comes out."""

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.factors.reads

    @property
    def scale(self) -> float | None:
        return self.factors.scale

    def open(
        self, rule: Rule, sources: Sources, done: Done, tick: Tick | None
    ) -> Callable[[Index], LowRank | None]:
        change_at = self.factors.open(rule, sources, done, tick)
        rows, columns = rule.equation.weight_shape(self.lengths)

        def read(index: Index) -> LowRank | None:
            change = change_at(index)
            if change is None:
                return None
            matrices = change.matrices()
            return Matrices(_fitted(matrices.a, 1, columns), _fitted(matrices.b, 0, rows), matrices.scale)

        return read

    def labels(self, rule: Rule, index: Index) -> tuple[Label, Label]:
        return self.factors.labels(rule, index)

    def rank(self, rule: Rule, index: Index, sources: Sources) -> int:
        return self.factors.rank(rule, index, sources)

    def memory(self, sources: Sources) -> int:
        return self.factors.memory(sources)


def _fitted(matrix: np.ndarray, axis: int, length: int) -> np.ndarray:
    """A matrix cut or padded with zeros at the end of an axis."""
    shape = list(matrix.shape)
    shape[axis] = length
    fitted = np.zeros(shape, matrix.dtype)
    both = tuple(slice(0, min(a, b)) for a, b in zip(shape, matrix.shape, strict=True))
    fitted[both] = matrix[both]
    return fitted
