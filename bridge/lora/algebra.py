"""LoRA algebra on leaves, derived from a rule's axis equation.

openpi factors the last two axes of a leaf, *inner* and *outer*: ``lora_a`` has the leaf's axes
with outer replaced by rank, ``lora_b`` with inner replaced by rank (openpi, models/lora.py). All
other axes are shared by both factors, and the equation's right side decides what they mean:

- a placeholder tells modules apart;
- an axis of the output group is kept: each head of ``q_einsum`` has factors of its own;
- an axis of the input group is *contracted by each of the two einsums alone*, so ``lora_b`` is
  summed over it: with ``attn_vec_einsum``, "BTNH,NHD->BTD" becomes "BTNH,NHL->BTL" and then
  "BTL,NLD->BTD". Multiplying the factors head by head is not what openpi computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bridge.rules.equation import UNIT, Equation

_RANK = "(rank)"  # no axis of a leaf can have this name


@dataclass(frozen=True)
class FactorAxes:
    """The role of every axis of a leaf that carries LoRA. Made by :func:`factor_axes`."""

    inner: str
    outer: str
    shared: tuple[str, ...]
    summed: tuple[int, ...]
    """Positions, among the leaf's axes, of those over which ``lora_b`` is summed."""


def factor_axes(equation: Equation) -> FactorAxes:
    """Derive the roles of a leaf's axes from its equation.

    Raises:
        ValueError: the weight is not a matrix, or inner is not an input axis, or outer not an
            output axis; such a leaf cannot carry LoRA.
    """
    if len(equation.left) < 2 or UNIT in equation.left or len(equation.right) != 2:
        raise ValueError(f"{equation}: LoRA needs a leaf whose weights are matrices")
    *shared, inner, outer = equation.left
    output, inputs = equation.right
    if inner not in inputs or outer not in output:
        raise ValueError(f"{equation}: LoRA factors {inner} x {outer}, which are not input x output")
    summed = tuple(position for position, axis in enumerate(shared) if axis in inputs)
    return FactorAxes(inner, outer, tuple(shared), summed)


