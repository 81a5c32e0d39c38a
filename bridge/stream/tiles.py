"""Moving a box of numbers from one layout to another: cast, add a low-rank product, transpose.

A weight of a JAX leaf and the PyTorch tensor it becomes hold the same numbers in different
orders, so most of a conversion is a transpose. Done over a whole matrix that misses the cache at
every element; done in tiles that stay in it, all of the work on a tile costs about one pass over
memory. Memory: three tiles of `TILE` elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bridge.arrays import FLOAT32, all_finite, axes_by_stride
from bridge.lora.factors import Spread

#: elements of a tile: its float32 form takes a megabyte, which a core's second-level cache holds
TILE = 1 << 18
#: the longer a tile's rows the fewer there are, and the shorter the runs that a transpose writes
_WIDTH = 1 << 10
#: elements added to a tile's rows: a stride of a power of two would map a column to few cache sets
_PAD = 8


@dataclass(frozen=True)
class Product:
    """The low-rank change of a box of a weight, float32."""

    factors: Spread
    at: tuple[int, ...]
    """Position of the box along every axis of the weight, outputs first."""
    sizes: tuple[int, ...]
    """Length of the weight's axes."""


@dataclass
class NonFinite:
    """Whether values that are not finite were met."""

    source: bool = False
    """Among those read."""
    result: bool = False
    """Among those written, and not among those read: they overflowed."""


@dataclass
class Workspace:
    """Tiles that are used again and again. One per thread."""

    _tiles: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def tile(self, use: str, dtype: np.dtype, rows: int, columns: int) -> np.ndarray:
        """An uninitialised (rows, columns) tile whose rows do not share cache sets."""
        need = rows * (columns + _PAD)
        held = self._tiles.get((use, dtype.itemsize))
        if held is None or held.size < need:
            held = self._tiles[use, dtype.itemsize] = np.empty(need, f"u{dtype.itemsize}")
        return held[:need].view(dtype).reshape(rows, columns + _PAD)[:, :columns]


def place(
    dst: np.ndarray, src: np.ndarray, product: Product | None, work: Workspace, faulty: NonFinite
) -> None:
    """``dst[...] = src + product``, where the two have the same axes in any order in memory.

    With a product the sum is made in float32 and rounded once. Without, equal dtypes are moved
    bit by bit, others cast.

    Args:
        dst: box to fill, any strides.
        src: the same shape, any strides.
        product: what to add, if anything.
        work: of this thread.
        faulty: records values that are not finite.
    """
    if dst.ndim < 2:
        dst, src = (array.reshape((1,) * (2 - array.ndim) + array.shape) for array in (dst, src))
        assert product is None
    row, column = _tile_axes(dst, src, product)
    others = [range(n) if axis not in (row, column) else (0,) for axis, n in enumerate(dst.shape)]
    across = dst.strides[row] < dst.strides[column] and dst.shape[row] > 1
    order = [axis for axis in range(dst.ndim) if axis not in (row, column)] + [row, column]
    to, origin = dst.transpose(order), src.transpose(order)
    at = (0, 0) if product is None else (product.at[row], product.at[column])
    sizes = to.shape[-2:] if product is None else (product.sizes[row], product.sizes[column])
    tiles = list(_tiles(at, to.shape[-2:], sizes))
    # what does not fit is found in the result
    with np.errstate(over="ignore", invalid="ignore"):
        for other in itertools.product(*others):
            lead = tuple(n for axis, n in enumerate(other) if axis not in (row, column))
            target, source = to[lead], origin[lead]
            for tile in tiles:
                added = None if product is None else _added(product, other, row, column, tile)
                _tile(target[tile.part], source[tile.part], added, across, work, faulty)


def _tile_axes(dst: np.ndarray, src: np.ndarray, product: Product | None) -> tuple[int, int]:
    """Axes that become the rows and columns of tiles: columns are consecutive in ``src``."""

    column = axes_by_stride(src)[0]
    rest = [axis for axis in axes_by_stride(dst) if axis != column]
    if product is not None:
        # one axis of the rows of the matrix and one of its columns make the product a small matmul
        outputs = product.factors.outputs
        rest = [axis for axis in rest if (axis < outputs) != (column < outputs)]
    return rest[0], column


@dataclass(frozen=True)
class _Tile:
    """A tile of a weight's rows and columns, and the part of it that lies in a box."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    part: tuple[slice, slice]
    """Of the box."""
    inside: tuple[slice, slice]
    """Of the tile."""


def _tiles(at: tuple[int, ...], shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[_Tile]:
    """Tiles that a box reaches into.

    Their borders are the weight's, not the box's: how a sum of products is rounded depends on the
    shape of the matrices, and must not depend on how the source was cut.
    """
    width = min(sizes[1], _WIDTH)
    height = max(TILE // max(width, 1), 1)
    spans = []
    for begin, length, size, step in zip(at, shape, sizes, (height, width), strict=True):
        first = range(begin // step * step, begin + length, step)
        spans.append(
            [
                (
                    (start, min(start + step, size)),
                    slice(max(start - begin, 0), min(start + step - begin, length)),
                    slice(max(begin - start, 0), min(start + step, begin + length) - start),
                )
                for start in first
            ]
        )
    for (rows, part_r, inside_r), (columns, part_c, inside_c) in itertools.product(*spans):
        yield _Tile(rows, columns, (part_r, part_c), (inside_r, inside_c))


Added = tuple[np.ndarray, np.ndarray, float, tuple[slice, slice]]
"""Two matrices whose product belongs to a tile, its scale, and the part of it that is asked for."""


def _added(product: Product, other: tuple[int, ...], row: int, column: int, tile: _Tile) -> Added:
    at: list[int | slice] = [begin + n for begin, n in zip(product.at, other, strict=True)]
    at[row], at[column] = slice(*tile.rows), slice(*tile.columns)
    b, a = product.factors.block(tuple(at))
    left, right = (a.T, b.T) if column < product.factors.outputs else (b, a)
    return left, right, product.factors.scale, tile.inside


def _tile(
    dst: np.ndarray,
    src: np.ndarray,
    added: Added | None,
    across: bool,
    work: Workspace,
    faulty: NonFinite,
) -> None:
    tile = src
    if added is not None:
        tile = work.tile("sum", FLOAT32, *src.shape)
        np.copyto(tile, src)
        left, right, scale, inside = added
        product = np.matmul(left, right, out=work.tile("product", FLOAT32, len(left), right.shape[1]))
        if scale != 1:
            product *= np.float32(scale)
        tile += product[inside]
    if tile.dtype != dst.dtype or (across and tile is src):
        narrow = work.tile("cast", dst.dtype, *src.shape)
        _copy(narrow, tile)
        tile = narrow
    if not all_finite(tile):
        read = not all_finite(src)
        faulty.source |= read
        faulty.result |= not read
    _copy(dst, tile)


def _copy(dst: np.ndarray, src: np.ndarray) -> None:
    """Copy or cast. Equal dtypes go as whole numbers: numpy has no fast way for bfloat16's strides."""
    if dst.dtype == src.dtype:
        bits = f"u{dst.dtype.itemsize}"
        np.copyto(dst.view(bits), src.view(bits))
    else:
        np.copyto(dst, src, casting="unsafe")
