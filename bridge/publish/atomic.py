"""Atomic publication of an output: it appears whole or not at all.

Under a lock, a directory is built beside its destination under a private name, synced to disk and
renamed. An output to be overwritten stays until the new one is complete: then the two are exchanged,
and once that is on disk the old one is deleted. The next run to the same destination recognises the
leftovers of a killed run by their names, and removes them.
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
from bridge.publish.rename import ASIDE, exchange, list_names, place, sync_directory, sync_tree


def replaceable(path: Path) -> bool:
    """Whether ``--overwrite`` may replace a path: an output of bridge, or an empty directory."""
    return path.is_dir() and not path.is_symlink() and ((path / RECORD).is_file() or not any(path.iterdir()))


@contextlib.contextmanager
def publishing(destination: Path, *, overwrite: bool, notes: list[str] | None = None) -> Iterator[Path]:
    """Yield a private directory beside ``destination``; rename it there if the block succeeds.

    On any exception the private directory is removed and nothing else has changed, unless the
    output was in place already: then a note on the exception says so. An interrupt always gets a
    note which of the two it is.

    Args:
        destination: an absolute path.
        overwrite: replace an earlier output of bridge.
        notes: what was done about leftovers of killed runs is appended.

    Raises:
        OutputRefused: another run is writing there, the destination was created meanwhile, or the
            system refuses to write.
    """
    notes = [] if notes is None else notes
    created: list[Path] = []
    written = False
    try:
        _make_parents(destination.parent, created)
        with locked(lock_file(destination), destination) as alone:
            if alone:
                notes += sweep(destination)
            if os.path.lexists(destination) and not overwrite:
                raise _created_meanwhile(destination)
            with _private(destination, notes) as private:
                yield private
                sync_tree(private)
                _put(private, destination, overwrite=overwrite)
            written = True
    except BaseException as error:
        for directory in reversed(created):
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
    """Remove what killed runs to this destination left beside it; the notes say what.

    The caller must own the lock: without it, leftovers look like a run in progress.
    """
    notes = []
    name = re.compile(re.escape(_prefix(destination)) + rf"(\d+)-[0-9a-f]{{8}}({ASIDE})?")
    for entry in list_names(destination.parent):
        match, path = name.fullmatch(entry), destination.with_name(entry)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        pid = int(match[1])
        if pid != os.getpid() and _alive(pid):
            notes.append(
                f"kept {path}: left over, or in use by another machine (process {pid} is running here)"
            )
        elif match[2] and not os.path.lexists(destination):
            # killed between the two renames of an emulated exchange
            path.rename(destination)
            sync_directory(destination.parent)
            notes.append(f"restored {destination}: a killed run (pid {pid}) had moved it aside")
        else:
            notes.append(_remove(path) or f"removed {path}, left over from a killed run (pid {pid})")
    return notes


def lock_file(destination: Path) -> Path:
    """The path of the lock of an output."""
    return destination.with_name(f"{_prefix(destination)}lock")


def _prefix(destination: Path) -> str:
    """The prefix of the names of lock and private directories; short even if the output's name is long."""
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
    """A directory beside the destination; whatever has its name in the end is removed."""
    private = destination.with_name(f"{_prefix(destination)}{os.getpid()}-{secrets.token_hex(4)}")
    identity: os.stat_result | None = None
    # a spare descriptor, to remove it even if all others are in use
    spare = os.open(os.devnull, os.O_RDONLY)
    try:
        private.mkdir()
        identity = os.lstat(private)
        yield private
    except BaseException as error:
        if (
            identity is not None
            and os.path.lexists(destination)
            and os.path.samestat(identity, os.lstat(destination))
        ):
            error.add_note(_is_written(destination))
            with contextlib.suppress(OSError):
                sync_directory(destination.parent)
        raise
    finally:
        os.close(spare)
        if note := _remove(private):
            notes.append(note)


def _remove(path: Path) -> str:
    """Remove a directory; a note if that fails."""
    _remove_all(path)
    return f"could not remove {path}: it is left over, and safe to remove" if os.path.lexists(path) else ""


def _remove_all(path: Path) -> None:
    """``shutil.rmtree`` with one descriptor at a time, as few may be left."""
    for name in list_names(path):
        inner = path / name
        if inner.is_dir() and not inner.is_symlink():
            _remove_all(inner)
        else:
            with contextlib.suppress(OSError):
                inner.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def _make_parents(directory: Path, created: list[Path]) -> None:
    """Create a directory and its parents; the new ones are appended to ``created``, outermost first."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # by another run
            path.mkdir()
            created.append(path)
            sync_directory(path.parent)


def _put(private: Path, destination: Path, *, overwrite: bool) -> None:
    """Rename, and sync; undone if the sync fails."""
    replaces = os.path.lexists(destination)
    if replaces and not (overwrite and replaceable(destination)):
        raise _created_meanwhile(destination)
    try:
        (exchange if replaces else place)(private, destination)
    except FileExistsError as error:
        raise _created_meanwhile(destination) from error
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
    return f"{destination} was written completely"


def _created_meanwhile(destination: Path) -> OutputRefused:
    return OutputRefused(
        Problem(f"{destination} was created while bridge was running", "choose another output")
    )
