"""One unit of work: one rule's weight from where it lies to where it goes, streamed.

A step says by itself what it reads and writes; it holds no data, shares nothing with other
steps, and can be pickled, so that any executor can run it. At most one slab of a leaf, its
factors and one weight as it is written are in memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from bridge.arrays import FLOAT32, Spec, all_finite, raw
from bridge.errors import Problem
from bridge.formats.contract import Sink, Spent
from bridge.lora.algebra import split
from bridge.rules.equation import Index
from bridge.rules.names import grouped
from bridge.rules.rule import Rule
from bridge.stream.readers import (
    Done,
    FactorReader,
    LeafFactors,
    Matrices,
    ModuleFactors,
    Read,
    Sources,
    Tick,
    Weights,
)
from bridge.stream.writers import AdapterWriter, FactorWriter, Writer, Written


@dataclass(frozen=True)
class Step:
    """Read ``weights`` and ``factors``; fold them where weights are written; write.

    Weights alone are exported, factors alone become an adapter, both are folded into weights.
    """

    rule: Rule
    part: str
    weights: Weights | None
    factors: FactorReader | None
    writer: Writer
    leaf_spec: Spec
    """Of the leaf, or of the JAX form the weights would have."""
    bytes_read: int
    """As stored."""
    memory: int
    """Estimated peak, in bytes."""

    @property
    def reads(self) -> tuple[Read, ...]:
        found = self.weights.reads if self.weights is not None else ()
        return found + (self.factors.reads if self.factors is not None else ())

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor the step writes."""
        return self.writer.specs

    @property
    def sizes(self) -> Mapping[str, int]:
        """Length of every axis of the leaf, by the rule's names."""
        return dict(zip(self.rule.equation.left, self.leaf_spec.shape, strict=True))

    @property
    def bytes_written(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def run_step(step: Step, sources: Sources, sink: Sink, tick: Tick | None = None) -> Done:
    """Carry out a step. Faulty values are reported in the result; nothing is hidden or mended.

    Raises:
        SourceRefused: a source cannot be read.
    """
    done = Done()
    faults = _Faults(step, sources)
    sums = {name: xxhash.xxh3_128() for name in step.specs}
    for name, array in _written(step, sources, _Timed(sink, done.spent), done, faults, tick):
        sums[name].update(raw(array))
    done.written = {name: digest.hexdigest() for name, digest in sums.items()}
    done.problems += faults.problems()
    return done


@dataclass(frozen=True)
class _Timed:
    """A sink that takes note of the time it takes."""

    sink: Sink
    spent: Spent

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        began = time.perf_counter()
        self.sink.write(name, array, at)
        self.spent.write += time.perf_counter() - began

    def finish(self) -> None:
        self.sink.finish()


def _written(
    step: Step, sources: Sources, sink: Sink, done: Done, faults: _Faults, tick: Tick | None
) -> Iterator[Written]:
    """Carry out a step, yielding what is written as it is written."""
    writer, rule = step.writer, step.rule
    if isinstance(writer, FactorWriter):
        yield from _write_factors(step, writer, sources, sink, done, faults, tick)
        return
    if isinstance(writer, AdapterWriter):
        assert isinstance(step.factors, LeafFactors)
        factors_at = step.factors.open(rule, sources, done, tick)
        for index in writer.pairs:
            factors = factors_at(index)
            faults.look_at_factors(index, factors.a, factors.b)
            matrix_a, matrix_b = writer.matrices(rule, index, factors)
            cast = faults.cast(index, matrix_a, writer.dtype), faults.cast(index, matrix_b, writer.dtype)
            yield from writer.write(sink, index, cast)
        return
    assert step.weights is not None
    session = writer.open(rule, step.sizes, sink, faults)
    changes = _Changes(step, sources, done, faults, tick)
    for region in step.weights.regions(rule, sources, done, tick):
        yield from session.put(region, changes.at(region.index))
    session.close()


class _Changes:
    """The low-rank change of each weight, as two matrices in float32. Holds the last one."""

    def __init__(self, step: Step, sources: Sources, done: Done, faults: _Faults, tick: Tick | None) -> None:
        self._step, self._sources, self._done, self._faults, self._tick = step, sources, done, faults, tick
        self._held: dict[Index, Matrices | None] = {}
        reader = step.factors
        self._factors_at = (
            reader.open(step.rule, sources, done, tick) if isinstance(reader, LeafFactors) else None
        )

    def at(self, index: Index) -> Matrices | None:
        if self._step.factors is None:
            return None
        if index not in self._held:
            if self._step.rule.equation.in_order:
                # weights come one after the other: the last one's is not needed again
                self._held.clear()
            self._held[index] = self._read(index)
        return self._held[index]

    def _read(self, index: Index) -> Matrices | None:
        if self._factors_at is not None:
            factors = self._factors_at(index)
            self._faults.look_at_factors(index, factors.a, factors.b)
            wide = (each.astype(FLOAT32, copy=False) for each in (factors.a, factors.b))
            return Matrices(*split(self._step.rule.equation.one, *wide), factors.scale)
        assert isinstance(self._step.factors, ModuleFactors)
        found = self._step.factors.matrices(index, self._sources, self._done, self._tick)
        if found is None:
            return None
        self._faults.look_at_factors(index, found.a, found.b)
        return Matrices(found.a.astype(FLOAT32, copy=False), found.b.astype(FLOAT32, copy=False), found.scale)


def _write_factors(
    step: Step,
    writer: FactorWriter,
    sources: Sources,
    sink: Sink,
    done: Done,
    faults: _Faults,
    tick: Tick | None,
) -> Iterator[Written]:
    """An adapter's modules as the two factor leaves of openpi; modules it lacks are zeros."""
    assert isinstance(step.factors, ModuleFactors)
    equation = step.rule.equation
    leaf_a, leaf_b = (np.zeros(spec.shape, spec.dtype) for spec in (writer.spec_a, writer.spec_b))
    views_b = dict(equation.slices(leaf_b))
    for index, view_a in equation.slices(leaf_a):
        matrices = step.factors.matrices(index, sources, done, tick)
        if matrices is None:
            continue
        faults.look_at_factors(index, matrices.a, matrices.b)
        a, b, _ = writer.fitted(equation.one, matrices)
        view_a[...] = faults.cast(index, a, writer.dtype)
        views_b[index][...] = faults.cast(index, b, writer.dtype)
    for name, leaf in ((writer.a, leaf_a), (writer.b, leaf_b)):
        sink.write(name, leaf)
        yield name, leaf


class _Faults:
    """Weights with faulty values, gathered so that each leaf is reported once."""

    def __init__(self, step: Step, sources: Sources) -> None:
        self._step, self._sources = step, sources
        self._non_finite: dict[str, list[Index]] = defaultdict(list)
        self._tensors: dict[str, Index] = {}
        self._overflow: list[Index] = []

    def not_finite(self, index: Index) -> None:
        """Values of the weight that were read are not finite."""
        at = self._non_finite[self._step.rule.leaf]
        if index not in at:
            at.append(index)

    def overflows(self, index: Index) -> None:
        """Finite values became too large, unless a fault that is known already made them so."""
        known = any(index in at for at in (*self._non_finite.values(), self._tensors.values()))
        if not known and index not in self._overflow:
            self._overflow.append(index)

    def look_at_factors(self, index: Index, a: np.ndarray, b: np.ndarray) -> None:
        reader = self._step.factors
        names: tuple[str, ...] = self._step.rule.factor_leaves or ()
        if isinstance(reader, ModuleFactors):
            names = tuple(read[1] for read in reader.modules[index][:2])
        for name, factor in zip(names, (a, b), strict=True):
            if all_finite(factor):
                continue
            if isinstance(reader, ModuleFactors):
                self._tensors[name] = index
            else:
                self._non_finite[name].append(index)

    def cast(self, index: Index, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """``array`` in the dtype it is written in; notes what does not fit."""
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = array.astype(dtype, copy=False)
        if not all_finite(narrow):
            self.overflows(index)
        return narrow

    def problems(self) -> list[Problem]:
        if not (self._non_finite or self._tensors or self._overflow):
            return []  # a step that only writes zeros reads nothing
        where = self._sources[self._step.reads[0][0]].location
        found = [
            Problem(
                f"{where}: {name} holds values that are not finite{self._layers(at)}",
                "training diverged or the file is damaged: convert an earlier step, or copy it again",
            )
            for name, at in self._non_finite.items()
        ]
        if self._tensors:
            assert self._step.factors is not None
            adapter = self._sources[self._step.factors.reads[0][0]].location
            found += [
                Problem(
                    f"{adapter}: {name} holds values that are not finite",
                    "training diverged or the file is damaged: convert an earlier step, or copy it again",
                )
                for name in grouped(self._tensors)
            ]
        if self._overflow:
            dtype = self._step.writer.dtype.name
            wide = dtype == "float32"
            found.append(
                Problem(
                    f"{where}: {self._step.rule.leaf} holds values too large for {dtype}"
                    f"{self._layers(self._overflow)}",
                    "the factors diverged, or alpha is wrong: convert an earlier step"
                    if wide
                    else "add --dtype float32",
                )
            )
        return found

    def _layers(self, at: list[Index]) -> str:
        if not self._step.rule.equation.placeholders:
            return ""
        numbers = sorted({index[0] for index in at})
        return f" ({self._step.rule.equation.placeholders[0]} {', '.join(map(str, numbers))})"
