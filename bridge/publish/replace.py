"""What ``--overwrite`` may replace, and how an old output is removed: only files that bridge wrote ever go.

The record of an output lists every file in it. A directory whose record is missing, is not as bridge
wrote it, or does not account for a file, is somebody's work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from bridge.display import counted
from bridge.errors import Problem, Refusal
from bridge.formats.contract import formats
from bridge.formats.disk.location import Location
from bridge.publish.record import RECORD, check_record, files_in, own_record
from bridge.publish.rename import list_names

#: foreign files named in a message
SHOWN = 4
ELSEWHERE = "move it elsewhere, or choose another output"


def accounting_problems(directory: Path, name: Path | None = None) -> list[Problem]:
    """Why a directory may not be replaced, by the names in it alone; nothing if it is empty.

    Args:
        directory: an output of bridge, perhaps.
        name: what messages call it.
    """
    name = name or directory
    try:
        if not any(directory.iterdir()):
            return []
        if not (directory / RECORD).is_file():
            return [Problem(f"{name} exists and was not written by bridge (no {RECORD})", ELSEWHERE)]
        record = None if (directory / RECORD).is_symlink() else own_record(Location(str(directory)))
        if record is None:
            cause = f"{name} exists and its {RECORD} is not as bridge writes it"
            return [Problem(cause, ELSEWHERE)]
        foreign = sorted(_foreign(directory, record))
    except OSError as error:
        return [Problem(f"{name} exists and cannot be looked through: {error.strerror}", ELSEWHERE)]
    except Refusal as refused:
        return list(refused.problems)
    if not foreign:
        return []
    more = f", and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
    return [
        Problem(
            f"{name} exists and contains {counted(len(foreign), 'file')} that bridge did not write: "
            f"{', '.join(foreign[:SHOWN])}{more}",
            f"move {'it' if len(foreign) == 1 else 'them'} elsewhere, or choose another output",
        )
    ]


def replacement_problems(directory: Path) -> list[Problem]:
    """Why ``--overwrite`` may not replace a directory, by the names and the contents of its files.

    The files beside the weights must be as they were written. So must the weights: they are read only
    where they are newer than the record, which is the last file of an output to be written.
    """
    if problems := accounting_problems(directory):
        return problems
    changed: list[str] = []
    try:
        for place, record in _outputs(directory):
            written = os.lstat(place / RECORD).st_mtime_ns
            changed += [
                str((place / name).relative_to(directory))
                for name, checksum in record["files"].items()
                if (place / name).is_file()
                and xxhash.xxh3_128((place / name).read_bytes()).hexdigest() != checksum
            ]
            container = [place / name for name in record["container"] if (place / name).is_file()]
            newer = [file for file in container if file.stat().st_mtime_ns > written]
            if newer and not _weights_match(place):
                changed += [str(file.relative_to(directory)) for file in newer]
    except OSError as error:
        return [Problem(f"{error.filename or directory}: {error.strerror}", ELSEWHERE)]
    return [
        Problem(
            f"{directory} exists and {name} in it has changed since bridge wrote it",
            "move the directory elsewhere, or choose another output",
        )
        for name in changed
    ]


def accounted_files(directory: Path) -> list[Path]:
    """Every file of an output and of the outputs nested in it, by their records."""
    with contextlib.suppress(Refusal):
        return [
            place / name
            for place, record in _outputs(directory)
            for name in (*record["files"], *record["container"], RECORD)
        ]
    return []


def remove_output(directory: Path) -> str:
    """Remove an old output, file by file of its record, which goes last; a note if anything stays."""
    with contextlib.suppress(OSError, Refusal):
        for place, record in reversed(list(_outputs(directory))):
            for name in (*record["files"], *record["container"]):
                with contextlib.suppress(OSError):
                    (place / name).unlink()
            for where in record["outputs"]:
                # without a record, it is one that a killed run had begun, or begun to remove
                if not (place / where / RECORD).exists():
                    remove_all(place / where)
            _remove_empty(place, keep=place)
            if list_names(place) == [RECORD]:
                with contextlib.suppress(OSError):
                    (place / RECORD).unlink()
            _remove_empty(place)
    _remove_empty(directory)
    return _left_over(directory)


def remove_all(path: Path) -> None:
    """``shutil.rmtree`` with one descriptor at a time, as few may be left."""
    for name in list_names(path):
        inner = path / name
        if inner.is_dir() and not inner.is_symlink():
            remove_all(inner)
        else:
            with contextlib.suppress(OSError):
                inner.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def _left_over(path: Path) -> str:
    if not os.path.lexists(path):
        return ""
    with contextlib.suppress(OSError, Refusal):
        record = own_record(Location(str(path)))
        if foreign := files_in(path) if record is None else _foreign(path, record):
            return f"kept {path}: bridge did not write {', '.join(sorted(foreign)[:SHOWN])} in it"
    return f"could not remove {path}: it is left over, and safe to remove"


def _remove_empty(path: Path, keep: Path | None = None) -> None:
    """Remove the empty directories below a path, and itself."""
    for name in list_names(path):
        inner = path / name
        if inner.is_dir() and not inner.is_symlink():
            _remove_empty(inner, keep)
    if path != keep:
        with contextlib.suppress(OSError):
            path.rmdir()


def _outputs(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A directory and the outputs nested in it, each with the record bridge wrote."""
    record = own_record(Location(str(directory)))
    if record is not None:
        yield directory, record
        for where in record["outputs"]:
            yield from _outputs(directory / where)


def _foreign(directory: Path, record: dict[str, Any]) -> set[str]:
    """Files of an output that no record accounts for, by their relative paths. Raises OSError."""
    listed = {*record["files"], *record["container"]}
    foreign = files_in(directory, record["outputs"]) - listed
    foreign |= {name for name in listed if (directory / name).is_symlink()}
    for where in record["outputs"]:
        inner = directory / where
        if not os.path.lexists(inner):
            continue
        within = None if inner.is_symlink() else own_record(Location(str(inner)))
        if inner.is_symlink() or not inner.is_dir():
            foreign.add(where)
        elif within is not None:
            foreign |= {f"{where}/{name}" for name in _foreign(inner, within)}
        else:
            foreign |= {f"{where}/{name}" for name in files_in(inner)}
            foreign |= {f"{where}/{RECORD}"} if os.path.lexists(inner / RECORD) else set()
    return foreign


def _weights_match(place: Path) -> bool:
    """Whether every tensor of an output has its recorded checksum."""
    location = Location(str(place))
    try:
        source = next(known for known in formats() if known.claims(location)).open(location)
        return not check_record(source)[1]
    except (Refusal, StopIteration):
        return False
