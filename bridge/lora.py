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
from dataclasses import dataclass

import numpy as np

from bridge.axes import UNIT, Equation


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


def scaling(rank: int, alpha: float, *, rslora: bool) -> float:
    """openpi's ``LoRAConfig.scaling_value``: alpha / rank, or alpha / sqrt(rank) with rslora."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank
