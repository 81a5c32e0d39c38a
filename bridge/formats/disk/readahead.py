"""Sequential reads of a range of a file, ahead of the consumer.

A checkpoint is read once, and may be as large as the page cache. Pages that are not cached yet are
read around the cache (``O_DIRECT``): caching them costs several times as much as reading them, and
evicts what other programs need. A thread reads the next block while the last one is processed.
Systems and file systems without direct reads get plain ones.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from bridge.formats.disk.location import open_regular
from bridge.formats.disk.syscalls import is_cached, set_direct, will_read

BLOCK_BYTES = 4 << 20
#: shorter ranges are read through the cache: there is nothing to read ahead
MIN_BYTES = BLOCK_BYTES
#: alignment of direct reads: no disk has larger blocks
ALIGN = 4096
#: readahead of reads through the cache
AHEAD_BYTES = 32 << 20
#: buffers kept for later ranges
MAX_SPARE = 8


class RangeReader(Protocol):
    """A range of a file, read once from start to end."""

    def readinto(self, into: memoryview) -> int:
        """Read the next bytes into ``into``; their number, 0 at the end. Raises OSError."""
        ...

    def close(self) -> None:
        """Stop reading and close the file."""
        ...


def open_range(path: Path, offset: int, length: int) -> RangeReader:
    """Open a range of a regular file. Raises OSError."""
    file = open_regular(path)
    fd = file.fileno()
    if length > MIN_BYTES and not is_cached(fd, offset, length) and set_direct(fd, True):
        try:
            return _DirectReader(file, offset, length)
        except (RuntimeError, OSError):
            # out of threads, or memory
            set_direct(fd, False)
    return _CachedReader(file, offset, length)


def fill(readinto: Callable[[memoryview], int], into: memoryview) -> int:
    """Read until ``into`` is full or the input ends; the number of bytes missing."""
    done = 0
    while done < len(into) and (got := readinto(into[done:])):
        done += got
    return len(into) - done


def buffered_bytes(length: int) -> int:
    """Memory in use while reading a range of this length."""
    return 2 * BLOCK_BYTES if length > MIN_BYTES else 0


class _CachedReader:
    """Reads through the page cache."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file = file
        self._at, self._end = offset, offset + length
        self._asked = offset

    def readinto(self, into: memoryview) -> int:
        if self._asked < min(self._at + AHEAD_BYTES // 2, self._end):
            ahead = min(AHEAD_BYTES, self._end - self._asked)
            will_read(self._file.fileno(), self._asked, ahead)
            self._asked += ahead
        want = min(len(into), self._end - self._at, AHEAD_BYTES)
        got = os.preadv(self._file.fileno(), [into[:want]], self._at) if want else 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()


#: unused buffers: fresh memory costs as much as reading into it
_spare: list[mmap.mmap] = []
# a child process does not inherit them
os.register_at_fork(after_in_child=_spare.clear)


def _buffer() -> mmap.mmap:
    try:
        return _spare.pop()
    except IndexError:
        buffer = mmap.mmap(-1, BLOCK_BYTES, mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_DONTFORK"):
            # the host process may fork while the disk writes into it
            buffer.madvise(mmap.MADV_DONTFORK)
        return buffer


def _give_back(buffer: mmap.mmap) -> None:
    if len(_spare) < MAX_SPARE:
        _spare.append(buffer)


class _DirectReader:
    """Reads around the page cache, in aligned blocks: a thread reads the next one ahead."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file = file
        self._at, self._end = offset, offset + length
        self._next = offset // ALIGN * ALIGN
        self._thread = ThreadPoolExecutor(1, "bridge-read")
        self._queue: deque[tuple[int, mmap.mmap, Future[int]]] = deque()
        self._block: mmap.mmap | None = None
        self._left = memoryview(b"")
        try:
            self._read_next()
            self._read_next()
        except BaseException:
            self._stop()
            raise

    def readinto(self, into: memoryview) -> int:
        if not self._left:
            self._advance()
        got = min(len(into), len(self._left))
        into[:got] = self._left[:got]
        self._left = self._left[got:]
        self._at += got
        return got

    def close(self) -> None:
        self._stop()
        self._file.close()

    def _read_next(self) -> None:
        """Have the thread read the next block; the last may extend beyond the range."""
        left = self._end - self._next
        if left > 0:
            length = min(-(-left // ALIGN) * ALIGN, BLOCK_BYTES)
            buffer = _buffer()
            future = self._thread.submit(_read, self._file.fileno(), memoryview(buffer)[:length], self._next)
            self._queue.append((self._next, buffer, future))
            self._next += length

    def _advance(self) -> None:
        """Advance to the next block, and have the one after it read."""
        if self._block is not None:
            self._release()
            self._read_next()
        if self._queue:
            start, self._block, future = self._queue.popleft()
            stop = min(future.result(), self._end - start)
            # empty if the file ended in an earlier block
            first = self._at - start
            self._left = memoryview(self._block)[first : max(stop, first)] if first >= 0 else memoryview(b"")

    def _release(self) -> None:
        if self._block is not None:
            self._left.release()
            self._left = memoryview(b"")
            _give_back(self._block)
            self._block = None

    def _stop(self) -> None:
        # a buffer may be reused only once nothing is read into it
        self._thread.shutdown(cancel_futures=True)
        self._release()
        while self._queue:
            _give_back(self._queue.pop()[1])


def _read(fd: int, into: memoryview, offset: int) -> int:
    """Read a block at an offset; the number of bytes, fewer at the end of the file."""
    done = 0
    while done < len(into):
        try:
            got = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            # some file systems accept the flag and reject the read, or have returned partial blocks
            if error.errno != errno.EINVAL or not set_direct(fd, False):
                raise
            continue
        done += got
        if got == 0 or offset + done >= os.fstat(fd).st_size:
            break
    return done
