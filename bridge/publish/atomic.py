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
from collections.abc import Iterator, Mapping
from pathlib import Path

from bridge.errors import OutputRefused, Problem, Refusal, refuse_if, system_problem
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import Stamp, changed_files, take_stamps
from bridge.publish.lock import locked
from bridge.publish.record import own_record
from bridge.publish.rename import ASIDE, exchange, list_names, place, sync_directory, sync_tree
from bridge.publish.replace import accounted_files, accounting_problems, remove_all, remove_output


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
            old = take_stamps(accounted_files(destination)) if overwrite else {}
            with _private(destination, notes) as private:
                yield private
                sync_tree(private)
                _put(private, destination, overwrite=overwrite, old=old)
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
            notes.append(_remove_leftover(path) or f"removed {path}, left over from a killed run (pid {pid})")
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
        if identity is not None and os.path.lexists(destination) and _is(destination, identity):
            error.add_note(_is_written(destination))
            with contextlib.suppress(OSError):
                sync_directory(destination.parent)
        raise
    finally:
        os.close(spare)
        # once exchanged, the old output has its name
        ours = identity is not None and os.path.lexists(private) and _is(private, identity)
        if note := _remove(private) if ours else remove_output(private):
            notes.append(note)


def _is(path: Path, identity: os.stat_result) -> bool:
    return os.path.samestat(identity, os.lstat(path))


def _remove(path: Path) -> str:
    """Remove what this run began to write; a note if that fails."""
    remove_all(path)
    return f"could not remove {path}: it is left over, and safe to remove" if os.path.lexists(path) else ""


def _remove_leftover(path: Path) -> str:
    """Remove what a killed run left: an old output it had replaced, or a new one it had begun."""
    with contextlib.suppress(Refusal):
        if own_record(Location(str(path))) is not None:
            return remove_output(path)
    return _remove(path)


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


def _put(private: Path, destination: Path, *, overwrite: bool, old: Mapping[str, Stamp]) -> None:
    """Rename, and sync; undone if the sync fails, or a file came into the old output meanwhile.

    Args:
        private: the new output.
        destination: its place.
        overwrite: exchange it with an old output.
        old: the files of the old output as they were at the beginning.
    """
    replaces = os.path.lexists(destination)
    if replaces:
        if not overwrite or destination.is_symlink() or not destination.is_dir():
            raise _created_meanwhile(destination)
        refuse_if([*accounting_problems(destination), *_used(destination, old)], OutputRefused)
    try:
        (exchange if replaces else place)(private, destination)
    except FileExistsError as error:
        raise _created_meanwhile(destination) from error
    try:
        # what is opened by its path from here on is the new output
        if replaces:
            refuse_if(accounting_problems(private, destination), OutputRefused)
        sync_directory(destination.parent)
    except (OSError, Refusal):
        # the old output has not been deleted yet
        if replaces:
            exchange(private, destination)
        else:
            place(destination, private)
        raise


def _used(destination: Path, old: Mapping[str, Stamp]) -> list[Problem]:
    """A problem if files of the old output were written to while the new one was made."""
    return [
        Problem(f"{changed.cause}; it would have been replaced", "choose another output")
        for changed in changed_files({file: then for file, then in old.items() if os.path.lexists(file)})[:1]
        if os.path.lexists(destination)
    ]


def _is_written(destination: Path) -> str:
    return f"{destination} was written completely"


def _created_meanwhile(destination: Path) -> OutputRefused:
    return OutputRefused(
        Problem(f"{destination} was created while bridge was running", "choose another output")
    )
