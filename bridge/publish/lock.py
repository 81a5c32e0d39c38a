"""One run at a time per output: an advisory lock on a file beside it.

The system releases the lock when its process ends, however it ends, so a leftover lock file locks
nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from bridge.errors import OutputRefused, Problem

#: errors of file systems without locks
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

TRIES = 3


@contextlib.contextmanager
def locked(path: Path, destination: Path) -> Iterator[bool]:
    """Lock the file ``path`` for ``destination``; it is removed afterwards.

    Yields:
        Whether it is locked: some network file systems have no locks.

    Raises:
        OutputRefused: another run has locked it; the message gives its pid.
        OSError: the file cannot be created.
    """
    fd, is_locked = _acquire(path, destination)
    try:
        yield is_locked
    finally:
        try:
            # while still locked: another run that has opened the file notices its removal
            if not is_locked or _is_at(fd, path):
                path.unlink(missing_ok=True)
        except OSError:
            pass  # a leftover lock file locks nothing
        finally:
            os.close(fd)


def check_lock(path: Path, destination: Path) -> list[Problem]:
    """A problem if another run has the lock now. Neither locks nor creates anything."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return []
    try:
        # shared, and released at once: a run that locks at this moment retries
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return [_busy(fd, destination)]
    except OSError:
        return []
    finally:
        os.close(fd)
    return []


def _acquire(path: Path, destination: Path) -> tuple[int, bool]:
    while True:
        fd, created = _open(path)
        try:
            try:
                _lock(fd)
            except BlockingIOError:
                raise OutputRefused(_busy(fd, destination)) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    if created:
                        path.unlink()
                    raise
                return fd, False
            if _is_at(fd, path):
                _sign(fd)
                return fd, True
        except BaseException:
            os.close(fd)
            raise
        # removed by its last owner before we locked it
        os.close(fd)


def _lock(fd: int) -> None:
    """Lock, with retries: check_lock locks for a moment. Raises BlockingIOError."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _busy(fd: int, destination: Path) -> Problem:
    return Problem(
        f"another bridge process{_owner(fd)} is writing {destination}",
        "wait until it ends, or choose another output",
    )


def _open(path: Path) -> tuple[int, bool]:
    """Open the lock file, never through a symlink; and whether it was created."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with contextlib.suppress(FileExistsError):
        return os.open(path, flags | os.O_EXCL, 0o666), True
    return os.open(path, flags, 0o666), False


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _sign(fd: int) -> None:
    """Write our pid for the message of other runs. The lock works without, on a full disk."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _owner(fd: int) -> str:
    # the first line is the owner's; a longer, older one may follow
    line = os.pread(fd, 300, 0).decode(errors="replace").partition("\n")[0]
    pid, _, host = line.partition(" ")
    if not pid.isdecimal():
        return ""
    return f" (pid {pid})" if host == socket.gethostname() else f" (pid {pid} on {host})"
