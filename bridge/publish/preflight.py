"""What forbids writing to a destination, found before anything is read."""

from __future__ import annotations

import os
import shutil
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from bridge.display import size
from bridge.errors import Problem
from bridge.publish.atomic import lock_file, replaceable
from bridge.publish.lock import check_lock
from bridge.publish.record import RECORD


def check_apart(destination: Path, source: Path | None) -> list[Problem]:
    """Whether an output and what it is made from are one, or lie inside each other.

    Directories are compared by what they are, not by name: a bind mount, a hard link or another
    case of the same name is the same directory.
    """
    if source is None:
        return []
    real, whence = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    if real == whence or whence in real.parents or _same(whence, (real, *real.parents)):
        return [Problem(f"{destination} lies inside the source {source}", "name an output outside of it")]
    if real in whence.parents or _same(real, whence.parents):
        return [Problem(f"the source {source} lies inside {destination}", "name an output beside it")]
    return []


def check_kept(destination: Path, files: Iterable[str | Path]) -> list[Problem]:
    """Source files that would go with the old output: symlinks may lead there."""
    inside = [file for file in files if _same(destination, Path(os.path.realpath(file)).parents)]
    if not inside:
        return []
    return [
        Problem(
            f"{destination} holds {len(inside)} of the source's files (the first: {inside[0]})",
            "name an output beside it",
        )
    ]


def _same(path: Path, others: Iterable[Path]) -> bool:
    """Whether one of the others is this directory."""
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


def check_destination(destination: Path, source: Path | None, *, overwrite: bool) -> list[Problem]:
    """What forbids writing to ``destination``, before anything is read."""
    if "\0" in str(destination) or destination.name in ("", ".."):
        return [Problem(f"{destination} does not name a directory to make", "give it a name")]
    problems = check_apart(destination, source)
    existing = destination.parent
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if long := _too_long(destination, existing):
        return [*problems, long]
    problems += check_lock(lock_file(destination), destination)
    if os.path.lexists(destination):
        if not overwrite:
            problems.append(
                Problem(f"{destination} exists", "name another output, or add --overwrite to replace it")
            )
        elif (kind := _kind(destination)) != "a directory":
            problems.append(Problem(f"{destination} exists and is {kind}", "name another output"))
        elif not os.access(destination, os.R_OK | os.X_OK) or not replaceable(destination):
            problems.append(
                Problem(
                    f"{destination} exists and was not written by bridge (it has no {RECORD})",
                    "remove it yourself, or name another output",
                )
            )
    if not existing.is_dir():
        kind = _kind(existing)
        what = "is not a directory" if kind == "a file" else f"is {kind}, not a directory"
        problems.append(Problem(f"{existing} {what}", "name an output in a directory"))
    elif not os.access(existing, os.W_OK | os.X_OK):
        what = "is on a file system mounted read-only" if _read_only(existing) else "cannot be written to"
        problems.append(Problem(f"{existing} {what}", "name another output, or change its mode"))
    return problems


def _too_long(destination: Path, existing: Path) -> Problem | None:
    try:
        longest = os.pathconf(existing, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = 255
    bytes_ = max(len(os.fsencode(part)) for part in destination.parts)
    if bytes_ > longest:
        return Problem(
            f"{destination}: a name in it has {bytes_} bytes, and the file system allows {longest}",
            "name a shorter one",
        )
    # the longest file of an output lies some way below it
    if len(os.fsencode(destination)) > 3800:
        return Problem(
            f"the output's path has {len(os.fsencode(destination))} bytes, more than systems allow for its files",
            "name a shorter one",
        )
    return None


def _kind(path: Path) -> str:
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        try:
            os.stat(path)
        except OSError:
            return f"a symlink to {os.readlink(path)}, which leads nowhere"
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
    """Files that would be one, where the file system takes no notice of case or of Unicode's forms."""
    if not _folds(destination):
        return []
    first: dict[str, str] = {}
    problems = []
    for name in names:
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            problems.append(
                Problem(
                    f"{destination}: {other} and {name} would be one file there",
                    "rename one in the source, or name an output on a file system that knows case",
                )
            )
    return problems


def _folds(destination: Path) -> bool:
    """Whether the directory that will hold it goes by several names that differ by case."""
    path = destination.parent
    while not path.exists():
        path = path.parent
    named = next((p for p in (path, *path.parents) if p.name.swapcase() != p.name), None)
    return named is not None and _same(named, [named.with_name(named.name.swapcase())])


def check_space(destination: Path, needed: int) -> list[Problem]:
    """Whether the file system of ``destination`` has room for the output, the old one staying."""
    existing = destination.parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    return [
        Problem(
            f"{destination} needs {size(needed)}, and {size(free)} are free there",
            "free some space, name an output elsewhere, or add --dtype bfloat16",
        )
    ]