def factor_shapes(leaf_shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``lora_a`` (…, inner, rank) and ``lora_b`` (…, rank, outer) of a leaf."""
    *shared, inner, outer = leaf_shape
    return (*shared, inner, rank), (*shared, rank, outer)


def delta(axes: FactorAxes, lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """The change of the leaf that the factors stand for, before any scale.

    Args:
        axes: roles from :func:`factor_axes`.
        lora_a: (…shared, inner, rank), float32 or wider.
        lora_b: (…shared, rank, outer), same dtype.

    Returns:
        (…shared, inner, outer), same dtype.
    """
    if axes.summed:
        lora_b = lora_b.sum(axis=axes.summed, keepdims=True)
    product: np.ndarray = np.matmul(lora_a, lora_b)
    return product


def split(equation: Equation, lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two matrices of one weight whose product is the weight's change, before any scale.

    An axis kept by both factors (the heads of q) gives each entry a block of the rank::

        lora_A = [ a_0 ]      lora_B = [ b_0  0  ]
                 [ a_1 ]               [  0  b_1 ]

    Args:
        equation: of one weight (:attr:`Equation.one`).
        lora_a: (…shared, inner, rank).
        lora_b: (…shared, rank, outer), same dtype.

    Returns:
        ``lora_A`` (kept·rank, in) and ``lora_B`` (out, kept·rank), as PEFT names them.
    """
    axes = factor_axes(equation)
    output, inputs = equation.right
    kept = tuple(axis for axis in axes.shared if axis in output)
    rank = lora_a.shape[-1]
    axes_a = (*axes.shared, axes.inner, _RANK)
    order = [axes_a.index(axis) for axis in (*kept, _RANK, *inputs)]
    blocks = lora_a.transpose(order)
    count = math.prod(blocks.shape[: len(kept)])

    summed = lora_b.sum(axis=axes.summed) if axes.summed else lora_b
    size = dict(zip((*kept, _RANK, axes.outer), summed.shape, strict=True))
    full = np.zeros([size[axis] for axis in (*output, *kept)] + [rank], lora_b.dtype)
    for at in np.ndindex(*(size[axis] for axis in kept)):
        entry = dict(zip(kept, at, strict=True))
        rows = tuple(entry.get(axis, slice(None)) for axis in output)
        full[(*rows, *at)] = summed[at].T
    return (
        np.ascontiguousarray(blocks).reshape(count * rank, -1),
        full.reshape(-1, count * rank),
    )


def join(
    equation: Equation, lora_A: np.ndarray, lora_B: np.ndarray, sizes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Factors in the leaf's axes with the same function as two matrices of any rank.

    Every entry of a kept axis gets all of ``lora_A`` and its own rows of ``lora_B``; of a summed
    axis, the first entry gets all of ``lora_B`` and the others zeros.

    Args:
        equation: of one weight.
        lora_A: (rank, in).
        lora_B: (out, rank).
        sizes: of every axis of the leaf.

    Returns:
        (…shared, inner, rank) and (…shared, rank, outer); the first may be a read-only view.
    """
    axes = factor_axes(equation)
    output, inputs = equation.right
    rank = lora_A.shape[0]
    kept = tuple(axis for axis in axes.shared if axis in output)

    spread_a = lora_A.reshape(rank, *(sizes[axis] for axis in inputs))
    named = (_RANK, *inputs)
    own = tuple(axis for axis in axes.shared if axis not in kept)
    spread_a = spread_a.transpose([named.index(axis) for axis in (*own, axes.inner, _RANK)])
    spread_a = spread_a.reshape([1 if axis in kept else sizes[axis] for axis in axes.shared] + [-1, rank])
    a = np.broadcast_to(spread_a, [*(sizes[axis] for axis in axes.shared), *spread_a.shape[-2:]])

    spread_b = lora_B.reshape(*(sizes[axis] for axis in output), rank)
    named = (*output, _RANK)
    spread_b = spread_b.transpose([named.index(axis) for axis in (*kept, _RANK, axes.outer)])
    b = np.zeros([*(sizes[axis] for axis in axes.shared), rank, sizes[axes.outer]], lora_B.dtype)
    b[tuple(slice(None) if axis in kept else 0 for axis in axes.shared)] = spread_b
    return a, b


def blocks_of(
    equation: Equation, lora_A: np.ndarray, lora_B: np.ndarray, sizes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Undo :func:`split`: factors of rank R / kept, if ``lora_B`` is block diagonal.

    Returns:
        (…shared, inner, rank), (…shared, rank, outer), and the largest number off the diagonal
        over the largest on it: 0 when the two are exactly what `split` makes. None when the rank
        is no multiple of the number of blocks.
    """
    axes = factor_axes(equation)
    output, inputs = equation.right
    kept = tuple(axis for axis in axes.shared if axis in output)
    count = math.prod(sizes[axis] for axis in kept)
    if lora_A.shape[0] % count:
        return None
    rank = lora_A.shape[0] // count
    entries = [sizes[axis] for axis in kept]

    spread_a = lora_A.reshape(*entries, rank, *(sizes[axis] for axis in inputs))
    named = (*kept, _RANK, *inputs)
    a = spread_a.transpose([named.index(axis) for axis in (*axes.shared, axes.inner, _RANK)])

    full = lora_B.reshape(*(sizes[axis] for axis in output), *entries, rank)
    b = np.zeros([*(sizes[axis] for axis in axes.shared), rank, sizes[axes.outer]], lora_B.dtype)
    rest = np.abs(full)
    largest = float(rest.max(initial=0))
    for at in np.ndindex(*entries):
        entry = dict(zip(kept, at, strict=True))
        rows = tuple(entry.get(axis, slice(None)) for axis in output)
        b[tuple(entry.get(axis, 0) for axis in axes.shared)] = full[(*rows, *at)].T
        rest[(*rows, *at)] = 0
    return a, b, float(rest.max(initial=0)) / largest if largest else 0.0


def reduce(
    equation: Equation, lora_a: np.ndarray, lora_b: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best factors of a smaller rank in the leaf's own form, and their relative error.

    Where an axis is kept, each entry (each head of q) has a product of its own and is reduced on
    its own; where one is summed, the weight is one product.
    """
    axes = factor_axes(equation)
    if axes.summed:
        matrix_a, matrix_b = split(equation, lora_a, lora_b)
        small_a, small_b, error = compress(matrix_a, matrix_b, rank)
        sizes = dict(zip((*axes.shared, axes.inner), lora_a.shape[:-1], strict=True))
        sizes[axes.outer] = lora_b.shape[-1]
        return *join(equation, small_a, small_b, sizes), error
    a = np.empty((*lora_a.shape[:-1], rank), lora_a.dtype)
    b = np.empty((*lora_b.shape[:-2], rank, lora_b.shape[-1]), lora_b.dtype)
    lost = total = 0.0
    for at in np.ndindex(*lora_a.shape[:-2]):
        small_a, small_b, error = compress(lora_a[at].T, lora_b[at].T, rank)
        a[at], b[at] = pad(small_a.T, rank, axis=1), pad(small_b.T, rank, axis=0)
        weight = float(np.linalg.norm(_triangles(lora_a[at].T, lora_b[at].T)))
        lost, total = lost + (error * weight) ** 2, total + weight**2
    return a, b, math.sqrt(lost / total) if total else 0.0


def singular_values(lora_A: np.ndarray, lora_B: np.ndarray) -> np.ndarray:
    """Of ``lora_B @ lora_A``, largest first, float64; the product is never formed."""
    values: np.ndarray = np.linalg.svd(_triangles(lora_A, lora_B), compute_uv=False)
    return values


def pad(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """``array`` with zeros added at the end of an axis, up to ``rank``."""
    if array.shape[axis] == rank:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    return np.pad(array, widths)


def _triangles(lora_A: np.ndarray, lora_B: np.ndarray) -> np.ndarray:
    """A small matrix with the singular values of ``lora_B @ lora_A``."""
    r_b: np.ndarray = np.linalg.qr(lora_B.astype(np.float64), mode="r")  # type: ignore[assignment]
    r_a: np.ndarray = np.linalg.qr(lora_A.T.astype(np.float64), mode="r")  # type: ignore[assignment]
    product: np.ndarray = r_b @ r_a.T
    return product


def compress(lora_A: np.ndarray, lora_B: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best approximation of ``lora_B @ lora_A`` of a smaller rank, and its relative error.

    Never forms the product: both factors are reduced to triangles, whose small product has the
    same singular values. The error is the Frobenius norm of what is left out over that of all.
    """
    q_b, r_b = np.linalg.qr(lora_B.astype(np.float64))
    q_a, r_a = np.linalg.qr(lora_A.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    total = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / total if total else 0.0
    root = np.sqrt(s[:rank])
    small_a, small_b = (root[:, None] * vt[:rank]) @ q_a.T, q_b @ (u[:, :rank] * root)
    return small_a.astype(lora_A.dtype), small_b.astype(lora_B.dtype), error


def scaling(rank: int, alpha: float, *, rslora: bool) -> float:
    """openpi's ``LoRAConfig.scaling_value``: alpha / rank, or alpha / sqrt(rank) with rslora."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank
