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
from bridge.lora.factors import Matrices

#: elements of a tile: its float32 form takes a megabyte, which a core's second-level cache holds
TILE = 1 << 18
#: the longer a tile's rows the fewer there are, and the shorter the runs that a transpose writes
_WIDTH = 1 << 10
#: columns of a product that one call makes: of a tile that a box reaches into, most are not made in vain
_BLOCK = 1 << 8
#: elements added to a tile's rows: a stride of a power of two would map a column to few cache sets
_PAD = 8


@dataclass(frozen=True)
class Product:
    """The low-rank change of a box of a weight, float32."""

    change: Matrices
    steps: tuple[int, ...]
    """For each of the weight's axes, how many rows (of an output) or columns (of an input) one step along it is."""
    outputs: int
    """How many of the axes are the weight's rows; they come first."""
    at: tuple[int, ...]
    """Position of the box along every axis."""

    def corner(self, other: tuple[int, ...], row: int, column: int) -> tuple[int, int]:
        """Column and row of the weight at which a plane of the box begins.

        Args:
            other: the plane's position along the box's axes; 0 along its own two.
            row: the input axis of the plane.
            column: its output axis.
        """
        first = [(a + n) * step for a, n, step in zip(self.at, other, self.steps, strict=True)]
        return sum(first[self.outputs :]), sum(first[: self.outputs])


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
    # what does not fit shows in the result
    with np.errstate(over="ignore", invalid="ignore"):
        if product is None:
            _copy_box(dst, src, work, faulty)
        else:
            _add_box(dst, src, product, work, faulty)


def _copy_box(dst: np.ndarray, src: np.ndarray, work: Workspace, faulty: NonFinite) -> None:
    # columns of tiles are consecutive in the source
    column = axes_by_stride(src)[0]
    row = next(axis for axis in axes_by_stride(dst) if axis != column)
    to, origin = (_planes(array, row, column) for array in (dst, src))
    tiles = list(_tiles((0, 0), to.shape[-2:], to.shape[-2:]))
    for lead in np.ndindex(*to.shape[:-2]):
        for tile in tiles:
            _tile(to[lead][tile.part], origin[lead][tile.part], None, work, faulty)


def _add_box(dst: np.ndarray, src: np.ndarray, product: Product, work: Workspace, faulty: NonFinite) -> None:
    """Tiles of the sum, each with the part of the product that belongs to it.

    A product is made in blocks of the whole weight, each by the same call whatever the container and
    however it is cut: libraries of linear algebra sum in another order where a matrix has another
    shape or lies otherwise, and a merged weight must not depend on where its base came from.
    """
    row, column = dst.ndim - 1, product.outputs - 1
    to, origin = (_planes(array, row, column) for array in (dst, src))
    b, a = product.change.b, product.change.a
    planes = itertools.product(
        *(range(n) if axis not in (row, column) else (0,) for axis, n in enumerate(dst.shape))
    )
    jobs = [
        (tile, tuple(n for axis, n in enumerate(other) if axis not in (row, column)))
        for other in planes
        for tile in _tiles(product.corner(other, row, column), to.shape[-2:], (a.shape[1], len(b)))
    ]
    # planes that reach into one tile of the product share it
    jobs.sort(key=lambda job: (job[0].rows, job[0].columns))
    for (rows, columns), group in itertools.groupby(jobs, key=lambda job: (job[0].rows, job[0].columns)):
        shared = list(group)
        left, right = a[:, slice(*rows)].T, b[slice(*columns)].T
        added = work.tile("product", FLOAT32, len(left), right.shape[1])
        first = min(tile.inside[1].start for tile, _ in shared) // _BLOCK * _BLOCK
        for start in range(first, max(tile.inside[1].stop for tile, _ in shared), _BLOCK):
            block = added[:, start : start + _BLOCK]
            np.matmul(left, right[:, start : start + _BLOCK], out=block)
            if product.change.scale != 1:
                block *= np.float32(product.change.scale)
        for tile, lead in shared:
            _tile(to[lead][tile.part], origin[lead][tile.part], added[tile.inside], work, faulty)


def _planes(array: np.ndarray, row: int, column: int) -> np.ndarray:
    """An array with these two of its axes last."""
    return array.transpose([axis for axis in range(array.ndim) if axis not in (row, column)] + [row, column])


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


def _tile(
    dst: np.ndarray, src: np.ndarray, product: np.ndarray | None, work: Workspace, faulty: NonFinite
) -> None:
    if product is not None and src.strides[0] < src.strides[1]:
        # in the order of the source, whose rows these columns are
        dst, src, product = dst.T, src.T, product.T
    tile = src
    if product is not None:
        tile = work.tile("sum", FLOAT32, *src.shape)
        np.copyto(tile, src)
        tile += product
    across = dst.strides[0] < dst.strides[1] and dst.shape[0] > 1
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
