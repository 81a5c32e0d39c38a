"""Putting a directory in its place in one step, and on disk: Linux's renames, and ``fsync``."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2

#: what kernels, file systems and sandboxes without renameat2's flags say
_WITHOUT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}
#: what file systems say that have nothing to sync in a directory, or directories one may not list
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}

#: name of an output that stands aside while the new one takes its place
ASIDE = "-old"


def place(private: Path, destination: Path) -> None:
    """Rename a directory to where nothing is. Raises FileExistsError, OSError."""
    if _renameat2(private, destination, _NOREPLACE):
        return
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination))
    # onto an empty directory that came to exist this instant it succeeds, which loses nothing
    private.rename(destination)


def exchange(private: Path, destination: Path) -> None:
    """Exchange two directories. Raises OSError; both are where they were then."""
    if _renameat2(private, destination, _EXCHANGE):
        return
    aside = private.with_name(private.name + ASIDE)
    try:
        destination.rename(aside)
        private.rename(destination)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(destination):
            aside.rename(destination)
        raise
    aside.rename(private)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Whether it was done; False where the system or the file system has no such thing."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _WITHOUT:
        return False
    raise OSError(code, os.strerror(code), str(new))


def sync_tree(directory: Path) -> None:
    """Bring everything below a directory to disk, itself last.

    Raises:
        OSError: it is not. Never to be tried again: the system forgets what it failed to write,
            and the next fsync would succeed.
    """
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(root, name))
        sync_directory(Path(root))


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to disk. Raises OSError."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)


def lists(path: Path) -> list[str]:
    """Names in a directory, sorted; none where it may not be listed."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(path))
    return []
