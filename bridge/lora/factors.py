"""The low-rank change of one weight, in the two forms in which containers store it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bridge.arrays import FLOAT32, all_finite
from bridge.lora.algebra import singular_values, split
from bridge.rules.equation import Equation
from bridge.rules.factoring import FactorAxes, last_two_axes

_MATRIX = last_two_axes(Equation.parse("inputs outputs -> outputs inputs"))


class LowRank(Protocol):
    """The change that a weight's factors stand for."""

    @property
    def a(self) -> np.ndarray: ...

    @property
    def b(self) -> np.ndarray: ...

    @property
    def scale(self) -> float:
        """What the product is multiplied by at run time."""
        ...

    @property
    def axes(self) -> FactorAxes | None:
        """The axes of factors that are stored as the JAX runtime applies them."""
        ...

    def matrices(self, dtype: np.dtype | None = None) -> Matrices:
        """The two matrices whose product it is.

        Args:
            dtype: to compute in, and of the result; the stored dtypes where nothing is computed by default.
        """
        ...

    def factors(self) -> Factors:
        """The same in the axes of a leaf; of matrices, of a leaf that is the matrix."""
        ...


@dataclass(frozen=True)
class Matrices:
    """LoRA factors of one weight as PEFT stores them, and the scale of their product."""

    a: np.ndarray
    """(rank, in)"""
    b: np.ndarray
    """(out, rank)"""
    scale: float

    @property
    def axes(self) -> None:
        return None

    def matrices(self, dtype: np.dtype | None = None) -> Matrices:
        if dtype is None:
            return self
        return Matrices(self.a.astype(dtype, copy=False), self.b.astype(dtype, copy=False), self.scale)

    def factors(self) -> Factors:
        return Factors(_MATRIX, self.a.T, self.b.T, self.scale)

    def rows(self, rows: slice) -> Matrices:
        """The change of a run of the weight's rows."""
        return Matrices(self.a, self.b[rows], self.scale)

    @property
    def spectrum(self) -> tuple[float, ...]:
        """Singular values of the scaled product, largest first; the product is never formed.

        Empty where the factors are not finite.
        """
        if not (all_finite(self.a) and all_finite(self.b)):
            return ()
        return tuple(float(value) for value in singular_values(self.a, self.b) * abs(self.scale))

    def spread(self, equation: Equation, sizes: Mapping[str, int]) -> Spread:
        """These matrices with the weight's axes apart.

        Args:
            equation: of one weight.
            sizes: of its axes.
        """
        output, inputs = equation.right
        return Spread(
            self.a.reshape([-1] + [sizes[axis] for axis in inputs]),
            self.b.reshape([sizes[axis] for axis in output] + [-1]),
            self.scale,
        )


@dataclass(frozen=True)
class Spread:
    """LoRA factors of one weight whose rows and columns are several axes each."""

    a: np.ndarray
    """(rank, …inputs)"""
    b: np.ndarray
    """(…outputs, rank)"""
    scale: float

    @property
    def outputs(self) -> int:
        """How many axes the weight's rows are."""
        return self.b.ndim - 1

    def block(self, at: tuple[int | slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The rows of ``b`` and columns of ``a`` whose product is a box of the change, before its scale.

        Args:
            at: the box along each of the weight's axes, outputs first.

        Returns:
            (…outputs, rank) and (rank, …inputs), without the axes that are at one entry.
        """
        return self.b[at[: self.outputs]], self.a[(slice(None), *at[self.outputs :])]


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one weight in the leaf's axes, and the scale of their product."""

    axes: FactorAxes
    """Of one weight."""
    a: np.ndarray
    b: np.ndarray
    scale: float

    def matrices(self, dtype: np.dtype | None = None) -> Matrices:
        a, b = self.a, self.b
        if dtype is None and self.axes.summed:
            # arithmetic happens in float32 or wider; a mere rearrangement keeps the stored dtype
            a, b = (each.astype(np.promote_types(each.dtype, FLOAT32), copy=False) for each in (a, b))
        elif dtype is not None:
            a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
        return Matrices(*split(self.axes, a, b), self.scale)

    def factors(self) -> Factors:
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Of every axis of either factor."""
        return dict(zip(self.axes.a, self.a.shape, strict=True)) | dict(
            zip(self.axes.b, self.b.shape, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How the LoRA products of one part are scaled."""

    part: str
    rank: int
    alpha: float
    rslora: bool
    origin: str
    """Where alpha comes from, for messages."""

    @property
    def value(self) -> float:
        return scaling(self.rank, self.alpha, rslora=self.rslora)

    def __str__(self) -> str:
        root = "sqrt(rank)" if self.rslora else "rank"
        return f"{self.part}: rank {self.rank}, alpha {self.alpha:g} ({self.origin}), alpha/{root} = {self.value:g}"

    def as_json(self) -> dict[str, object]:
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "rslora": self.rslora,
            "scale": self.value,
            "origin": self.origin,
        }


def scaling(rank: int, alpha: float, *, rslora: bool) -> float:
    """What a runtime multiplies a LoRA product by: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    openpi, models/lora.py, ``LoRAConfig.scaling_value``; PEFT, tuners/lora/layer.py.

    >>> scaling(4, 8, rslora=False), scaling(4, 8, rslora=True)
    (2.0, 4.0)
    """
    return alpha / math.sqrt(rank) if rslora else alpha / rank
