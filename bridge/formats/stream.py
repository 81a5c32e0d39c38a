"""Rows of a chunked array, in order, without holding a chunk.

Orbax stores an array as one zstd chunk by default, and a chunk of a stacked leaf holds every
layer. TensorStore must decode all of it to give one; here it is read in pieces and decoded as a
stream. Memory: one block of rows (at most `BLOCK_BYTES`, or one row) and a few read buffers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import Problem, SourceRefused
from bridge.formats.ocdbt import RECOPY, Extent
from bridge.formats.zarr import ZarrArray
from bridge.specs import raw

BLOCK_BYTES = 8 << 20
READ_BYTES = 1 << 20


def streamable(array: ZarrArray) -> bool:
    """Whether the array's chunks are whole rows in order, plain or zstd."""
    return array.plain is not None and all(
        n == c for n, c in zip(array.spec.shape[1:], array.chunks[1:], strict=True)
    )


def rows_per_block(array: ZarrArray) -> int:
    """How many rows of the first axis a block has: as many as fit in BLOCK_BYTES, at least one."""
    row = math.prod(array.spec.shape[1:]) * array.spec.dtype.itemsize
    return max(1, BLOCK_BYTES // max(row, 1))


def blocks(
    array: ZarrArray, chunks: list[tuple[Path | None, Extent]], label: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows) of an array for which :func:`streamable` holds.

    Args:
        array: its metadata.
        chunks: for each chunk in order, the file it lies in (None when inline) and where.
        label: what to call the array in an error.

    Raises:
        SourceRefused: a file cannot be read, or a chunk decodes to too few or too many bytes.
    """
    total = array.spec.shape[0] if array.spec.shape else 1
    per_chunk = array.chunks[0] if array.chunks else 1
    row_shape = array.spec.shape[1:]
    row_bytes = math.prod(row_shape) * array.spec.dtype.itemsize
    step = min(rows_per_block(array), per_chunk)
    buffer = np.empty((step, *row_shape), array.spec.dtype)
    flat = raw(buffer)
    for number, (path, extent) in enumerate(chunks):
        start = number * per_chunk
        stop = min(start + per_chunk, total)
        with _decoded(path, extent, array.plain == "zstd") as stream:
            for first in range(start, stop, step):
                rows = min(step, stop - first)
                _fill(stream, flat[: rows * row_bytes], label, path)
                yield first, buffer[:rows]
            # the last chunk is stored whole, its rows beyond the array's end being padding
            _skip(stream, (start + per_chunk - stop) * row_bytes, label, path)


def _decoded(path: Path | None, extent: Extent, zstd: bool) -> Any:
    try:
        raw: Any = _Range(path, extent.offset, extent.length) if path else io.BytesIO(extent.inline or b"")
    except OSError as error:
        raise SourceRefused(Problem(f"{path}: {error.strerror}", RECOPY)) from error
    if not zstd:
        return io.BufferedReader(raw, READ_BYTES) if isinstance(raw, _Range) else raw
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(raw, read_size=READ_BYTES, closefd=True)


class _Range(io.RawIOBase):
    """Part of a file, as a stream."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        # unbuffered: the readers above ask for a megabyte at a time
        self._file = path.open("rb", buffering=0)
        self._file.seek(offset)
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        want = min(len(into), self._left)
        got = self._file.readinto(memoryview(into)[:want]) if want else 0
        self._left -= got or 0
        return got or 0

    def close(self) -> None:
        self._file.close()
        super().close()


def _fill(stream: Any, into: memoryview, label: str, path: Path | None) -> None:
    done = 0
    while done < len(into):
        got = _readinto(stream, into[done:], label, path)
        if got == 0:
            raise SourceRefused(
                Problem(f"{path or 'the index'}: {label} ends {len(into) - done} bytes too soon", RECOPY)
            )
        done += got


def _skip(stream: Any, count: int, label: str, path: Path | None) -> None:
    scratch = memoryview(bytearray(min(count, READ_BYTES) or 1))
    while count:
        got = _readinto(stream, scratch[: min(count, len(scratch))], label, path)
        if got == 0:
            raise SourceRefused(
                Problem(f"{path or 'the index'}: {label} ends {count} bytes too soon", RECOPY)
            )
        count -= got
    if _readinto(stream, scratch[:1], label, path):
        raise SourceRefused(
            Problem(f"{path or 'the index'}: {label} holds more bytes than its shape", RECOPY)
        )


def _readinto(stream: Any, into: memoryview, label: str, path: Path | None) -> int:
    import zstandard

    try:
        return int(stream.readinto(into))
    except (zstandard.ZstdError, OSError) as error:
        raise SourceRefused(
            Problem(f"{path or 'the index'}: {label} cannot be decoded: {error}", RECOPY)
        ) from error
