"""Outputs that appear whole or not at all.

A directory is built beside its destination under a private name, under a lock, brought to disk,
and renamed. An output that is overwritten stands until the new one is whole: the two are
exchanged, and when that is on disk the old one is deleted. What a killed run left behind is
recognised by its name and removed by the next run to the same destination.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path

from bridge.errors import OutputRefused, Problem, system_problem
from bridge.publish.lock import locked
from bridge.publish.record import RECORD
from bridge.publish.rename import ASIDE, exchange, lists, place, sync_directory, sync_tree


def replaceable(path: Path) -> bool:
    """Whether ``--overwrite`` may replace it: an output of bridge, or an empty directory."""
    return path.is_dir() and not path.is_symlink() and ((path / RECORD).is_file() or not any(path.iterdir()))


@contextlib.contextmanager
def publishing(destination: Path, *, overwrite: bool, notes: list[str] | None = None) -> Iterator[Path]:
    """Yield a private directory beside ``destination``; rename it there when the block ends well.

    On any exception the private directory is removed and nothing else has changed, unless the
    exception came when the output was in its place: then a note of the exception says so. A note
    of an interrupt says which it is.

    Args:
        destination: an absolute path.
        overwrite: replace what bridge has written there.
        notes: what was found left over and what was done about it is appended.

    Raises:
        OutputRefused: another run writes there, the destination has come to exist meanwhile, or
            the system refuses to write.
    """
    notes = [] if notes is None else notes
    made: list[Path] = []
    written = False
    try:
        _make_parents(destination.parent, made)
        with locked(lock_file(destination), destination) as alone:
            if alone:
                notes += sweep(destination)
            if os.path.lexists(destination) and not overwrite:
                raise _came_to_exist(destination)
            with _private(destination, notes) as private:
                yield private
                sync_tree(private)
                _put(private, destination, overwrite=overwrite)
            written = True
    except BaseException as error:
        for directory in reversed(made):
            with contextlib.suppress(OSError):
                directory.rmdir()
        if written:
            error.add_note(_is_written(destination))
        elif not isinstance(error, Exception) and not hasattr(error, "__notes__"):
            error.add_note("nothing was written")
        if isinstance(error, OSError) and error.errno is not None:
            refused = OutputRefused(system_problem(error, destination))
            for note in getattr(error, "__notes__", ()):
                refused.add_note(note)
            raise refused from error
        raise


def sweep(destination: Path) -> list[str]:
    """Remove what killed runs to this destination left beside it; says what.

    The lock must be held: without it no run can be told from one that was killed.
    """
    notes = []
    name = re.compile(re.escape(_prefix(destination)) + rf"(\d+)-[0-9a-f]{{8}}({ASIDE})?")
    for found in lists(destination.parent):
        match, path = name.fullmatch(found), destination.with_name(found)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        pid = int(match[1])
        if pid != os.getpid() and _alive(pid):
            notes.append(f"{path} is left over, or of a run on another machine: process {pid} is alive here")
        elif match[2] and not os.path.lexists(destination):
            # killed between the two renames that stand for an exchange
            path.rename(destination)
            sync_directory(destination.parent)
            notes.append(f"{destination} was set aside by a run that was killed (pid {pid}), and is back")
        else:
            notes.append(_remove(path) or f"removed {path}, left over from a run that was killed (pid {pid})")
    return notes


def lock_file(destination: Path) -> Path:
    """Where the lock of an output is while a run writes it."""
    return destination.with_name(f"{_prefix(destination)}lock")


def _prefix(destination: Path) -> str:
    """How names of the lock and of private directories begin; short, where the output's is long."""
    return f".{destination.name[:20]}.bridge-{zlib.crc32(os.fsencode(destination.name)):08x}-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _private(destination: Path, notes: list[str]) -> Iterator[Path]:
    """A directory beside the destination; what is under its name in the end is removed."""
    private = destination.with_name(f"{_prefix(destination)}{os.getpid()}-{secrets.token_hex(4)}")
    made: os.stat_result | None = None
    # for removing it, should descriptors have run out by then
    spare = os.open(os.devnull, os.O_RDONLY)
    try:
        private.mkdir()
        made = os.lstat(private)
        yield private
    except BaseException as error:
        if (
            made is not None
            and os.path.lexists(destination)
            and os.path.samestat(made, os.lstat(destination))
        ):
            error.add_note(_is_written(destination))
            with contextlib.suppress(OSError):
                sync_directory(destination.parent)
        raise
    finally:
        os.close(spare)
        if said := _remove(private):
            notes.append(said)


def _remove(path: Path) -> str:
    """Remove a directory; says so where it cannot be done."""
    _remove_all(path)
    return (
        f"{path} could not be removed: it is left over, and safe to remove" if os.path.lexists(path) else ""
    )


def _remove_all(path: Path) -> None:
    """As ``shutil.rmtree``, with one descriptor at a time: they may have run out."""
    for name in lists(path):
        inner = path / name
        if inner.is_dir() and not inner.is_symlink():
            _remove_all(inner)
        else:
            with contextlib.suppress(OSError):
                inner.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def _make_parents(directory: Path, made: list[Path]) -> None:
    """Create a directory and its parents; adds those that it made to ``made``, outermost first."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another run made it
            path.mkdir()
            made.append(path)
            sync_directory(path.parent)


def _put(private: Path, destination: Path, *, overwrite: bool) -> None:
    """Rename, and bring that to disk; undone where the disk fails."""
    replaces = os.path.lexists(destination)
    if replaces and not (overwrite and replaceable(destination)):
        raise _came_to_exist(destination)
    try:
        (exchange if replaces else place)(private, destination)
    except FileExistsError as error:
        raise _came_to_exist(destination) from error
    try:
        sync_directory(destination.parent)
    except OSError:
        # the old output has not been deleted yet
        if replaces:
            exchange(private, destination)
        else:
            place(destination, private)
        raise


def _is_written(destination: Path) -> str:
    return f"{destination} is written, and whole"


def _came_to_exist(destination: Path) -> OutputRefused:
    return OutputRefused(
        Problem(f"{destination} came to exist while bridge was running", "name another output")
    )
