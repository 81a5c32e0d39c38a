"""Arrays in any chunk grid, read chunk by chunk where :mod:`bridge.formats.orbax.stream` cannot stream.

Each chunk is decoded into a buffer of its declared size, which it must fill exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bridge.formats.orbax.ocdbt import Extent
from bridge.formats.orbax.stream import read_chunk
from bridge.formats.orbax.zarr import ZarrArray

FindChunk = Callable[[int], tuple[Path | None, Extent] | None]
"""The file and extent of a chunk, by its number in C order of the grid; None for an absent chunk of zeros."""


def read(array: ZarrArray, find: FindChunk, rows: range, label: str) -> np.ndarray:
    """Rows of an array along its first axis; a scalar has one.

    Raises:
        SourceRefused: a chunk cannot be read, or does not have its declared size.
    """
    shape, grid = array.spec.shape or (1,), array.grid or (1,)
    chunk_shape = array.chunks or (1,)
    result = np.zeros((len(rows), *shape[1:]), array.spec.dtype)
    if not result.size:
        return result
    buffer = np.empty(chunk_shape, array.spec.dtype)
    for number, position in enumerate(itertools.product(*map(range, grid))):
        first = position[0] * chunk_shape[0]
        low, high = max(first, rows.start), min(first + chunk_shape[0], rows.stop)
        if low >= high or (chunk := find(number)) is None:
            continue
        read_chunk(array, *chunk, label, buffer)
        starts = [p * c for p, c in zip(position[1:], chunk_shape[1:], strict=True)]
        rest = [slice(at, at + c) for at, c in zip(starts, chunk_shape[1:], strict=True)]
        # chunks at the edges are padded
        kept = [slice(0, n - at) for at, n in zip(starts, shape[1:], strict=True)]
        result[(slice(low - rows.start, high - rows.start), *rest)] = buffer[
            (slice(low - first, high - first), *kept)
        ]
    return result
