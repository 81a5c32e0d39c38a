"""What a writer is given to do, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bridge.arrays import FLOAT32, Spec
from bridge.formats.contract import Sink
from bridge.lora.factors import LowRank, Matrices
from bridge.rules.equation import Index
from bridge.rules.rule import Rule
from bridge.stream.faults import Faults
from bridge.stream.readers import Done, FactorReader, Sources, Tick, WeightsReader

Written = tuple[str, np.ndarray]
"""A name and the values that went under it, in order; valid until the next."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a writer writes from, and where to."""

    rule: Rule
    sizes: Mapping[str, int]
    """Length of every axis of the leaf."""
    weights: WeightsReader | None
    factors: FactorReader | None
    sources: Sources
    sink: Sink
    done: Done
    faults: Faults
    tick: Tick | None

    def changes(self) -> Changes:
        """The low-rank change of each weight."""
        return Changes(self)


class Changes:
    """The low-rank change of each weight, checked. Keeps the last, or all where weights lie interleaved."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._kept: dict[Index, Matrices | None] = {}
        reader = work.factors
        self._read = None if reader is None else reader.open(work.rule, work.sources, work.done, work.tick)

    def at(self, index: Index) -> LowRank | None:
        """As it is stored; None where the weight has none."""
        if self._read is None:
            return None
        change = self._read(index)
        if change is not None:
            assert self._work.factors is not None
            self._work.faults.check(index, self._work.factors, change, self._work.sources)
        return change

    def folded_at(self, index: Index) -> Matrices | None:
        """As two matrices in float32, made once for all boxes of a weight."""
        if self._read is None:
            return None
        if index not in self._kept:
            if self._work.rule.equation.in_order:
                # weights come one after the other: the last one's is not needed again
                self._kept.clear()
            change = self.at(index)
            self._kept[index] = None if change is None else change.matrices(FLOAT32)
        return self._kept[index]


class Writer(Protocol):
    """Writes what becomes of one leaf."""

    @property
    def specs(self) -> dict[str, Spec]:
        """Every array it writes."""
        ...

    @property
    def dtype(self) -> np.dtype: ...

    def write(self, work: Work) -> Iterator[Written]:
        """Carry out a step, yielding what is written as it is written."""
        ...

    def memory(self, work: Load) -> int:
        """Bytes that a step with this writer has in memory at its fullest."""
        ...


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the memory of a step is estimated from."""

    rule: Rule
    sizes: Mapping[str, int]
    slab: int
    """Bytes that reading the weights keeps in memory."""
    factors: int
    """Bytes of the factors that stay in memory."""
