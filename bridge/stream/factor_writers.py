"""How the LoRA factors of one leaf are written: as pairs of an adapter, or as two leaves of a JAX pytree."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bridge.arrays import FLOAT32, Spec
from bridge.lora.algebra import blocks_of, compress, dead, join, pad, reduce, stack
from bridge.lora.factors import LowRank, Matrices
from bridge.rules.equation import Index
from bridge.rules.factoring import RANK, FactorAxes
from bridge.rules.initialiser import Initialiser
from bridge.stream.readers import Drawn
from bridge.stream.work import Load, Work, Written


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two tensors of one module of an adapter, with the scale PEFT applies at run time."""

    a: str
    b: str
    spec_a: Spec
    spec_b: Spec
    runtime: float
    """alpha / rank as the adapter's config gives it: what is left is folded into ``lora_B``."""


@dataclass(frozen=True)
class AdapterWriter:
    """LoRA factors as PEFT's ``lora_A`` (rank, in) and ``lora_B`` (out, rank)."""

    pairs: Mapping[Index, Pair]
    compress_to: int | None = None
    """Largest rank to keep; None keeps all."""

    @property
    def specs(self) -> dict[str, Spec]:
        return {
            name: spec
            for pair in self.pairs.values()
            for name, spec in ((pair.a, pair.spec_a), (pair.b, pair.spec_b))
        }

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.pairs.values())).spec_b.dtype

    def memory(self, work: Load) -> int:
        return work.factors + _matrix_memory(self)

    def matrices(self, index: Index, change: LowRank) -> tuple[np.ndarray, np.ndarray]:
        """``lora_A`` and ``lora_B`` as written, before the cast."""
        pair = self.pairs[index]
        fold = 1.0 if change.scale == pair.runtime else change.scale / pair.runtime
        computes = fold != 1 or self.compress_to is not None
        made = change.matrices(_wide(change) if computes else None)
        matrix_a, matrix_b = made.a, made.b
        if fold != 1:
            matrix_b = _scaled(matrix_b, fold)
        if self.compress_to is not None and len(matrix_a) > self.compress_to:
            matrix_a, matrix_b, _ = compress(matrix_a, matrix_b, self.compress_to)
        return matrix_a, matrix_b

    def write(self, work: Work) -> Iterator[Written]:
        changes = work.changes()
        for index, pair in self.pairs.items():
            change = changes.at(index)
            assert change is not None
            matrix_a, matrix_b = self.matrices(index, change)
            for name, matrix, spec in ((pair.a, matrix_a, pair.spec_a), (pair.b, matrix_b, pair.spec_b)):
                cast = work.faults.cast(index, matrix, spec.dtype)
                work.sink.write(name, np.ascontiguousarray(cast))
                yield name, cast


