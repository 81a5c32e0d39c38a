"""What no converter can be faster than: reading the bytes, decoding them, writing the others.

Plain loops over one buffer of 8 MB, on one core. They run in the process of the benchmark,
between the runs of what is measured.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.ranges import Range

BLOCK = 8 << 20
LEVEL = 1
"""Of zstd, as Orbax writes."""


def read(ranges: Iterable[Range]) -> float:
    """Seconds to read these bytes, in the order they lie."""
    buffer = memoryview(bytearray(BLOCK))
    began = time.perf_counter()
    for _ in _blocks(ranges, buffer):
        pass
    return time.perf_counter() - began


def write(path: Path, length: int) -> float:
    """Seconds to write a file of this size and have it on the disk. The file is removed again."""
    buffer = memoryview(os.urandom(BLOCK))
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if length:
            os.posix_fallocate(fd, 0, length)
        at = 0
        while at < length:
            at += os.pwrite(fd, buffer[: length - at], at)
        os.fsync(fd)
        return time.perf_counter() - began
    finally:
        os.close(fd)
        path.unlink()
        os.sync()


def decode(ranges: Iterable[Range]) -> float:
    """Seconds of one core to decode these bytes as a stream; reading them is not counted."""
    buffer = memoryview(bytearray(BLOCK))
    spent = 0.0
    for one in ranges:
        if one.zstd:
            with _Timed(one) as raw, _decoder(raw) as stream:
                began = time.perf_counter()
                while stream.readinto(buffer):
                    pass
                spent += time.perf_counter() - began - raw.spent
    return spent


def encode(ranges: Iterable[Range]) -> float:
    """Seconds of one core to encode again what these bytes decode to; all else is not counted."""
    import zstandard

    buffer = memoryview(bytearray(BLOCK))
    spent = 0.0
    for one in ranges:
        if one.zstd:
            encoder = zstandard.ZstdCompressor(level=LEVEL).compressobj()
            with _Timed(one) as raw, _decoder(raw) as stream:
                while got := stream.readinto(buffer):
                    began = time.perf_counter()
                    encoder.compress(buffer[:got])
                    spent += time.perf_counter() - began
            began = time.perf_counter()
            encoder.flush()
            spent += time.perf_counter() - began
    return spent


def forget(paths: Iterable[Path]) -> None:
    """Drop files from the page cache; what is not on the disk yet must go there first."""
    os.sync()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached(paths: Iterable[Path]) -> float:
    """The part of these files that is in the page cache, 0 to 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = held = 0
    for path in paths:
        length = path.stat().st_size
        if not length:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) as mapped:
            count = -(-length // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * count)()
            # a private mapping: asking for its address needs write access, and touches no page
            start = ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), states):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
            del start
            pages += count
            held += sum(bytes(states))
    return held / max(pages, 1)


def _blocks(ranges: Iterable[Range], buffer: memoryview) -> Iterator[memoryview]:
    for path, parts in _by_file(ranges):
        fd = os.open(path, os.O_RDONLY)
        try:
            for offset, length in parts:
                at = 0
                while at < length:
                    got = os.preadv(fd, [buffer[: length - at]], offset + at)
                    if not got:
                        raise EOFError(f"{path} ends too soon")
                    yield buffer[:got]
                    at += got
        finally:
            os.close(fd)


def _by_file(ranges: Iterable[Range]) -> Iterator[tuple[Path, list[tuple[int, int]]]]:
    """The bytes by file, those that touch joined."""
    files: dict[Path, list[tuple[int, int]]] = {}
    for one in sorted(ranges, key=lambda r: (r.path, r.offset)):
        parts = files.setdefault(one.path, [])
        if parts and sum(parts[-1]) == one.offset:
            parts[-1] = (parts[-1][0], parts[-1][1] + one.length)
        else:
            parts.append((one.offset, one.length))
    yield from files.items()


def _decoder(raw: _Timed) -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(raw, read_size=1 << 20)


class _Timed:
    """A range of a file, read in order; notes how long that takes."""

    def __init__(self, lies: Range) -> None:
        self._lies, self._at, self.spent = lies, 0, 0.0

    def __enter__(self) -> _Timed:
        self._fd = os.open(self._lies.path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, count: int) -> bytes:
        began = time.perf_counter()
        data = os.pread(self._fd, min(count, self._lies.length - self._at), self._lies.offset + self._at)
        self._at += len(data)
        self.spent += time.perf_counter() - began
        return data
