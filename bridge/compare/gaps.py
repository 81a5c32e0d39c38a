"""Two arrays of one shape held against each other, tile by tile, without a wide copy of either.

A leaf and a tensor hold one weight in different orders: walked together, one of them is read
across its rows, which costs a cache line an entry. A tile is small enough to stay in the cache
of a core, is copied out of each side in that side's own order, and compared there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bridge.arrays import FLOAT32
from bridge.rules.equation import Equation
from bridge.stream.readers import Matrices

Tile = tuple[slice, ...]

#: entries along each of two axes; no power of two, or the rows of a tile would share cache lines
EDGE = 240
#: entries of a tile: with what is computed from it, it fits in a megabyte
ENTRIES = EDGE * EDGE

_BITS: dict[int, np.dtype] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def tiles(a: np.ndarray, b: np.ndarray) -> Iterator[Tile]:
    """Slices that cover two arrays of one shape, long in the axis that each keeps together."""
    fast = dict.fromkeys(_order(array)[0] for array in (a, b))
    extents = [min(n, EDGE) if axis in fast and len(fast) > 1 else 1 for axis, n in enumerate(a.shape)]
    for axis in (*fast, *_order(a)):
        # what short axes leave of a tile goes to the next ones
        room = ENTRIES * extents[axis] // max(math.prod(extents), 1)
        extents[axis] = max(extents[axis], min(a.shape[axis], room), 1)
    starts = (range(0, n, extent) for n, extent in zip(a.shape, extents, strict=True))
    for start in itertools.product(*starts):
        yield tuple(slice(s, s + extent) for s, extent in zip(start, extents, strict=True))


def _order(array: np.ndarray) -> list[int]:
    """The axes of an array, the one whose entries lie closest together first."""
    return sorted(
        range(array.ndim), key=lambda axis: (array.shape[axis] == 1, abs(array.strides[axis]), -axis)
    )


def near(tile: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of a tile in its own order, close together, in a dtype."""
    return tile.astype(dtype, order="K")


@dataclass(frozen=True)
class Product:
    """What factors add to a weight, read by tiles."""

    equation: Equation
    """Of one weight."""
    sizes: Mapping[str, int]
    """Of the leaf's axes."""
    matrices: Matrices
    """float32."""

    @cached_property
    def _spread(self) -> tuple[np.ndarray, np.ndarray]:
        """The two matrices with the leaf's axes told apart: (…output, rank), (rank, …inputs)."""
        output, inputs = self.equation.right
        return (
            self.matrices.b.reshape([self.sizes[axis] for axis in output] + [-1]),
            self.matrices.a.reshape([-1] + [self.sizes[axis] for axis in inputs]),
        )

    def __getitem__(self, tile: Tile) -> np.ndarray:
        """A tile in the leaf's axes, float32."""
        axes, (output, inputs) = self.equation.left, self.equation.right
        at = dict(zip(axes, tile, strict=True))
        b, a = self._spread
        b, a = b[tuple(at[axis] for axis in output)], a[(slice(None), *(at[axis] for axis in inputs))]
        rows, columns = b.reshape(-1, len(a)), a.reshape(len(a), -1)
        if axes[-1] == output[-1]:
            # in the order of the leaf, so that nothing is transposed
            product = (columns.T @ rows.T).reshape(*a.shape[1:], *b.shape[:-1])
            named = (*inputs, *output)
        else:
            product = (rows @ columns).reshape(*b.shape[:-1], *a.shape[1:])
            named = (*output, *inputs)
        product *= np.float32(self.matrices.scale)
        tile_of: np.ndarray = product.transpose([named.index(axis) for axis in axes])
        return tile_of


@dataclass(frozen=True)
class Values:
    """The weight that a side computes with, read by tiles."""

    w: np.ndarray
    product: Product | None = None
    cast: np.dtype | None = None
    """dtype that ``w`` is rounded to."""

    def __getitem__(self, tile: Tile) -> np.ndarray:
        """A tile in the leaf's axes, float32; a sum is formed in float32, whatever the dtypes."""
        w = self.w[tile] if self.cast is None else near(self.w[tile], self.cast)
        w = near(w, FLOAT32)
        if self.product is not None:
            w += self.product[tile]
        return w


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
    found = float(np.dot(flat, flat))
    if 1e-30 < found < math.inf:
        return found
    # beyond what float32 can hold: none of the numbers a trained weight has
    return float(np.square(flat, dtype=np.float64).sum())
