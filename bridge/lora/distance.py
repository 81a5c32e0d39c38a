"""How far two products of LoRA factors are apart, without forming either. All in float64.

The norm of a product of narrow matrices follows from their Gram matrices,
‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ), or from their triangles: with B = Q R and Aᵀ = P S, ‖B A‖ = ‖R Sᵀ‖.
A difference of two products is one product of stacked factors.

What such a norm can resolve, with u = 2⁻⁵³ and w = Σ ‖column of B‖ ‖row of A‖: the Gram matrices
are off by a small multiple of u w² in the square, the triangles by one of u w in the norm itself.
So the former serve where ‖B A‖ is no less than w / 1000 (they then give it to about 1e-9 of
itself), and the latter see all but 1e-14 of w. Where both products have one rank,
B₁A₁ - B₂A₂ = (B₁ - B₂) A₁ + B₂ (A₁ - A₂): then w is as small as the differences are, and what is
left unseen is 1e-14 of the distance, not of the factors.

In torch, whose threads can be limited: numpy's BLAS starts its own for matrices this small, and
they wait for each other longer than they work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.lora.factors import Factors
from bridge.rules.factoring import RANK, FactorAxes

if TYPE_CHECKING:
    import torch

#: how small a norm may be, over w, for Gram matrices to serve
CANCELS = 1e-3


def product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Frobenius norm of ``b @ a``.

    Args:
        b: (out, rank), float64.
        a: (rank, in), float64.
    """
    import torch

    gram_b, gram_a = b.T @ b, a @ a.T
    square = float((gram_b * gram_a).sum())
    w = float((gram_b.diagonal() * gram_a.diagonal()).sqrt().sum())
    if square > (CANCELS * w) ** 2:
        return math.sqrt(square)
    # columns of zeros would only make the triangles larger
    counts = (b != 0).any(0) & (a != 0).any(1)
    if not counts.any():
        return 0.0
    r_b, r_a = (torch.linalg.qr(matrix, mode="r").R for matrix in (b[:, counts], a[counts].T))
    return float(torch.linalg.norm(r_b @ r_a.T))


def distance(b: torch.Tensor, a: torch.Tensor, other_b: torch.Tensor, other_a: torch.Tensor) -> float:
    """Frobenius norm of ``b @ a - other_b @ other_a``; infinite where a factor is not finite.

    Args:
        b, other_b: (out, rank), float64; the ranks may differ.
        a, other_a: (rank, in), float64.
    """
    import torch

    if not all(matrix.isfinite().all() for matrix in (b, a, other_b, other_a)):
        return math.inf
    if len(a) > len(other_a):
        # of a block-diagonal matrix: the other blocks' columns
        counts = (b != 0).any(0)
        b, a = b[:, counts], a[counts]
    if len(a) != len(other_a):
        return product_norm(torch.hstack([b, -other_b]), torch.vstack([a, other_a]))
    gap_b, gap_a = b - other_b, a - other_a
    if not gap_a.any():
        return product_norm(gap_b, a) if gap_b.any() else 0.0
    return product_norm(torch.hstack([gap_b, other_b]), torch.vstack([a, gap_a]))


def entries(
    axes: FactorAxes, lora_a: np.ndarray, lora_b: np.ndarray
) -> Iterator[tuple[tuple[int | slice, ...], torch.Tensor, torch.Tensor]]:
    """The products that the factors of one weight stand for: one for each kept entry (head of q).

    Args:
        axes: of one weight.
        lora_a: with the axes ``axes.a``.
        lora_b: with the axes ``axes.b``.

    Yields:
        Which of the weight's rows, as an index into its output axes; B (rows, rank); A (rank, in).
        float64.
    """
    import torch

    output, inputs = axes.equation.right
    size = dict(zip(axes.a, lora_a.shape, strict=True))
    own = [axis for axis in output if axis not in axes.kept]
    for at in np.ndindex(*(size[axis] for axis in axes.kept)):
        entry: dict[str, int] = dict(zip(axes.kept, at, strict=True))
        pick_a, pick_b = (tuple(entry.get(axis, slice(None)) for axis in side) for side in (axes.a, axes.b))
        left_a, left_b = ([axis for axis in side if axis not in entry] for side in (axes.a, axes.b))
        a = lora_a[pick_a].transpose([left_a.index(axis) for axis in (*inputs, RANK)]).astype(np.float64)
        b = lora_b[pick_b].astype(np.float64).sum(axis=tuple(map(left_b.index, axes.summed)))
        left_b = [axis for axis in left_b if axis not in axes.summed]
        b = b.transpose([left_b.index(axis) for axis in (*own, RANK)])
        rows = tuple(entry.get(axis, slice(None)) for axis in output)
        rank = a.shape[-1]
        yield rows, torch.from_numpy(b.reshape(-1, rank)), torch.from_numpy(a.reshape(-1, rank)).T


def module_error(lora_A: torch.Tensor, lora_B: torch.Tensor, factors: Factors) -> float:
    """Relative error of ``lora_B @ lora_A`` as the change of a weight that a leaf's factors stand for.

    Args:
        lora_A: (rank, in), float64.
        lora_B: (out, rank), float64, with whatever scale PEFT applies multiplied in.
        factors: of the weight, with the runtime's scale.

    Returns:
        Frobenius norm of the difference over that of the factors' product; the former where that is 0.
    """
    axes, sizes = factors.axes, factors.sizes
    spread = lora_B.reshape(*(sizes[axis] for axis in axes.equation.right[0]), -1)
    gap = norm = 0.0
    for rows, b, a in entries(axes, factors.a, factors.b):
        ours = spread[rows].reshape(len(b), -1)
        gap = math.hypot(gap, distance(ours, lora_A, factors.scale * b, a))
        norm = math.hypot(norm, product_norm(factors.scale * b, a))
    return gap / norm if norm else gap
