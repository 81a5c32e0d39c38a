"""Streaming a chunked array in order, without a whole chunk in memory.

By default Orbax stores an array as one zstd chunk, which for a stacked leaf contains every layer.
TensorStore decodes all of it to return one layer; here it is read in pieces and decoded as a
stream. Memory: one slab and a few read buffers.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import Spec, cells, raw, run_shape
from bridge.errors import Problem, SourceRefused
from bridge.formats.contract import SLAB_BYTES, Slab, Timings
from bridge.formats.disk.readahead import fill, open_range
from bridge.formats.orbax import zstd
from bridge.formats.orbax.ocdbt import RECOPY, Extent
from bridge.formats.orbax.zarr import ZarrArray

READ_BYTES = 1 << 20


def cut_axis(array: ZarrArray) -> int | None:
    """The axis along which chunks are contiguous runs of the array: (1, …, n, *rest). None if there is none."""
    shape = array.spec.shape
    axis = next((axis for axis, size in enumerate(array.chunks) if size != 1), max(len(shape) - 1, 0))
    whole = all(n == c for n, c in zip(shape[axis + 1 :], array.chunks[axis + 1 :], strict=True))
    return axis if whole else None


def streamable(array: ZarrArray) -> bool:
    """Whether the chunks are contiguous runs of the array in C order, raw or zstd."""
    return array.plain is not None and cut_axis(array) is not None


def slab_shape(array: ZarrArray) -> tuple[int, ...]:
    """Shape of the slabs of :func:`slabs`; smaller at the edges."""
    return run_shape(_chunk(array), SLAB_BYTES)


def _chunk(array: ZarrArray) -> Spec:
    """A chunk, clipped to the array."""
    clipped = tuple(min(n, c) for n, c in zip(array.spec.shape, array.chunks, strict=True))
    return Spec(clipped, array.spec.dtype)


def slabs(
    array: ZarrArray, chunks: Iterable[tuple[Path | None, Extent]], label: str, spent: Timings
) -> Iterator[Slab]:
    """Yield a :func:`streamable` array in C order, slab by slab.

    Args:
        array: its metadata.
        chunks: the file (None when inline) and extent of each chunk, in C order.
        label: the name of the array in an error.
        spent: the time for reading and decoding is added to these.

    Raises:
        SourceRefused: a file cannot be read, or a chunk decodes to too few or too many bytes.
    """
    axis, shape = cut_axis(array), array.spec.shape
    assert axis is not None
    slab = slab_shape(array)
    buffer = np.empty(math.prod(slab), array.spec.dtype)
    flat = raw(buffer)
    item = array.spec.dtype.itemsize
    row = math.prod(shape[axis + 1 :]) * item
    for (start, region), (path, extent) in zip(cells(shape, array.chunks), chunks, strict=True):
        with _decoded(array, path, extent, label, spent) as stream:
            for at, part in cells(region, slab):
                count = math.prod(part)
                _fill(stream, flat[: count * item], label, path)
                yield tuple(map(sum, zip(start, at, strict=True))), buffer[:count].reshape(part)
            # chunks are stored whole, padded beyond the end of the array
            _skip(stream, (array.chunks[axis] - region[axis]) * row if shape else 0, label, path)


def read_chunk(array: ZarrArray, path: Path | None, extent: Extent, label: str, into: np.ndarray) -> None:
    """Decode one chunk into an array of its shape, which it must fill exactly."""
    with _decoded(array, path, extent, label, Timings()) as stream:
        _fill(stream, raw(into), label, path)
        _skip(stream, 0, label, path)


def beginning(array: ZarrArray, path: Path | None, extent: Extent, label: str, count: int) -> np.ndarray:
    """The first elements of a chunk, flat, without reading much more of it."""
    values = np.empty(count, array.spec.dtype)
    # a block takes no more than it decodes to, but some encode nothing: then all is read
    ahead = extent.length if extent.inline is not None else min(extent.length, values.nbytes + 2 * zstd.BLOCK)
    for length in (ahead, extent.length):
        part = replace(extent, length=length)
        with _named(label, path), _decoded(array, path, part, label, Timings()) as stream:
            if not fill(stream.readinto, raw(values)):
                return values
    raise SourceRefused(Problem(f"{path or 'the index'}: {label} is truncated", RECOPY))


class _Stream:
    """The decoded bytes of a chunk; keeps the time for reading and decoding them."""

    def __init__(self, source: Any, file: _ExtentReader, spent: Timings) -> None:
        self._source, self._file, self._spent = source, file, spent

    def readinto(self, into: memoryview) -> int:
        began, before = time.perf_counter(), self._file.seconds
        got = int(self._source.readinto(into))
        read = self._file.seconds - before
        self._spent.read += read
        self._spent.decode += time.perf_counter() - began - read
        return got

    def finish(self) -> bool:
        """Whether everything was read. Decoders do not look at what follows a frame."""
        return self._file.finish()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()
        self._file.close()


def _decoded(array: ZarrArray, path: Path | None, extent: Extent, label: str, spent: Timings) -> _Stream:
    compressed = array.plain == "zstd"
    frame = zstd.Frame(math.prod(array.chunks) * array.spec.dtype.itemsize) if compressed else None
    try:
        file = _ExtentReader(path, extent, frame)
    except OSError as error:
        raise SourceRefused(Problem(f"{path}: {label}: {error.strerror}", RECOPY)) from error
    return _Stream(zstd.reader(file, READ_BYTES) if compressed else file, file, spent)


class _ExtentReader(io.RawIOBase):
    """The stored bytes of a chunk, from a file or the index, as a stream. A zstd frame is checked on the way."""

    def __init__(self, path: Path | None, extent: Extent, frame: zstd.Frame | None) -> None:
        self._part = None if path is None else open_range(path, extent.offset, extent.length)
        self._inline = memoryview(extent.inline or b"")
        self._at, self._end = extent.offset, extent.offset + extent.length
        self._frame = frame
        self.seconds = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        began = time.perf_counter()
        if self._part is None:
            got = min(len(into), self._end - self._at)
            into[:got] = self._inline[self._at : self._at + got]
        else:
            got = self._part.readinto(memoryview(into))
        self._at += got
        if self._frame is not None:
            self._frame.feed(memoryview(into)[:got])
        self.seconds += time.perf_counter() - began
        return got

    def finish(self) -> bool:
        """Whether nothing is left to read. Raises ValueError if the frame is incomplete."""
        if self._at < self._end:
            return False
        if self._frame is not None:
            self._frame.finish()
        return True

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
        super().close()


def _fill(stream: _Stream, into: memoryview, label: str, path: Path | None) -> None:
    with _named(label, path):
        missing = fill(stream.readinto, into)
    if missing:
        raise SourceRefused(
            Problem(f"{path or 'the index'}: {label} is truncated by {missing} bytes", RECOPY)
        )


def _skip(stream: _Stream, count: int, label: str, path: Path | None) -> None:
    scratch = memoryview(bytearray(min(count, READ_BYTES) or 1))
    while count:
        part = scratch[: min(count, len(scratch))]
        _fill(stream, part, label, path)
        count -= len(part)
    with _named(label, path):
        # a decoder reads to the end of the frame only when asked for more
        whole = not stream.readinto(scratch[:1]) and stream.finish()
    if not whole:
        raise SourceRefused(Problem(f"{path or 'the index'}: {label} has more bytes than its shape", RECOPY))


@contextlib.contextmanager
def _named(label: str, path: Path | None) -> Iterator[None]:
    """Name the array and the file in an error."""
    import zstandard

    try:
        yield
    except OSError as error:
        raise SourceRefused(
            Problem(f"{path or 'the index'}: {label}: {error.strerror or error}", RECOPY)
        ) from error
    except zstandard.ZstdError as error:
        raise SourceRefused(
            Problem(f"{path or 'the index'}: {label} cannot be decoded: {error}", RECOPY)
        ) from error
    except ValueError as error:
        # the errors of zstd.Frame are predicates
        raise SourceRefused(Problem(f"{path or 'the index'}: {label} {error}", RECOPY)) from error
