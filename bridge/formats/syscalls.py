"""System calls that make large files cheap: advice, allocation, early write-back.

Each is a help and none is needed: where a system or a file system lacks one (macOS, network file
systems), nothing happens and the plain calls do the work. Only a full disk is reported.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import Any

_SYNC_FILE_RANGE_WRITE = 2
_LONG = ctypes.c_longlong


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
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(code, os.strerror(code))
        return


def write_back(fd: int, offset: int, length: int) -> None:
    """Start writing a part of a file to the disk, so that the sync at the end finds little to do."""
    sync_file_range = _libc("sync_file_range", ctypes.c_int, _LONG, _LONG, ctypes.c_uint)
    if sync_file_range is not None:
        sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def will_read(fd: int, offset: int, length: int) -> None:
    """Start reading a part of a file from the disk, for a read that comes soon."""
    if hasattr(os, "posix_fadvise") and length > 0:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
