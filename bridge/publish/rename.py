"""Atomic renames and exchanges of directories, and syncing them to disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2

#: errors of kernels, file systems and sandboxes without the flags of renameat2
_WITHOUT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}
#: errors of file systems that do not sync directories, and of unreadable directories
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}

#: suffix of an old output that was moved aside
ASIDE = "-old"


def place(private: Path, destination: Path) -> None:
    """Rename a directory to a new name. Raises FileExistsError, OSError."""
    if _renameat2(private, destination, _NOREPLACE):
        return
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination))
    # may replace an empty directory created just now, which loses nothing
    private.rename(destination)


def exchange(private: Path, destination: Path) -> None:
    """Exchange two directories. Raises OSError, and then both are in their old places."""
    try:
        _exchange(private, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # overlayfs moves no directory of a lower layer (redirect_dir), and one device is what both are on
        said = "cannot be replaced: it lies in a lower layer of an overlay, such as the image of a container"
        raise OSError(errno.EXDEV, said, str(destination)) from error


def _exchange(private: Path, destination: Path) -> None:
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
    """Rename with flags; False if the system or the file system does not support them."""
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
    """Sync everything below a directory to disk, the directory itself last.

    Raises:
        OSError: a write failed. Never retry: the system forgets what it failed to write, and the
            next fsync would succeed.
    """
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(root, name))
        sync_directory(Path(root))


def sync_directory(path: Path) -> None:
    """Sync the entries of a directory to disk. Raises OSError."""
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


def list_names(path: Path) -> list[str]:
    """Names in a directory, sorted; none if it cannot be listed."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(path))
    return []
