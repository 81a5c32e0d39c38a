"""How one rule's weight is written: tensors of a state_dict, LoRA pairs of an adapter, or leaves.

The counterpart of :mod:`bridge.stream.readers`. Writers hold no data and can be pickled; a *session* of
one holds what a step has not written yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bridge.arrays import FLOAT32, Spec, run_shape
from bridge.formats.contract import RUN_BYTES, Sink
from bridge.lora.algebra import blocks_of, compress, join, pad, reduce, split
from bridge.rules.equation import Equation, Index
from bridge.rules.rule import Rule
from bridge.stream.assemble import Gather
from bridge.stream.readers import Factors, Matrices, Region
from bridge.stream.tiles import Product, Seen, Workspace, place

Written = tuple[str, np.ndarray]
"""A name and the values that went under it, in order; valid until the next."""


class Faults(Protocol):
    """Takes note of weights with faulty values."""

    def not_finite(self, index: Index) -> None:
        """Values that are not finite were read."""
        ...

    def overflows(self, index: Index) -> None:
        """Finite values became too large for their dtype."""
        ...


class Session(Protocol):
    """One step's writing of weights."""

    def put(self, region: Region, change: Matrices | None) -> Iterator[Written]:
        """Take a box of a weight, and the low-rank change that is summed into it."""
        ...

    def close(self) -> None:
        """Make sure that nothing is left half filled. Raises ValueError."""
        ...


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

    def held(self, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes that a step holds while it writes."""
        cell = _tensor_cell(rule.equation.one, sizes, self.spec.dtype)
        return Spec(cell, self.spec.dtype).nbytes * (1 if rule.equation.in_order else max(len(self.names), 1))

    def open(self, rule: Rule, sizes: Mapping[str, int], sink: Sink, faults: Faults) -> Session:
        return _TensorSession(self, rule, sizes, sink, faults)


def _tensor_cell(one: Equation, sizes: Mapping[str, int], dtype: np.dtype) -> tuple[int, ...]:
    """How much of a tensor is gathered, in the axes of its right side, before it is written."""
    shape = tuple(sizes[axis] for axis in one.weight_axes)
    # where the order of axes changes, every row of the source reaches into every row of the tensor
    return run_shape(Spec(shape, dtype), RUN_BYTES) if one.weight_axes == one.left else shape


class _TensorSession:
    def __init__(
        self, writer: TensorWriter, rule: Rule, sizes: Mapping[str, int], sink: Sink, faults: Faults
    ) -> None:
        self._writer, self._sink = writer, sink
        self._placing = Placing(rule.equation.one, sizes, faults)
        self._cell = _tensor_cell(rule.equation.one, sizes, writer.dtype)
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
        # weights come one after the other: a leaf that holds them in another order is gathered whole
        return run_shape(self.spec, RUN_BYTES) if equation.in_order else self.spec.shape

    def held(self, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes that a step holds while it writes: the chunks that one weight fills together."""
        cell = Spec(self.cell(rule.equation), self.spec.dtype).nbytes
        one = rule.equation.one
        if one.weight_axes == one.left:
            return cell  # what comes in its order is written as it comes
        return min(
            max(cell, Spec(tuple(sizes[a] for a in one.left), self.spec.dtype).nbytes), self.spec.nbytes
        )

    def open(self, rule: Rule, sizes: Mapping[str, int], sink: Sink, faults: Faults) -> Session:
        return _LeafSession(self, rule, sizes, sink, faults)


class _LeafSession:
    """A leaf, filled weight by weight and written chunk by chunk."""

    def __init__(
        self, writer: LeafWriter, rule: Rule, sizes: Mapping[str, int], sink: Sink, faults: Faults
    ) -> None:
        self._writer, self._equation, self._sink = writer, rule.equation, sink
        self._placing = Placing(rule.equation.one, sizes, faults)
        self._gather = Gather(writer.spec.shape, writer.cell(rule.equation), writer.dtype, [])

    def put(self, region: Region, change: Matrices | None) -> Iterator[Written]:
        equation, placing = self._equation, self._placing
        numbers = dict(zip(equation.placeholders, region.index, strict=True))
        starts = dict(zip(equation.one.left, region.at, strict=True)) | numbers
        lengths = dict(zip(equation.one.left, region.w.shape, strict=True))
        at = tuple(starts.get(axis, 0) for axis in equation.left)
        shape = tuple(lengths.get(axis, 1) for axis in equation.left)
        # the box's own axes in the leaf, brought into the order of the tensor's
        own = [equation.left.index(axis) for axis in equation.one.left]
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
        one: equation of one weight.
        sizes: of every axis.
        faults: takes note of values that are not finite.
    """

    def __init__(self, one: Equation, sizes: Mapping[str, int], faults: Faults) -> None:
        self.order = [one.left.index(axis) for axis in one.weight_axes]
        """Positions, among the leaf's axes, of the tensor's."""
        self.shape = tuple(sizes[axis] for axis in one.weight_axes)
        self._steps = [_steps(group, one.weight_axes, sizes) for group in one.right]
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
            output, inputs = self._steps
            product = Product(change.a, change.b, change.scale, output, inputs, at, self.shape)
        seen = Seen()
        place(into, w, product, self._work, seen)
        if seen.source:
            self._faults.not_finite(index)
        if seen.result:
            self._faults.overflows(index)


def _steps(group: tuple[str, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """How far one step along each axis moves along a group of them that is one axis of the matrix."""
    lengths = [sizes[axis] for axis in group]
    step = {axis: math.prod(lengths[i + 1 :]) for i, axis in enumerate(group)}
    return tuple(step.get(axis, 0) for axis in axes)


@dataclass(frozen=True)
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

    def matrices(self, rule: Rule, index: Index, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
        """``lora_A`` and ``lora_B`` as written, before the cast."""
        pair = self.pairs[index]
        fold = factors.scale / pair.runtime
        a, b = factors.a, factors.b
        if rule.factor_axes.summed or fold != 1 or self.compress_to is not None:
            # arithmetic happens in float32 or wider; a pure rearrangement keeps the stored dtype
            a, b = (each.astype(np.promote_types(each.dtype, FLOAT32)) for each in (a, b))
        matrix_a, matrix_b = split(rule.equation.one, a, b)
        if fold != 1:
            matrix_b = _scaled(matrix_b, fold)
        if self.compress_to is not None and len(matrix_a) > self.compress_to:
            matrix_a, matrix_b, _ = compress(matrix_a, matrix_b, self.compress_to)
        return matrix_a, matrix_b

    def write(self, sink: Sink, index: Index, matrices: tuple[np.ndarray, np.ndarray]) -> Iterator[Written]:
        """Write the matrices of one module, cast already."""
        pair = self.pairs[index]
        for name, matrix in zip((pair.a, pair.b), matrices, strict=True):
            sink.write(name, np.ascontiguousarray(matrix))
            yield name, matrix


@dataclass(frozen=True)
class FactorWriter:
    """LoRA factors as the two leaves that openpi keeps beside a weight's."""

    a: str
    b: str
    spec_a: Spec
    """(…, inner, rank)"""
    spec_b: Spec
    sizes: Mapping[str, int]
    runtime: float
    """The scale openpi's runtime applies: what an adapter's scale is more is folded into b."""
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
        return self.spec_a.shape[-1]

    def fitted(self, equation: Equation, matrices: Matrices) -> tuple[np.ndarray, np.ndarray, float]:
        """Factors of openpi's rank for one weight, and their relative error.

        Exact where the matrices are block diagonal as :func:`bridge.lora.algebra.split` makes them, or of
        no larger rank; else the best approximation.
        """
        wide = [np.promote_types(matrix.dtype, FLOAT32) for matrix in (matrices.a, matrices.b)]
        matrix_a, matrix_b = (m.astype(d) for m, d in zip((matrices.a, matrices.b), wide, strict=True))
        blocks = blocks_of(equation, matrix_a, matrix_b, self.sizes)
        error = 0.0
        if blocks is not None and blocks[2] == 0 and blocks[0].shape[-1] <= self.rank:
            a, b = blocks[0], blocks[1]
        else:
            a, b = join(equation, matrix_a, matrix_b, self.sizes)
            if len(matrix_a) > self.rank:
                a, b, error = reduce(equation, a, b, self.rank)
        fold = matrices.scale / self.runtime
        if fold != 1:
            b = _scaled(b, fold)
        return pad(a, self.rank, axis=-1), pad(b, self.rank, axis=-2), error

    def misfit(self, equation: Equation, matrices: Matrices) -> str | None:
        """Why one weight's matrices cannot be had at openpi's rank without loss, or None."""
        found = matrices.a.shape[0]
        if found <= self.rank:
            return None
        blocks = blocks_of(equation, matrices.a, matrices.b, self.sizes)
        count = math.prod(self.sizes[axis] for axis in equation.right[0] if axis in equation.left[:-2])
        if blocks is None or count == 1:
            return f"has rank {found}, and openpi's is {self.rank}"
        if blocks[0].shape[-1] > self.rank:
            return f"has {count} blocks of rank {blocks[0].shape[-1]}, and openpi's rank is {self.rank}"
        if blocks[2]:
            return (
                f"has rank {found}, and training filled it off the {count} diagonal blocks "
                f"(up to {blocks[2]:.1e} of the largest entry)"
            )
        return None


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """``array * factor``, rounded once: the factor itself may not be a float32."""
    return (array.astype(np.float64) * factor).astype(array.dtype)


Writer = TensorWriter | LeafWriter | AdapterWriter | FactorWriter
