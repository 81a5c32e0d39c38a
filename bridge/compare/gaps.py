"""Two arrays of one shape compared tile by tile, without a wide copy of either.

A leaf and a tensor have one weight in different orders: walked together, one of them is read
across its rows, which costs a cache line an entry. A tile is small enough to stay in the cache
of a core, is copied out of each side in that side's own order, and compared there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bridge.arrays import FLOAT32, axes_by_stride
from bridge.lora.factors import Matrices, Spread
from bridge.rules.equation import Equation

Tile = tuple[slice, ...]

#: entries along each of two axes; no power of two, or the rows of a tile would share cache lines
EDGE = 240
#: entries of a tile: with what is computed from it, it fits in a megabyte
ENTRIES = EDGE * EDGE

_BITS: dict[int, np.dtype] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def tiles(a: np.ndarray, b: np.ndarray) -> Iterator[Tile]:
    """Slices that cover two arrays of one shape, long in the axis that each keeps together."""
    fast = dict.fromkeys(axes_by_stride(array)[0] for array in (a, b))
    extents = [min(n, EDGE) if axis in fast and len(fast) > 1 else 1 for axis, n in enumerate(a.shape)]
    for axis in (*fast, *axes_by_stride(a)):
        # what short axes leave of a tile goes to the next ones
        room = ENTRIES * extents[axis] // max(math.prod(extents), 1)
        extents[axis] = max(extents[axis], min(a.shape[axis], room), 1)
    starts = (range(0, n, extent) for n, extent in zip(a.shape, extents, strict=True))
    for start in itertools.product(*starts):
        yield tuple(slice(s, s + extent) for s, extent in zip(start, extents, strict=True))


def near(tile: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of a tile in its own order, close together, in a dtype."""
    return tile.astype(dtype, order="K")


@dataclass(frozen=True)
class Change:
    """What factors add to a weight, read by tiles."""

    equation: Equation
    """Of one weight."""
    factors: Spread
    """float32."""

    def __getitem__(self, tile: Tile) -> np.ndarray:
        """A tile in the leaf's axes, float32."""
        axes, (output, inputs) = self.equation.left, self.equation.right
        at = dict(zip(axes, tile, strict=True))
        b, a = self.factors.block(tuple(at[axis] for axis in self.equation.weight_axes))
        rows, columns = b.reshape(-1, len(a)), a.reshape(len(a), -1)
        if axes[-1] == output[-1]:
            # in the order of the leaf, so that nothing is transposed
            product = (columns.T @ rows.T).reshape(*a.shape[1:], *b.shape[:-1])
            named = (*inputs, *output)
        else:
            product = (rows @ columns).reshape(*b.shape[:-1], *a.shape[1:])
            named = (*output, *inputs)
        product *= np.float32(self.factors.scale)
        tile_of: np.ndarray = product.transpose([named.index(axis) for axis in axes])
        return tile_of


@dataclass(frozen=True)
class Values:
    """The weight that a side computes with, read by tiles."""

    w: np.ndarray
    change: Change | None = None
    cast: np.dtype | None = None
    """dtype that ``w`` is rounded to."""

    def __getitem__(self, tile: Tile) -> np.ndarray:
        """A tile in the leaf's axes, float32; a sum is formed in float32, whatever the dtypes."""
        w = self.w[tile] if self.cast is None else near(self.w[tile], self.cast)
        w = near(w, FLOAT32)
        if self.change is not None:
            w += self.change[tile]
        return w


def values(equation: Equation, w: np.ndarray, change: Matrices | None) -> Values:
    """The weight that a side computes with.

    Args:
        equation: of one weight.
        w: in the leaf's axes.
        change: what its factors add, float32.
    """
    if change is None:
        return Values(w)
    sizes = dict(zip(equation.left, w.shape, strict=True))
    return Values(w, Change(equation, change.spread(equation, sizes)))


@dataclass(frozen=True)
class Gap:
    """How far two arrays of one shape are apart, b from a. Not a number where either is not."""

    largest: float
    """Of |b - a|."""
    total: float
    """Sum of |b - a|."""
    squares: float
    """Sum of (b - a)²."""
    reach: float
    """Largest |a|."""
    norm: float
    """Sum of a²."""


def gap(a: Values, b: Values) -> Gap:
    """Measure how far two sides of one weight are apart, in float32 a tile."""
    largest = reach = np.float32(0)
    total = squares = norm = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for tile in tiles(a.w, b.w):
            ours, theirs = a[tile], b[tile]
            norm += _squares(ours)
            reach = np.maximum(reach, _reach(ours))
            difference = np.subtract(theirs, ours, out=ours)
            further = _reach(difference)
            if further == 0:
                continue
            largest = np.maximum(largest, further)
            squares += _squares(difference)
            total += float(np.abs(difference, out=difference).sum())
    return Gap(float(largest), total, squares, float(reach), norm)


def gap_after_cast(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> Gap | None:
    """How far two arrays are apart once both are cast to a dtype; None where they are equal bit for bit."""
    bits = _BITS[dtype.itemsize]
    if all(
        np.array_equal(near(a[at], dtype).view(bits), near(b[at], dtype).view(bits)) for at in tiles(a, b)
    ):
        return None
    return gap(Values(a, cast=dtype), Values(b, cast=dtype))


def _reach(array: np.ndarray) -> np.float32:
    """The largest absolute value, without a copy of it; not a number where any entry is not."""
    if not array.size:
        return np.float32(0)
    reach: np.float32 = np.maximum(array.max(), -array.min())
    return reach


def _squares(array: np.ndarray) -> float:
    """The sum of squares."""
    flat = array.ravel(order="K")
    total = float(np.dot(flat, flat))
    if 1e-30 < total < math.inf:
        return total
    # beyond float32's range: none of the numbers a trained weight has
    return float(np.square(flat, dtype=np.float64).sum())
