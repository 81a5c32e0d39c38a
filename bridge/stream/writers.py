"""How the weights of one leaf are written: tensors of a state_dict, LoRA pairs of an adapter, or leaves.

The counterpart of :mod:`bridge.stream.readers`. Writers hold no data and can be pickled; each
carries out its own part of a step (:meth:`Writer.write`), and a *session* keeps what it has not
written yet.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bridge.arrays import FLOAT32, Spec, run_shape
from bridge.formats.contract import RUN_BYTES, Sink
from bridge.lora.algebra import blocks_of, compress, join, pad, reduce, stack
from bridge.lora.factors import LowRank, Matrices
from bridge.rules.equation import Equation, Index
from bridge.rules.factoring import RANK, FactorAxes
from bridge.rules.rule import Rule
from bridge.stream.assemble import Gather
from bridge.stream.faults import Faults
from bridge.stream.readers import Done, FactorReader, Region, Sources, Tick, WeightsReader
from bridge.stream.tiles import TILE, NonFinite, Product, Workspace, place

Written = tuple[str, np.ndarray]
"""A name and the values that went under it, in order; valid until the next."""

#: what the tiles of a worker take
TILES = 4 * TILE * FLOAT32.itemsize


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


class Session(Protocol):
    """One step's writing of weights."""

    def put(self, region: Region, change: Matrices | None) -> Iterator[Written]:
        """Take a box of a weight, and the low-rank change that is summed into it."""
        ...

    def close(self) -> None:
        """Make sure that nothing is left half filled. Raises ValueError."""
        ...


def _write_weights(session: Session, work: Work) -> Iterator[Written]:
    assert work.weights is not None
    changes = work.changes()
    for region in work.weights.regions(work.rule, work.sources, work.done, work.tick):
        yield from session.put(region, changes.folded_at(region.index))
    session.close()


@dataclass(frozen=True)
class TensorWriter:
    """Weights as tensors."""

    names: Mapping[Index, tuple[str, ...]]
    """For each index, the names the weight is written under (several where ties are spelled out)."""
    spec: Spec
    """Of each weight, as written."""

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: self.spec for names in self.names.values() for name in names}

    @property
    def dtype(self) -> np.dtype:
        return self.spec.dtype

    def memory(self, work: Load) -> int:
        cell = Spec(_tensor_cell(work.rule.equation.of_weight, work.sizes, self.spec.dtype), self.spec.dtype)
        cells = 1 if work.rule.equation.in_order else max(len(self.names), 1)
        return work.slab + work.factors + cells * cell.nbytes + TILES

    def write(self, work: Work) -> Iterator[Written]:
        return _write_weights(_TensorSession(self, work), work)


def _tensor_cell(equation: Equation, sizes: Mapping[str, int], dtype: np.dtype) -> tuple[int, ...]:
    """How much of a tensor is gathered, in the axes of its right side, before it is written."""
    shape = tuple(sizes[axis] for axis in equation.weight_axes)
    # where the order of axes changes, every row of the source reaches into every row of the tensor
    return run_shape(Spec(shape, dtype), RUN_BYTES) if equation.weight_axes == equation.left else shape


class _TensorSession:
    def __init__(self, writer: TensorWriter, work: Work) -> None:
        self._writer, self._sink = writer, work.sink
        equation = work.rule.equation.of_weight
        self._placing = Placing(equation, work.sizes, work.faults)
        self._cell = _tensor_cell(equation, work.sizes, writer.dtype)
        self._spare: list[np.ndarray] = []
        self._open: dict[Index, Gather] = {}

    def put(self, region: Region, change: Matrices | None) -> Iterator[Written]:
        if region.index not in self._writer.names:
            return  # an adapter may carry some of a leaf's weights only
        placing = self._placing
        if region.index not in self._open:
            self._open[region.index] = Gather(placing.shape, self._cell, self._writer.dtype, self._spare)
        gather = self._open[region.index]
        at = tuple(region.at[axis] for axis in placing.order)
        w = region.w.transpose(placing.order)
        for part, into, cell in gather.parts(at, w.shape):
            begin = tuple(a + p.start for a, p in zip(at, part, strict=True))
            placing.place(into, w[part], begin, region.index, change)
            whole = gather.filled(cell, into.size)
            if whole is not None:
                yield from self._written(region.index, whole, cell)
                gather.release(cell)
        if gather.is_done:
            del self._open[region.index]

    def _written(self, index: Index, whole: np.ndarray, cell: tuple[int, ...]) -> Iterator[Written]:
        at, shape = self._placing.grouped(cell, whole.shape)
        whole = whole.reshape(shape)
        for name in self._writer.names[index]:
            self._sink.write(name, whole, at)
            yield name, whole

    def close(self) -> None:
        if self._open:
            raise ValueError(f"the source gave only a part of {len(self._open)} weights")


