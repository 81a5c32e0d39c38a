"""How the weights of one leaf are written: tensors of a state_dict, or a leaf of a JAX pytree.

The counterpart of :mod:`bridge.stream.readers`. Writers hold no data and can be pickled; each
carries out its own part of a step (:meth:`Writer.write`), and a *session* keeps what it has not
written yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bridge.arrays import FLOAT32, Spec, run_shape
from bridge.formats.contract import RUN_BYTES
from bridge.lora.factors import Matrices
from bridge.rules.equation import Equation, Index
from bridge.rules.rule import Rule
from bridge.stream.assemble import Gather
from bridge.stream.faults import Faults
from bridge.stream.readers import Region
from bridge.stream.tiles import TILE, NonFinite, Product, Workspace, place
from bridge.stream.work import Load, Work, Written

#: what the tiles of a worker take
TILES = 4 * TILE * FLOAT32.itemsize


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
    checked: bool = True
    """Whether values that are not finite are a fault: not where no runtime uses them."""

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
        self._placing = Placing(equation, work.sizes, work.faults if writer.checked else None)
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
        faults: records values that are not finite; None takes any.
    """

    def __init__(self, equation: Equation, sizes: Mapping[str, int], faults: Faults | None) -> None:
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
        if self._faults is None:
            return
        if faulty.source:
            self._faults.not_finite(index)
        if faulty.result:
            self._faults.overflows(index)


def _steps(group: tuple[str, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """How far one step along each axis moves along a group of them that is one axis of the matrix."""
    lengths = [sizes[axis] for axis in group]
    step = {axis: math.prod(lengths[i + 1 :]) for i, axis in enumerate(group)}
    return tuple(step.get(axis, 0) for axis in axes)
