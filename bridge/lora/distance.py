"""The distance between two products of LoRA factors, without forming either. All in float64.

The norm of a product of narrow matrices follows from their Gram matrices,
‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ), or from their QR factors: with B = Q R and Aᵀ = P S, ‖B A‖ = ‖R Sᵀ‖.
A difference of two products is one product of stacked factors.

Accuracy, with u = 2⁻⁵³ and w = Σ ‖column of B‖ ‖row of A‖: Gram matrices are off by a small
multiple of u w² in the square, QR factors by a small multiple of u w in the norm itself. So Gram
matrices are used where ‖B A‖ is at least w / 1000, which gives it to a relative 1e-9, and QR
elsewhere, which resolves 1e-14 of w. If both products have the same rank,
B₁A₁ - B₂A₂ = (B₁ - B₂) A₁ + B₂ (A₁ - A₂): then w is as small as the differences, and the error is
1e-14 of the distance, not of the factors.

In torch, whose threads can be limited: numpy's BLAS starts threads of its own even for matrices
this small, and they wait for each other longer than they work.
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

#: norm over w below which Gram matrices cancel too much
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
    # zero columns would only enlarge the QR factors
    nonzero = (b != 0).any(0) & (a != 0).any(1)
    if not nonzero.any():
        return 0.0
    r_b, r_a = (torch.linalg.qr(matrix, mode="r").R for matrix in (b[:, nonzero], a[nonzero].T))
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
        # rows of a block-diagonal matrix: zero in the columns of the other blocks
        nonzero = (b != 0).any(0)
        b, a = b[:, nonzero], a[nonzero]
    if len(a) != len(other_a):
        return product_norm(torch.hstack([b, -other_b]), torch.vstack([a, other_a]))
    gap_b, gap_a = b - other_b, a - other_a
    if not gap_a.any():
        return product_norm(gap_b, a) if gap_b.any() else 0.0
    return product_norm(torch.hstack([gap_b, other_b]), torch.vstack([a, gap_a]))


def products(
    axes: FactorAxes, lora_a: np.ndarray, lora_b: np.ndarray
) -> Iterator[tuple[tuple[int | slice, ...], torch.Tensor, torch.Tensor]]:
    """The products of one weight's factors: one for each entry of the kept axes (each head of q).

    Args:
        axes: of one weight.
        lora_a: with the axes ``axes.a``.
        lora_b: with the axes ``axes.b``.

    Yields:
        An index into the weight's output axes; B (rows, rank) and A (rank, in) of these rows, float64.
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
    """Relative error of ``lora_B @ lora_A`` against the change of a weight by a leaf's factors.

    Args:
        lora_A: (rank, in), float64.
        lora_B: (out, rank), float64, PEFT's scale multiplied in.
        factors: of the weight, with the runtime's scale.

    Returns:
        Frobenius norm of the difference over that of the factors' product, or the former if the latter is 0.
    """
    axes, sizes = factors.axes, factors.sizes
    spread = lora_B.reshape(*(sizes[axis] for axis in axes.equation.right[0]), -1)
    gap = norm = 0.0
    for rows, b, a in products(axes, factors.a, factors.b):
        ours = spread[rows].reshape(len(b), -1)
        gap = math.hypot(gap, distance(ours, lora_A, factors.scale * b, a))
        norm = math.hypot(norm, product_norm(factors.scale * b, a))
    return gap / norm if norm else gap
