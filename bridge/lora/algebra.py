"""LoRA algebra on leaves, derived from the axes of their factors.

Which axes each factor has (:class:`bridge.rules.factoring.FactorAxes`) and the equation's right
side decide what an axis means:

- an output axis of both factors is *kept*: each entry (each head of openpi's ``q_einsum``) has a
  product of its own, so that the matrix PEFT calls ``lora_B`` is block diagonal;
- an input axis of both is *summed*: each of the runtime's two einsums contracts it alone. With
  openpi's ``attn_vec_einsum``, "BTNH,NHD->BTD" becomes "BTNH,NHL->BTL" and then "BTL,NLD->BTD".
  Multiplying the factors head by head is not what the runtime computes;
- an axis of one factor alone is that factor's.

Shapes below are of the factors of one weight: placeholders are taken out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bridge.rules.factoring import RANK, FactorAxes


def split(axes: FactorAxes, lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two matrices of one weight whose product is the weight's change, before any scale.

    An axis kept by both factors (the heads of q) gives each entry a block of the rank::

        lora_A = [ a_0 ]      lora_B = [ b_0  0  ]
                 [ a_1 ]               [  0  b_1 ]

    Args:
        axes: of one weight.
        lora_a: with the axes ``axes.a``.
        lora_b: with the axes ``axes.b``, same dtype.

    Returns:
        ``lora_A`` (kept·rank, in) and ``lora_B`` (out, kept·rank), as PEFT names them.

    >>> from bridge.rules.equation import Equation
    >>> from bridge.rules.factoring import last_two_axes
    >>> q = last_two_axes(Equation.parse("head width dim -> (head dim) width"))
    >>> a, b = split(q, np.ones((3, 5, 2)), np.ones((3, 2, 7)))  # 3 heads, width 5, head_dim 7, rank 2
    >>> a.shape, b.shape, bool(b[:7, :2].all()), bool(b[:7, 2:].any())
    ((6, 5), (21, 6), True, False)
    """
    output, inputs = axes.equation.right
    kept = axes.kept
    rank = lora_a.shape[axes.a.index(RANK)]
    blocks = lora_a.transpose([axes.a.index(axis) for axis in (*kept, RANK, *inputs)])
    count = math.prod(blocks.shape[: len(kept)])

    left = [axis for axis in axes.b if axis not in axes.summed]
    summed = lora_b.sum(axis=tuple(map(axes.b.index, axes.summed))) if axes.summed else lora_b
    own = [axis for axis in output if axis not in kept]
    ordered = summed.transpose([left.index(axis) for axis in (*kept, *own, RANK)])
    size = dict(zip((*kept, *own), ordered.shape, strict=False))
    full = np.zeros([size[axis] for axis in (*output, *kept)] + [rank], lora_b.dtype)
    for at in np.ndindex(*(size[axis] for axis in kept)):
        entry = dict(zip(kept, at, strict=True))
        rows = tuple(entry.get(axis, slice(None)) for axis in output)
        full[(*rows, *at)] = ordered[at]
    return (
        np.ascontiguousarray(blocks).reshape(count * rank, -1),
        full.reshape(-1, count * rank),
    )


