"""Part of a file, in order, read ahead of who takes it.

A checkpoint is read once, and is as large as the page cache. Where its pages are not there yet,
they are read around the cache (``O_DIRECT``): taking them in costs several times what reading
them does, and pushes out what other programs on the machine need. A thread reads the next block
while one is worked on. Where a system or a file system has no such thing, plain reads serve.
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
from bridge.formats.disk.syscalls import go_direct, is_cached, will_read

BLOCK_BYTES = 4 << 20
#: what is not longer is read plainly: nothing could be read ahead of it
LEAST_BYTES = BLOCK_BYTES
#: of what goes around the cache, offsets and lengths are multiples of this: no disk has larger blocks
ALIGN = 4096
#: how far ahead the disk is asked to read into the cache
AHEAD_BYTES = 32 << 20
#: buffers that are kept for parts to come
SPARE = 8


class Part(Protocol):
    """A part of a file being read."""

    def readinto(self, into: memoryview) -> int:
        """Fill some of ``into`` with what comes next, and say how much; 0 at the end. Raises OSError."""
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


def open_part(path: Path, offset: int, length: int) -> Part:
    """Open a part of a regular file for reading once. Raises OSError."""
    file = open_regular(path)
    fd = file.fileno()
    if length > LEAST_BYTES and not is_cached(fd, offset, length) and go_direct(fd, True):
        try:
            return _Direct(file, offset, length)
        except (RuntimeError, OSError):
            # no more threads, or memory, are allowed
            go_direct(fd, False)
    return _Plain(file, offset, length)


def fill(readinto: Callable[[memoryview], int], into: memoryview) -> int:
    """Read until ``into`` is full or there is no more; how many bytes are missing."""
    done = 0
    while done < len(into) and (got := readinto(into[done:])):
        done += got
    return len(into) - done


def buffered_bytes(length: int) -> int:
    """Bytes of memory that reading a part of this length may take."""
    return 2 * BLOCK_BYTES if length > LEAST_BYTES else 0


class _Plain:
    """Through the page cache."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file = file
        self._at, self._end = offset, offset + length
        self._asked = offset

    def readinto(self, into: memoryview) -> int:
        if self._asked < min(self._at + AHEAD_BYTES // 2, self._end):
            ask = min(AHEAD_BYTES, self._end - self._asked)
            will_read(self._file.fileno(), self._asked, ask)
            self._asked += ask
        want = min(len(into), self._end - self._at, AHEAD_BYTES)
        got = os.preadv(self._file.fileno(), [into[:want]], self._at) if want else 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()


#: buffers that no part uses now: new memory costs as much as reading into it
_spare: list[mmap.mmap] = []
# they are not in a child's memory
os.register_at_fork(after_in_child=_spare.clear)


def _buffer() -> mmap.mmap:
    try:
        return _spare.pop()
    except IndexError:
        made = mmap.mmap(-1, BLOCK_BYTES, mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_DONTFORK"):
            # the disk may be writing into it while the process that bridge is part of forks
            made.madvise(mmap.MADV_DONTFORK)
        return made


def _give_back(buffer: mmap.mmap) -> None:
    if len(_spare) < SPARE:
        _spare.append(buffer)


class _Direct:
    """Around the page cache, in aligned blocks: one is taken while a thread reads the next."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file = file
        self._at, self._end = offset, offset + length
        self._next = offset // ALIGN * ALIGN
        self._thread = ThreadPoolExecutor(1, "bridge-read")
        self._asked: deque[tuple[int, mmap.mmap, Future[int]]] = deque()
        self._block: mmap.mmap | None = None
        self._left = memoryview(b"")
        try:
            self._ask()
            self._ask()
        except BaseException:
            self._stop()
            raise

    def readinto(self, into: memoryview) -> int:
        if not self._left:
            self._take()
        got = min(len(into), len(self._left))
        into[:got] = self._left[:got]
        self._left = self._left[got:]
        self._at += got
        return got

    def close(self) -> None:
        self._stop()
        self._file.close()

    def _ask(self) -> None:
        """Have the thread read the next block, which ends with the part or a little later."""
        left = self._end - self._next
        if left > 0:
            length = min(-(-left // ALIGN) * ALIGN, BLOCK_BYTES)
            buffer = _buffer()
            future = self._thread.submit(_read, self._file.fileno(), memoryview(buffer)[:length], self._next)
            self._asked.append((self._next, buffer, future))
            self._next += length

    def _take(self) -> None:
        """Have the next block at hand, and the one after it read."""
        if self._block is not None:
            self._release()
            self._ask()
        if self._asked:
            start, self._block, future = self._asked.popleft()
            stop = min(future.result(), self._end - start)
            # nothing, where the block before it was the file's last
            first = self._at - start
            self._left = memoryview(self._block)[first : max(stop, first)] if first >= 0 else memoryview(b"")

    def _release(self) -> None:
        if self._block is not None:
            self._left.release()
            self._left = memoryview(b"")
            _give_back(self._block)
            self._block = None

    def _stop(self) -> None:
        # a buffer may go to another part only when nothing is read into it any more
        self._thread.shutdown(cancel_futures=True)
        self._release()
        while self._asked:
            _give_back(self._asked.pop()[1])


def _read(fd: int, into: memoryview, offset: int) -> int:
    """Fill a block from where it begins in the file, and say how much of it the file has."""
    done = 0
    while done < len(into):
        try:
            got = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            # some file systems take the flag and refuse the read, or gave less than whole blocks before
            if error.errno != errno.EINVAL or not go_direct(fd, False):
                raise
            continue
        done += got
        if got == 0 or offset + done >= os.fstat(fd).st_size:
            break
    return done
