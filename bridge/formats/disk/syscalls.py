"""System calls that make large files cheap: read-ahead, allocation, write-behind.

Each is a help and none is needed: where a system or a file system lacks one (macOS, network file
systems), nothing happens and the plain calls do the work. Only faults of the disk are reported.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import threading
from collections import deque
from functools import cache
from typing import Any

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_LONG = ctypes.c_longlong

#: parts under way, each of which holds a descriptor; and what is too small to be one
PARTS = 12
PART_BYTES = 1 << 20

#: places of a part of a file at which it is looked for in the page cache
LOOKS = 4
#: no generator that a user may have seeded
_random = random.Random()


@cache
def _libc(name: str, *arguments: Any) -> Any:
    """A function of the C library, or None where it has none of that name."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = arguments
    return function


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve the blocks of a part of a file.

    Raises:
        OSError: the disk, or the user's part of it, is full.
    """
    # not os.posix_fallocate: where the file system cannot, the C library writes to every block instead
    fallocate = _libc("fallocate64", ctypes.c_int, ctypes.c_int, _LONG, _LONG)
    if fallocate is None or length == 0:
        return
    while fallocate(fd, 0, offset, length):
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in _FAULTS:
            raise OSError(code, os.strerror(code))
        return


def _write_back(fd: int, offset: int, length: int, flags: int) -> None:
    sync_file_range = _libc("sync_file_range", ctypes.c_int, _LONG, _LONG, ctypes.c_uint)
    if sync_file_range is not None and sync_file_range(fd, offset, length, flags):
        code = ctypes.get_errno()
        # the system tells of a fault once: passed over here, the sync at the end would succeed
        if code in _FAULTS:
            raise OSError(code, os.strerror(code))


class WriteBehind:
    """Has the disk write what was written while more is made, and keeps little of it in the page cache.

    Output many times larger than the cache would else push everything out of it, and on a virtual
    machine every new page of the cache is memory that the host has to find. What is not on disk
    yet stays within `limit` bytes. Safe to use from several threads; a pickled copy starts empty.
    """

    def __init__(self, limit: int = 128 << 20) -> None:
        self._limit = limit
        self._begun: deque[tuple[int, int, int]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def wrote(self, fd: int, offset: int, length: int) -> None:
        """Note that a part of a file was written. Small ones wait for the sync at the end.

        Raises:
            OSError: the disk could not take this part or an earlier one.
        """
        if length < PART_BYTES:
            return
        _write_back(fd, offset, length, _WRITE)
        with self._lock:
            self._begun.append((os.dup(fd), offset, length))
            self._bytes += length
        self._settle(self._limit, PARTS)

    def finish(self) -> None:
        """Wait until all of it is on disk. Raises OSError as :meth:`wrote`."""
        self._settle(0, 0)

    def _settle(self, limit: int, parts: int) -> None:
        while True:
            with self._lock:
                if self._bytes <= limit and len(self._begun) <= parts:
                    return
                fd, offset, length = self._begun.popleft()
                self._bytes -= length
            try:
                _write_back(fd, offset, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def __reduce__(self) -> tuple[type[WriteBehind], tuple[int]]:
        return WriteBehind, (self._limit,)

    def __del__(self) -> None:
        for fd, _, _ in self._begun:
            os.close(fd)


def will_read(fd: int, offset: int, length: int) -> None:
    """Start reading a part of a file from the disk, for a read that comes soon."""
    if hasattr(os, "posix_fadvise") and length > 0:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether a part of a file lies in the page cache already, as far as a few looks can tell.

    A look that misses brings its page in: always at the same places, looks would come to see
    themselves. Where the file system does not say, as those that live in memory, it is taken for cached.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    page = bytearray(1)
    try:
        return all(
            os.preadv(fd, [page], offset + _random.randrange(length), os.RWF_NOWAIT) for _ in range(LOOKS)
        )
    except BlockingIOError:
        return False
    except OSError:
        return True


def go_direct(fd: int, on: bool) -> bool:
    """Have reads go around the page cache, or through it again; whether that changed anything."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    wanted = flags | direct if on else flags & ~direct
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return wanted != flags