def join(
    axes: FactorAxes, lora_A: np.ndarray, lora_B: np.ndarray, sizes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Factors in the leaf's axes with the same function as two matrices of any rank.

    Every entry of a kept axis gets all of ``lora_A`` and its own rows of ``lora_B``; of a summed
    axis, the first entry gets all of ``lora_B`` and the others zeros.

    Args:
        axes: of one weight.
        lora_A: (rank, in).
        lora_B: (out, rank).
        sizes: of every axis of the leaf.

    Returns:
        Factors with the axes ``axes.a`` and ``axes.b``; the first may be a read-only view.

    >>> from bridge.rules.equation import Equation
    >>> from bridge.rules.factoring import by_role
    >>> q = by_role(Equation.parse("head width dim -> (head dim) width"))
    >>> a, b = join(q, np.ones((2, 5)), np.ones((21, 2)), {"head": 3, "width": 5, "dim": 7})
    >>> a.shape, b.shape  # one factor for all heads, and a row of the other for each
    ((5, 2), (2, 3, 7))
    """
    output, inputs = axes.equation.right
    rank = lora_A.shape[0]
    known = {**sizes, RANK: rank}

    spread_a = lora_A.reshape(rank, *(sizes[axis] for axis in inputs))
    named = (RANK, *inputs)
    own_a = [axis for axis in axes.a if axis not in axes.kept]
    spread_a = spread_a.transpose([named.index(axis) for axis in own_a])
    spread_a = spread_a.reshape([1 if axis in axes.kept else known[axis] for axis in axes.a])
    a = np.broadcast_to(spread_a, [known[axis] for axis in axes.a])

    spread_b = lora_B.reshape(*(sizes[axis] for axis in output), rank)
    named = (*output, RANK)
    spread_b = spread_b.transpose([named.index(axis) for axis in axes.b if axis not in axes.summed])
    b = np.zeros([known[axis] for axis in axes.b], lora_B.dtype)
    b[tuple(0 if axis in axes.summed else slice(None) for axis in axes.b)] = spread_b
    return a, b


def stack(matrices: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Matrices of several weights with a first factor in common: where a runtime has one for them all.

    The weights' own where they are equal; else side by side, each second factor in the place of its own::

        k: B_k A_k      A = [ A_k ]      B_k' = [ B_k  0  ]
        v: B_v A_v          [ A_v ]      B_v' = [  0  B_v ]

    Args:
        matrices: ``lora_A`` (rank, in) and ``lora_B`` (out, rank) of each weight.

    Returns:
        The common ``lora_A`` (Σ rank, in), and for each weight its ``lora_B`` (out, Σ rank).
    """
    first = matrices[0][0]
    if all(a.shape == first.shape and np.array_equal(a, first) for a, _ in matrices):
        return first, [b for _, b in matrices]
    ranks = [len(a) for a, _ in matrices]
    placed = []
    for number, (_, b) in enumerate(matrices):
        wide = np.zeros((len(b), sum(ranks)), b.dtype)
        begin = sum(ranks[:number])
        wide[:, begin : begin + ranks[number]] = b
        placed.append(wide)
    return np.concatenate([a for a, _ in matrices]), placed


def blocks_of(
    axes: FactorAxes, lora_A: np.ndarray, lora_B: np.ndarray, sizes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Undo :func:`split`: factors of rank R / kept, if ``lora_B`` is block diagonal.

    Args:
        axes: of one weight.
        lora_A: (R, in).
        lora_B: (out, R).
        sizes: of every axis of the leaf.

    Returns:
        Factors with the axes ``axes.a`` and ``axes.b``, and the largest number off the diagonal over
        the largest on it: 0 when the matrices are exactly what `split` makes. None when the rank is
        no multiple of the number of blocks.
    """
    output, inputs = axes.equation.right
    kept = axes.kept
    entries = [sizes[axis] for axis in kept]
    count = math.prod(entries)
    if lora_A.shape[0] % count:
        return None
    rank = lora_A.shape[0] // count
    known = {**sizes, RANK: rank}

    spread_a = lora_A.reshape(*entries, rank, *(sizes[axis] for axis in inputs))
    named = (*kept, RANK, *inputs)
    a = spread_a.transpose([named.index(axis) for axis in axes.a])

    full = lora_B.reshape(*(sizes[axis] for axis in output), *entries, rank)
    own = [axis for axis in output if axis not in kept]
    b = np.zeros([known[axis] for axis in axes.b], lora_B.dtype)
    order = [axis for axis in axes.b if axis not in axes.summed and axis not in kept]
    rest = np.abs(full)
    largest = float(rest.max(initial=0))
    for at in np.ndindex(*entries):
        entry = dict(zip(kept, at, strict=True))
        rows = tuple(entry.get(axis, slice(None)) for axis in output)
        block = full[(*rows, *at)].transpose([(*own, RANK).index(axis) for axis in order])
        b[tuple(entry.get(axis, 0 if axis in axes.summed else slice(None)) for axis in axes.b)] = block
        rest[(*rows, *at)] = 0
    return a, b, float(rest.max(initial=0)) / largest if largest else 0.0


def reduce(
    axes: FactorAxes, lora_a: np.ndarray, lora_b: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best factors of a smaller rank in the leaf's own form, and their relative error.

    Where axes are kept, each entry (each head of q) has a product of its own and is reduced on its
    own; elsewhere the weight is one product.

    Args:
        axes: of one weight.
        lora_a: with the axes ``axes.a``.
        lora_b: with the axes ``axes.b``.
        rank: of the result.
    """
    sizes = dict(zip(axes.a, lora_a.shape, strict=True)) | dict(zip(axes.b, lora_b.shape, strict=True))
    known = {**sizes, RANK: rank}
    a = np.zeros([known[axis] for axis in axes.a], lora_a.dtype)
    b = np.zeros([known[axis] for axis in axes.b], lora_b.dtype)
    entry_axes = axes.without(axes.kept)
    lost = total = 0.0
    for at in np.ndindex(*(sizes[axis] for axis in axes.kept)):
        entry = dict(zip(axes.kept, at, strict=True))
        pick_a, pick_b = (tuple(entry.get(axis, slice(None)) for axis in side) for side in (axes.a, axes.b))
        matrix_a, matrix_b = split(entry_axes, lora_a[pick_a], lora_b[pick_b])
        small_a, small_b, error = compress(matrix_a, matrix_b, rank)
        small_a, small_b = pad(small_a, rank, axis=0), pad(small_b, rank, axis=1)
        a[pick_a], b[pick_b] = join(entry_axes, small_a, small_b, sizes)
        weight = float(np.linalg.norm(_triangles(matrix_a, matrix_b)))
        lost, total = lost + (error * weight) ** 2, total + weight**2
    return a, b, math.sqrt(lost / total) if total else 0.0


def singular_values(lora_A: np.ndarray, lora_B: np.ndarray) -> np.ndarray:
    """Of ``lora_B @ lora_A``, largest first, float64; the product is never formed.

    >>> singular_values(np.eye(2, 5), 3 * np.eye(7, 2)).round(6).tolist()
    [3.0, 3.0]
    """
    values: np.ndarray = np.linalg.svd(_triangles(lora_A, lora_B), compute_uv=False)
    return values


def effective_rank(values: Sequence[float]) -> float | None:
    """exp of the entropy of the squared singular values: how many directions a product uses.

    None where there is none, or the values are not finite.

    >>> effective_rank([2.0, 2.0, 0.0])
    2.0
    """
    known = np.asarray(values, np.float64)
    largest = known.max(initial=0.0)
    if not 0 < largest < math.inf:
        return None
    # over the largest, as squares may leave what a float can represent
    power = np.square(known / largest)
    share = power[power > 0] / power.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def dead(axes: FactorAxes, lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """Which components are zero in both factors, so that no gradient ever reaches either.

    Args:
        axes: of a leaf, or of one weight.
        lora_a: with the axes ``axes.a``.
        lora_b: with the axes ``axes.b``.

    Returns:
        Booleans that broadcast over ``lora_a``.

    >>> from bridge.rules.equation import Equation
    >>> from bridge.rules.factoring import last_two_axes
    >>> axes = last_two_axes(Equation.parse("width dim -> dim width"))
    >>> a, b = np.ones((5, 3)), np.ones((3, 7))
    >>> a[:, :2] = b[1] = 0
    >>> dead(axes, a, b)
    array([[False,  True, False]])
    """
    shared = axes.components

    def filled(factor: np.ndarray, named: tuple[str, ...]) -> np.ndarray:
        others = tuple(n for n, axis in enumerate(named) if axis not in shared)
        left = [axis for axis in named if axis in shared]
        kept: np.ndarray = (factor != 0).any(axis=others).transpose([left.index(axis) for axis in shared])
        return kept

    neither = ~(filled(lora_a, axes.a) | filled(lora_b, axes.b))
    sizes = dict(zip(shared, neither.shape, strict=True))
    mask: np.ndarray = neither.reshape([sizes.get(axis, 1) for axis in axes.a])
    return mask


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

    Args:
        lora_A: (rank, in).
        lora_B: (out, rank).
        rank: of the result.
    """
    q_b, r_b = np.linalg.qr(lora_B.astype(np.float64))
    q_a, r_a = np.linalg.qr(lora_A.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    total = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / total if total else 0.0
    root = np.sqrt(s[:rank])
    small_a, small_b = (root[:, None] * vt[:rank]) @ q_a.T, q_b @ (u[:, :rank] * root)
    return small_a.astype(lora_A.dtype), small_b.astype(lora_B.dtype), error
