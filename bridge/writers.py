"""How one rule's weight is written: tensors of a state_dict, LoRA pairs of an adapter, or leaves.

The counterpart of :mod:`bridge.pieces`. Writers hold no data and can be pickled; a *session* of
one holds what a step has not written yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bridge.axes import Equation, Index
from bridge.formats import Sink
from bridge.lora import blocks_of, compress, join, pad, reduce, split
from bridge.pieces import Factors, Matrices, Piece
from bridge.rule import Rule
from bridge.specs import FLOAT32, Spec

Written = tuple[str, np.ndarray]
"""A name and the values that went under it, in order."""

#: a leaf is gathered in memory up to this size, and written in runs of whole rows beyond
GATHER_BYTES = 32 << 20


class Session(Protocol):
    """One step's writing of weights."""

    def put(self, piece: Piece, w: np.ndarray) -> Iterator[Written]:
        """Take a piece whose values ``w`` are cast already."""
        ...

    def close(self) -> Iterator[Written]:
        """Write what is left."""
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

    def open(self, rule: Rule, sink: Sink) -> Session:
        return _TensorSession(self, rule, sink)


@dataclass(frozen=True)
class _TensorSession:
    writer: TensorWriter
    rule: Rule
    sink: Sink

    def put(self, piece: Piece, w: np.ndarray) -> Iterator[Written]:
        # arranged after the cast: fewer bytes to transpose
        # an adapter may carry some of a leaf's weights only
        weight = np.ascontiguousarray(self.rule.equation.arrange(w))
        for name in self.writer.names.get(piece.index, ()):
            self.sink.write(name, weight, piece.start)
            yield name, weight

    def close(self) -> Iterator[Written]:
        return iter(())


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

    def rows(self, equation: Equation) -> int:
        """How many rows of the leaf are gathered before they are written."""
        total = self.spec.shape[0] if self.spec.shape else 1
        lead = equation.placeholders
        in_order = equation.streams and equation.left[: len(lead)] == lead
        if self.spec.nbytes <= GATHER_BYTES or not in_order:
            return total
        return max(1, GATHER_BYTES // (self.spec.nbytes // total))

    def open(self, rule: Rule, sink: Sink) -> Session:
        return _LeafSession(self, rule.equation, sink, self.rows(rule.equation))


class _LeafSession:
    """Rows of a leaf, gathered in order and written as many as a chunk holds."""

    def __init__(self, writer: LeafWriter, equation: Equation, sink: Sink, rows: int) -> None:
        self._writer, self._equation, self._sink = writer, equation, sink
        shape = writer.spec.shape
        self._buffer = np.empty((rows, *shape[1:]) if shape else (), writer.spec.dtype)
        self._total = shape[0] if shape else 1
        self._first = 0
        self._views = dict(equation.slices(self._buffer)) if equation.placeholders else {}

    def put(self, piece: Piece, w: np.ndarray) -> Iterator[Written]:
        rows = len(self._buffer)
        if not self._equation.placeholders and self._equation.streams:
            done = 0
            while done < len(w):
                yield from self._until(piece.start + done)
                at = piece.start + done - self._first
                count = min(len(w) - done, rows - at)
                self._buffer[at : at + count] = w[done : done + count]
                done += count
            return
        if not piece.index:
            # the one weight of a leaf, which is gathered whole
            next(view for _, view in self._equation.slices(self._buffer))[...] = w
            return
        yield from self._until(piece.index[0])
        self._views[(piece.index[0] - self._first, *piece.index[1:])][...] = w

    def _until(self, row: int) -> Iterator[Written]:
        """Write the rows gathered so far, once a row beyond them comes."""
        while row >= self._first + len(self._buffer) < self._total:
            yield self._flush()

    def _flush(self) -> Written:
        rows = self._buffer[: self._total - self._first]
        self._sink.write(self._writer.name, rows, self._first)
        self._first += len(rows)
        return self._writer.name, rows

    def close(self) -> Iterator[Written]:
        while self._first < self._total:
            yield self._flush()


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

        Exact where the matrices are block diagonal as :func:`bridge.lora.split` makes them, or of
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