@dataclass(frozen=True)
class LeafWriter:
    """Weights as one leaf of a JAX pytree."""

    name: str
    spec: Spec

    @property
    def specs(self) -> dict[str, Spec]:
        return {self.name: self.spec}

    @property
    def dtype(self) -> np.dtype:
        return self.spec.dtype

    def cell(self, equation: Equation) -> tuple[int, ...]:
        """How much of the leaf is gathered before it is written."""
        # weights come one after the other: a leaf that has them in another order is gathered whole
        return run_shape(self.spec, RUN_BYTES) if equation.in_order else self.spec.shape

    def memory(self, work: Load) -> int:
        return work.slab + work.factors + self._gathered(work.rule, work.sizes) + TILES

    def _gathered(self, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes of the chunks that one weight fills together."""
        cell = Spec(self.cell(rule.equation), self.spec.dtype).nbytes
        equation = rule.equation.of_weight
        if equation.weight_axes == equation.left:
            return cell  # what comes in its order is written as it comes
        weight = Spec(tuple(sizes[axis] for axis in equation.left), self.spec.dtype).nbytes
        return min(max(cell, weight), self.spec.nbytes)

    def write(self, work: Work) -> Iterator[Written]:
        return _write_weights(_LeafSession(self, work), work)


class _LeafSession:
    """A leaf, filled weight by weight and written chunk by chunk."""

    def __init__(self, writer: LeafWriter, work: Work) -> None:
        self._writer, self._equation, self._sink = writer, work.rule.equation, work.sink
        self._placing = Placing(self._equation.of_weight, work.sizes, work.faults)
        self._gather = Gather(writer.spec.shape, writer.cell(self._equation), writer.dtype, [])

    def put(self, region: Region, change: Matrices | None) -> Iterator[Written]:
        equation, placing = self._equation, self._placing
        numbers = dict(zip(equation.placeholders, region.index, strict=True))
        starts = dict(zip(equation.of_weight.left, region.at, strict=True)) | numbers
        lengths = dict(zip(equation.of_weight.left, region.w.shape, strict=True))
        at = tuple(starts.get(axis, 0) for axis in equation.left)
        shape = tuple(lengths.get(axis, 1) for axis in equation.left)
        # the box's own axes in the leaf, brought into the order of the tensor's
        own = [equation.left.index(axis) for axis in equation.of_weight.left]
        for part, into, cell in self._gather.parts(at, shape):
            taken = tuple(part[axis] for axis in own)
            view = _only(into, own).transpose(placing.order)
            w = region.w[taken].transpose(placing.order)
            begin = tuple(region.at[i] + taken[i].start for i in placing.order)
            placing.place(view, w, begin, region.index, change)
            whole = self._gather.filled(cell, into.size)
            if whole is not None:
                self._sink.write(self._writer.name, whole, cell)
                yield self._writer.name, whole
                self._gather.release(cell)

    def close(self) -> None:
        if not self._gather.is_done:
            raise ValueError(f"the source gave only a part of {self._writer.name}")


def _only(array: np.ndarray, axes: list[int]) -> np.ndarray:
    """``array`` with these of its axes alone; the others have length one."""
    return array[tuple(slice(None) if axis in axes else 0 for axis in range(array.ndim))]


class Placing:
    """How boxes of one weight go to their place: its axes as the tensor has them, and its change.

    Args:
        equation: of one weight.
        sizes: of every axis.
        faults: records values that are not finite.
    """

    def __init__(self, equation: Equation, sizes: Mapping[str, int], faults: Faults) -> None:
        self.order = [equation.left.index(axis) for axis in equation.weight_axes]
        """Positions, among the leaf's axes, of the tensor's."""
        self.shape = tuple(sizes[axis] for axis in equation.weight_axes)
        self._outputs = len(equation.right[0])
        self._steps = [_steps(group, equation.weight_axes, sizes) for group in equation.right]
        self._work, self._faults = Workspace(), faults

    def grouped(self, at: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Position and shape of a run of the tensor, with the axes of each group as one."""
        begins = tuple(sum(a * step for a, step in zip(at, steps, strict=True)) for steps in self._steps)
        lengths = tuple(
            math.prod(n for n, step in zip(shape, steps, strict=True) if step) for steps in self._steps
        )
        return begins, lengths

    def place(
        self, into: np.ndarray, w: np.ndarray, at: tuple[int, ...], index: Index, change: Matrices | None
    ) -> None:
        """Fill a box, whose axes and position are the tensor's."""
        product = None
        if change is not None:
            # axes of the outputs move along rows, those of the inputs along columns
            product = Product(change, tuple(map(sum, zip(*self._steps, strict=True))), self._outputs, at)
        faulty = NonFinite()
        place(into, w, product, self._work, faulty)
        if faulty.source:
            self._faults.not_finite(index)
        if faulty.result:
            self._faults.overflows(index)


def _steps(group: tuple[str, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """How far one step along each axis moves along a group of them that is one axis of the matrix."""
    lengths = [sizes[axis] for axis in group]
    step = {axis: math.prod(lengths[i + 1 :]) for i, axis in enumerate(group)}
    return tuple(step.get(axis, 0) for axis in axes)


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
        fold = change.scale / pair.runtime
        computes = fold != 1 or self.compress_to is not None
        wide = np.promote_types(np.promote_types(change.a.dtype, change.b.dtype), FLOAT32)
        made = change.matrices(wide if computes else None)
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
            for name, matrix in zip((pair.a, pair.b), self.matrices(index, change), strict=True):
                cast = work.faults.cast(index, matrix, self.dtype)
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
        a, b, error = self._fit(axes, matrices)
        fold = matrices.scale / self.runtime
        if fold != 1:
            b = _scaled(b, fold)
        return {index: self._padded(a, b)}, error

    def _fit(self, axes: FactorAxes, matrices: Matrices) -> tuple[np.ndarray, np.ndarray, float]:
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

    def misfit(self, changes: Mapping[Index, Matrices]) -> str | None:
        """Why the matrices of weights that share a first factor do not fit the rank without loss, or None."""
        axes = self.axes.of_weight
        if len(changes) > 1:
            total = len(stack([(m.a, m.b) for m in changes.values()])[0])
            if total <= self.rank:
                return None
            return f"needs rank {total} together with what shares its first factor; {self.family}'s is {self.rank}"
        (matrices,) = changes.values()
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
        """An adapter's modules as two leaves; those of modules it lacks are zeros."""
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
        for name, leaf in ((self.a, leaf_a), (self.b, leaf_b)):
            work.sink.write(name, leaf)
            yield name, leaf


def _wide(change: LowRank) -> np.dtype:
    """float32, or what is wider."""
    return np.promote_types(np.promote_types(change.a.dtype, change.b.dtype), FLOAT32)


def _matrix_memory(writer: AdapterWriter | FactorWriter) -> int:
    """Bytes of the matrices of one module, in all their forms."""
    return 6 * max((spec.size for spec in writer.specs.values()), default=0) * FLOAT32.itemsize


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """``array * factor``, rounded once: the factor itself may not be a float32."""
    return (array.astype(np.float64) * factor).astype(array.dtype)