@dataclass(frozen=True, kw_only=True)
class FactorWriter:
    """LoRA factors as the two leaves that the JAX runtime keeps beside a weight's."""

    a: str
    b: str
    spec_a: Spec
    """Its axes are those of :attr:`FactorAxes.a`."""
    spec_b: Spec
    axes: FactorAxes
    """Of the leaf."""
    sizes: Mapping[str, int]
    runtime: float
    """The scale the runtime applies: what an adapter's scale is more is folded into b."""
    start: Initialiser
    """What a first factor is drawn from where an adapter has none."""
    seed: int
    family: str
    """Whose runtime it is, for messages."""
    lossy: bool = False
    """Whether factors of a larger rank are approximated; they are a fault otherwise."""

    @property
    def specs(self) -> dict[str, Spec]:
        return {self.a: self.spec_a, self.b: self.spec_b}

    @property
    def dtype(self) -> np.dtype:
        return self.spec_a.dtype

    @property
    def rank(self) -> int:
        return self.spec_a.shape[self.axes.a.index(RANK)]

    def memory(self, work: Load) -> int:
        return work.factors + _matrix_memory(self)

    def indices(self) -> Iterator[Index]:
        """Every weight of the leaf."""
        return np.ndindex(*(self.sizes[axis] for axis in self.axes.equation.placeholders))

    def groups(self) -> list[list[Index]]:
        """The weights of the leaf that share their first factor, together."""
        sharing: defaultdict[Index, list[Index]] = defaultdict(list)
        for index in self.indices():
            sharing[tuple(index[n] for n in self.axes.placeholders_a)].append(index)
        return list(sharing.values())

    def fitted(
        self, changes: Mapping[Index, LowRank]
    ) -> tuple[dict[Index, tuple[np.ndarray, np.ndarray]], float]:
        """Factors of the leaf's rank for weights that share their first factor, and their relative error.

        Exact where the matrices are block diagonal as :func:`bridge.lora.algebra.split` makes them, or
        of no larger rank; else the best approximation.
        """
        axes = self.axes.of_weight
        own = self._as_stored(changes)
        if own is not None:
            return own, 0.0
        wide = {index: change.matrices(_wide(change)) for index, change in changes.items()}
        if len(wide) > 1:
            # scales are folded in first: a common factor must weigh each weight by its own
            common, seconds = stack([(m.a, _scaled(m.b, m.scale / self.runtime)) for m in wide.values()])
            made = {i: (common, b) for i, b in zip(wide, seconds, strict=True)}
            error = 0.0
            if len(common) > self.rank:
                common, tall, error = compress(common, np.concatenate(seconds), self.rank)
                rows = np.cumsum([len(b) for b in seconds])[:-1]
                made = {i: (common, b) for i, b in zip(wide, np.split(tall, rows), strict=True)}
            return {i: self._padded(*join(axes, a, b, self.sizes)) for i, (a, b) in made.items()}, error
        ((index, matrices),) = wide.items()
        a, b, error = self._fit(axes, matrices, changes[index])
        fold = matrices.scale / self.runtime
        if fold != 1:
            b = _scaled(b, fold)
        return {index: self._padded(a, b)}, error

    def _as_stored(
        self, changes: Mapping[Index, LowRank]
    ) -> dict[Index, tuple[np.ndarray, np.ndarray]] | None:
        """Factors that lie in the leaf's form already, at its rank: None where they need a larger one.

        Components that are zero in either factor of all these weights count for nothing.
        """
        axes = self.axes.of_weight
        if any(change.axes != axes for change in changes.values()):
            return None
        at_a, at_b = axes.a.index(RANK), axes.b.index(RANK)
        live = np.logical_or.reduce(
            [_filled(change.a, at_a) & _filled(change.b, at_b) for change in changes.values()]
        )
        if live.size <= self.rank:
            live[:] = True
        elif np.count_nonzero(live) > self.rank:
            return None
        fitted = {}
        for index, change in changes.items():
            a, b = change.a.compress(live, at_a), change.b.compress(live, at_b)
            if change.scale != self.runtime:
                b = _scaled(b.astype(_wide(change), copy=False), change.scale / self.runtime)
            fitted[index] = self._padded(a, b)
        return fitted

    def _fit(
        self, axes: FactorAxes, matrices: Matrices, change: LowRank
    ) -> tuple[np.ndarray, np.ndarray, float]:
        if change.axes == axes:
            wide = _wide(change)
            return reduce(axes, change.a.astype(wide), change.b.astype(wide), self.rank)
        blocks = blocks_of(axes, matrices.a, matrices.b, self.sizes)
        if blocks is not None and blocks[2] == 0 and blocks[0].shape[axes.a.index(RANK)] <= self.rank:
            return blocks[0], blocks[1], 0.0
        a, b = join(axes, matrices.a, matrices.b, self.sizes)
        if len(matrices.a) > self.rank:
            return reduce(axes, a, b, self.rank)
        return a, b, 0.0

    def _padded(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axes = self.axes.of_weight
        return pad(a, self.rank, axis=axes.a.index(RANK)), pad(b, self.rank, axis=axes.b.index(RANK))

    def misfit(self, changes: Mapping[Index, LowRank]) -> str | None:
        """Why the factors of weights that share a first one do not fit the rank without loss, or None."""
        axes = self.axes.of_weight
        if self._as_stored(changes) is not None:
            return None
        first = next(iter(changes.values()))
        if first.axes == axes:
            return f"has rank {first.a.shape[axes.a.index(RANK)]}; {self.family}'s is {self.rank}"
        if len(changes) > 1:
            made = [change.matrices() for change in changes.values()]
            total = len(stack([(m.a, m.b) for m in made])[0])
            if total <= self.rank:
                return None
            return f"needs rank {total} together with what shares its first factor; {self.family}'s is {self.rank}"
        matrices = first.matrices()
        rank = matrices.a.shape[0]
        if rank <= self.rank:
            return None
        blocks = blocks_of(axes, matrices.a, matrices.b, self.sizes)
        count = math.prod(self.sizes[axis] for axis in axes.kept)
        if blocks is None or count == 1:
            return f"has rank {rank}; {self.family}'s is {self.rank}"
        block_rank = blocks[0].shape[axes.a.index(RANK)]
        if block_rank > self.rank:
            return f"has {count} blocks of rank {block_rank}; {self.family}'s rank is {self.rank}"
        if blocks[2]:
            return (
                f"has rank {rank} and non-zero entries outside its {count} diagonal blocks "
                f"(up to {blocks[2]:.1e} of the largest entry)"
            )
        return None

    def write(self, work: Work) -> Iterator[Written]:
        """An adapter's modules as two leaves. What it lacks starts: ``a`` is drawn, ``b`` zero."""
        leaf_a, leaf_b = (np.zeros(spec.shape, spec.dtype) for spec in (self.spec_a, self.spec_b))
        views = {index: (a, b) for index, a, b in self.axes.slices(leaf_a, leaf_b)}
        changes = work.changes()
        for group in self.groups():
            there = {index: change for index in group if (change := changes.at(index)) is not None}
            if not there:
                continue
            for index, factors in self.fitted(there)[0].items():
                for view, factor in zip(views[index], factors, strict=True):
                    view[...] = work.faults.cast(index, factor, self.dtype)
        self._start(leaf_a, leaf_b, work)
        for name, leaf in ((self.a, leaf_a), (self.b, leaf_b)):
            work.sink.write(name, leaf)
            yield name, leaf

    def _start(self, leaf_a: np.ndarray, leaf_b: np.ndarray, work: Work) -> None:
        """Draw the first factor where both are zero: padded ranks, absent modules, and what never trained."""
        fresh = np.broadcast_to(dead(self.axes, leaf_a, leaf_b), leaf_a.shape)
        if not fresh.any():
            return
        assert work.rule.factor_leaves is not None
        path = work.rule.factor_leaves[0]
        fan_in = math.prod(self.sizes[axis] for axis in self.axes.equation.right[1])
        # a key of the path in the rules: how a container spells it changes no number
        drawn = self.start.fill(f"{self.seed}:{path}", leaf_a.shape, fan_in)
        np.copyto(leaf_a, drawn.astype(self.dtype), where=fresh)
        work.done.drawn[path] = Drawn(int(np.count_nonzero(fresh)), str(self.start))


def _filled(factor: np.ndarray, axis: int) -> np.ndarray:
    """Where along an axis anything is not zero."""
    filled: np.ndarray = (factor != 0).any(axis=tuple(n for n in range(factor.ndim) if n != axis))
    return filled


def _wide(change: LowRank) -> np.dtype:
    """float32, or what is wider. The 16-bit dtypes have no common one of their own."""
    return np.promote_types(np.promote_types(change.a.dtype, FLOAT32), change.b.dtype)


def _matrix_memory(writer: AdapterWriter | FactorWriter) -> int:
    """Bytes of the matrices of one module, in all their forms."""
    return 6 * max((spec.size for spec in writer.specs.values()), default=0) * FLOAT32.itemsize


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """``array * factor``, rounded once: the factor itself may not be a float32."""
    return (array.astype(np.float64) * factor).astype(array.dtype)
