"""One run at a time on an output: an advisory lock on a file beside it.

The system lets go of the lock when its holder ends, however it ends, so that a lock file that
stayed behind locks nothing.
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

#: what file systems without locks say
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

TRIES = 3


@contextlib.contextmanager
def locked(path: Path, destination: Path) -> Iterator[bool]:
    """Hold the lock file ``path`` of ``destination``; it is removed afterwards.

    Yields:
        Whether it is held. Some network file systems have no locks.

    Raises:
        OutputRefused: another run holds it, with its process number.
        OSError: the file cannot be made.
    """
    fd, held = _acquire(path, destination)
    try:
        yield held
    finally:
        try:
            # while it is still locked: whoever opened this file before sees that it is gone
            if not held or _lies_at(fd, path):
                path.unlink(missing_ok=True)
        except OSError:
            pass  # a lock file that stays locks nothing
        finally:
            os.close(fd)


def check_lock(path: Path, destination: Path) -> list[Problem]:
    """Whether another run holds the lock now; it is not taken, and nothing is made."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return []
    try:
        # shared, and let go of at once: who takes it in this instant tries again
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return [_taken(fd, destination)]
    except OSError:
        return []
    finally:
        os.close(fd)
    return []


def _acquire(path: Path, destination: Path) -> tuple[int, bool]:
    while True:
        fd, made = _open(path)
        try:
            try:
                _lock(fd)
            except BlockingIOError:
                raise OutputRefused(_taken(fd, destination)) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    if made:
                        path.unlink()
                    raise
                return fd, False
            if _lies_at(fd, path):
                _sign(fd)
                return fd, True
        except BaseException:
            os.close(fd)
            raise
        # its last holder removed it between our opening and locking it
        os.close(fd)


def _lock(fd: int) -> None:
    """Raises BlockingIOError when it is held for longer than looking at it takes."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _taken(fd: int, destination: Path) -> Problem:
    return Problem(
        f"another bridge{_holder(fd)} is writing {destination}", "wait for it to end, or name another output"
    )


def _open(path: Path) -> tuple[int, bool]:
    """Open the lock file, and whether it was made for that. Never through a symlink."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with contextlib.suppress(FileExistsError):
        return os.open(path, flags | os.O_EXCL, 0o666), True
    return os.open(path, flags, 0o666), False


def _lies_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _sign(fd: int) -> None:
    """Say who holds it, for whom it keeps out. On a full disk the lock holds all the same."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _holder(fd: int) -> str:
    # the first line is the holder's; others may have been longer
    line = os.pread(fd, 300, 0).decode(errors="replace").partition("\n")[0]
    pid, _, host = line.partition(" ")
    if not pid.isdecimal():
        return ""
    return f" (pid {pid})" if host == socket.gethostname() else f" (pid {pid} on {host})"
