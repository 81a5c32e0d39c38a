"""Checks of a destination before anything is read."""

from __future__ import annotations

import os
import shutil
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from bridge.display import byte_size, counted
from bridge.errors import Problem
from bridge.publish.atomic import lock_file
from bridge.publish.lock import check_lock
from bridge.publish.replace import replacement_problems


def destination_at(path: str | Path) -> Path:
    """The absolute path of an output, from a user's."""
    destination = Path(path).expanduser().absolute()
    if ".." not in destination.parent.parts:
        return destination
    # `a/../out` needs no `a`, which would be made for it
    return Path(os.path.realpath(destination.parent), destination.name)


def check_apart(destination: Path, *sources: Path | None) -> list[Problem]:
    """Check that output and source are not the same directory, nor one inside the other.

    Directories are compared by inode, not by name: a bind mount, a symlink or another case of a name
    is the same directory.

    Args:
        destination: the output.
        sources: paths of the source, as opened and as named: an output inside a directory of steps would be
            taken for part of it.
    """
    return next((problems for source in sources if (problems := _apart(destination, source))), [])


def _apart(destination: Path, source: Path | None) -> list[Problem]:
    if source is None:
        return []
    output, read = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    if output == read or read in output.parents or _same(read, (output, *output.parents)):
        return [Problem(f"{destination} is inside the source {source}", "choose an output outside it")]
    if output in read.parents or _same(output, read.parents):
        return [Problem(f"the source {source} is inside {destination}", "choose an output outside it")]
    return []


def check_kept(destination: Path, files: Iterable[str | Path]) -> list[Problem]:
    """Check that no source file, symlinks resolved, would be deleted with the old output."""
    inside = [file for file in files if _same(destination, Path(os.path.realpath(file)).parents)]
    if not inside:
        return []
    return [
        Problem(
            f"{destination} contains {counted(len(inside), 'file')} of the source (the first: {inside[0]})",
            "choose another output",
        )
    ]


def _same(path: Path, others: Iterable[Path]) -> bool:
    """Whether one of the other paths is this directory."""
    try:
        state = os.stat(path)
    except OSError:
        return False
    for other in others:
        try:
            if os.path.samestat(state, os.stat(other)):
                return True
        except OSError:
            continue
    return False


def check_destination(destination: Path, *sources: Path | None, overwrite: bool) -> list[Problem]:
    """Check that ``destination`` can be created, or replaced with ``overwrite``, apart from ``sources``."""
    if "\0" in str(destination) or destination.name in ("", ".."):
        return [Problem(f"{destination} is not a valid path for a directory", "choose another output")]
    problems = check_apart(destination, *sources)
    existing = destination.parent
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if long := _too_long(destination, existing):
        return [*problems, long]
    problems += check_lock(lock_file(destination), destination)
    if os.path.lexists(destination):
        if not overwrite:
            problems.append(
                Problem(f"{destination} exists", "choose another output, or add --overwrite to replace it")
            )
        elif (kind := _kind(destination)) != "a directory":
            problems.append(Problem(f"{destination} exists and is {kind}", "choose another output"))
        else:
            problems += replacement_problems(destination)
    if not existing.is_dir():
        kind = _kind(existing)
        what = "is not a directory" if kind == "a file" else f"is {kind}, not a directory"
        problems.append(Problem(f"{existing} {what}", "choose an output in a directory"))
    elif not os.access(existing, os.W_OK | os.X_OK):
        what = "is on a read-only file system" if _read_only(existing) else "is not writable"
        problems.append(Problem(f"{existing} {what}", "choose another output, or make it writable"))
    return problems


def _too_long(destination: Path, existing: Path) -> Problem | None:
    try:
        longest = os.pathconf(existing, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = 255
    bytes_ = max(len(os.fsencode(part)) for part in destination.parts)
    if bytes_ > longest:
        return Problem(
            f"{destination}: a name of {bytes_} bytes exceeds the {longest} that the file system allows",
            "choose a shorter name",
        )
    # PATH_MAX is 4096, and the files of an output have longer paths
    if len(os.fsencode(destination)) > 3800:
        return Problem(
            f"the output path has {len(os.fsencode(destination))} bytes, too many for the paths of its files",
            "choose a shorter path",
        )
    return None


def _kind(path: Path) -> str:
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        try:
            os.stat(path)
        except OSError:
            return f"a broken symlink to {os.readlink(path)}"
        return f"a symlink to {os.readlink(path)}"
    for test, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "a device"


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def check_twins(destination: Path, names: Iterable[str]) -> list[Problem]:
    """Check for names that a case- or normalisation-insensitive file system cannot tell apart."""
    if not _is_case_insensitive(destination):
        return []
    first: dict[str, str] = {}
    problems = []
    for name in names:
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            problems.append(
                Problem(
                    f"{destination}: {other} and {name} would be the same file on this file system",
                    "rename one in the source, or choose an output on a case-sensitive file system",
                )
            )
    return problems


def _is_case_insensitive(destination: Path) -> bool:
    """Whether the destination's directory can be reached by a name in another case."""
    path = destination.parent
    while not path.exists():
        path = path.parent
    cased = next((p for p in (path, *path.parents) if p.name.swapcase() != p.name), None)
    return cased is not None and _same(cased, [cased.with_name(cased.name.swapcase())])


def check_space(destination: Path, needed: int) -> list[Problem]:
    """Check the free space for the output, which is complete before an old one is deleted."""
    existing = destination.parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    return [
        Problem(
            f"{destination} needs {byte_size(needed)}, but only {byte_size(free)} are free",
            "free some space, choose an output on another disk, or add --dtype bfloat16",
        )
    ]
