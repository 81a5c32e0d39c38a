"""Detection of a source that changes while it is read: training prunes and overwrites steps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bridge.errors import Problem

Stamp = tuple[int, int, int, int]
"""Device, inode, size in bytes, and modification time in ns."""


def take_stamps(files: Iterable[Path]) -> dict[str, Stamp]:
    """The stamps of the files that exist, symlinks followed."""
    stamps = {}
    for file in files:
        if (now := _stamp(file)) is not None:
            stamps[str(file)] = now
    return stamps


def changed_files(stamps: Mapping[str, Stamp]) -> list[Problem]:
    """A problem for each file that has changed since its stamp was taken."""
    problems = []
    for file, then in stamps.items():
        now = _stamp(file)
        if now != then:
            change = "was removed" if now is None else "changed"
            problems.append(
                Problem(
                    f"{file} {change} while it was read", "wait until nothing writes there, and run again"
                )
            )
    return problems


def _stamp(file: str | Path) -> Stamp | None:
    try:
        state = os.stat(file)
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
