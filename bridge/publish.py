"""Outputs that appear whole or not at all.

A directory is built beside its destination under a private name, synced, and renamed. An output
that is overwritten stands until the new one is whole: the two are exchanged, then the old goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from bridge.errors import OutputRefused, Problem

RECORD = "bridge.json"

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2


def check_apart(destination: Path, source: Path | None) -> list[Problem]:
    """Whether an output and what it is made from lie inside each other."""
    if source is None:
        return []
    real, whence = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    if real == whence or whence in real.parents:
        return [Problem(f"{destination} lies inside the source {source}", "name an output outside of it")]
    if real in whence.parents:
        return [Problem(f"the source {source} lies inside {destination}", "name an output beside it")]
    return []


def check_destination(destination: Path, source: Path | None, *, overwrite: bool) -> list[Problem]:
    """What forbids writing to ``destination``, before anything is read."""
    problems = check_apart(destination, source)
    if os.path.lexists(destination):
        if not overwrite:
            problems.append(
                Problem(f"{destination} exists", "name another output, or add --overwrite to replace it")
            )
        elif not _replaceable(destination):
            problems.append(
                Problem(
                    f"{destination} exists and was not written by bridge (it has no {RECORD})",
                    "remove it yourself, or name another output",
                )
            )
    if max(len(os.fsencode(part)) for part in destination.parts) > 255:
        problems.append(Problem(f"{destination}: a name in it has more than 255 bytes", "name a shorter one"))
    existing = destination.parent
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        problems.append(Problem(f"{existing} is not a directory", "name an output in a directory"))
    elif not os.access(existing, os.W_OK | os.X_OK):
        problems.append(
            Problem(f"{existing} cannot be written to", "name another output, or change its mode")
        )
    return problems


def _replaceable(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and ((path / RECORD).is_file() or not any(path.iterdir()))


def check_space(destination: Path, needed: int) -> list[Problem]:
    """Whether the file system of ``destination`` has room for the output."""
    existing = destination.parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    return [
        Problem(
            f"{destination} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there",
            "free some space, name an output elsewhere, or add --dtype bfloat16",
        )
    ]


@contextlib.contextmanager
def publishing(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a private directory beside ``destination``; rename it there when the block ends well.

    On any exception the private directory is removed and nothing else has changed.

    Raises:
        OutputRefused: the destination has come to exist meanwhile.
    """
    made: list[Path] = []
    private = destination.parent / f".{destination.name[:40]}.bridge-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _make_parents(destination.parent, made)
        private.mkdir()
        yield private
        _sync_tree(private)
        _rename(private, destination, overwrite=overwrite)
        _sync(destination.parent)
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        for directory in reversed(made):
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _make_parents(directory: Path, made: list[Path]) -> None:
    """Create a directory and its parents; adds those that it made to ``made``, outermost first."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir()
        made.append(path)


def _rename(private: Path, destination: Path, *, overwrite: bool) -> None:
    try:
        if not os.path.lexists(destination):
            _renameat2(private, destination, _NOREPLACE)
        elif overwrite and _replaceable(destination):
            _renameat2(private, destination, _EXCHANGE)
            shutil.rmtree(private)
        else:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    except FileExistsError as error:
        raise OutputRefused(
            Problem(f"{destination} came to exist while bridge was running", "name another output")
        ) from error


def _renameat2(old: Path, new: Path, flags: int) -> None:
    """Linux's rename without clobbering, or with exchange; plain renames where it is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(new))
    if flags == _EXCHANGE:
        aside = old.with_name(old.name + "-old")
        new.rename(aside)
        old.rename(new)
        aside.rename(old)
    else:
        # onto an empty directory rename succeeds, which is the one case this cannot tell
        old.rename(new)


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
