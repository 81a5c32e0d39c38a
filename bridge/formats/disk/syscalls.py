"""System calls that make large files cheap: readahead, allocation, write-behind.

All are optional: where a system or a file system lacks one (macOS, network file systems), plain
reads and writes do the work. Only errors of the disk are reported.
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

#: ranges in flight, each with an open descriptor; smaller ones wait for the final sync
MAX_RANGES = 12
MIN_RANGE_BYTES = 1 << 20

#: offsets at which a range is probed for in the page cache
PROBES = 4
#: not the global generator, which a user may have seeded
_random = random.Random()


@cache
def _libc(name: str, *arguments: Any) -> Any:
    """A function of the C library, or None if it has none of that name."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = arguments
    return function


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve the disk blocks of a range of a file.

    Raises:
        OSError: the disk is full, or the user's quota exceeded.
    """
    # not os.posix_fallocate, which writes to every block where the file system cannot allocate
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
        # the system reports an error once: ignored here, the final sync would succeed
        if code in _FAULTS:
            raise OSError(code, os.strerror(code))


class WriteBehind:
    """Continuous writeback of what was written, which keeps little of it in the page cache.

    An output many times larger than the cache would otherwise evict everything else, and on a
    virtual machine each new page of the cache is memory that the host must provide. At most `limit`
    bytes are not on disk yet. Thread-safe; a pickled copy starts empty.
    """

    def __init__(self, limit: int = 128 << 20) -> None:
        self._limit = limit
        self._in_flight: deque[tuple[int, int, int]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def wrote(self, fd: int, offset: int, length: int) -> None:
        """Start writeback of a range. Small ones wait for the sync at the end.

        Raises:
            OSError: this range, or an earlier one, could not be written to disk.
        """
        if length < MIN_RANGE_BYTES:
            return
        _write_back(fd, offset, length, _WRITE)
        with self._lock:
            self._in_flight.append((os.dup(fd), offset, length))
            self._bytes += length
        self._settle(self._limit, MAX_RANGES)

    def finish(self) -> None:
        """Wait until every range is on disk. Raises OSError, as :meth:`wrote` does."""
        self._settle(0, 0)

    def _settle(self, limit: int, ranges: int) -> None:
        while True:
            with self._lock:
                if self._bytes <= limit and len(self._in_flight) <= ranges:
                    return
                fd, offset, length = self._in_flight.popleft()
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
        for fd, _, _ in self._in_flight:
            os.close(fd)


def will_read(fd: int, offset: int, length: int) -> None:
    """Start reading a range into the page cache, for a read that comes soon."""
    if hasattr(os, "posix_fadvise") and length > 0:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether a range is in the page cache, by a few probes.

    A probe that misses may bring its page in, so probes at fixed offsets would find their own
    traces. A file system that does not support probing, as those in memory, counts as cached.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    page = bytearray(1)
    try:
        return all(
            os.preadv(fd, [page], offset + _random.randrange(length), os.RWF_NOWAIT) for _ in range(PROBES)
        )
    except BlockingIOError:
        return False
    except OSError:
        return True


def set_direct(fd: int, on: bool) -> bool:
    """Turn direct reads on or off; whether that changed anything."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    wanted = flags | direct if on else flags & ~direct
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return wanted != flags
