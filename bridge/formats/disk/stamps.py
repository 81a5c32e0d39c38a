"""Noticing that a source changed while it was read: training prunes and overwrites steps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bridge.errors import Problem

Stamp = tuple[int, int, int, int]
"""Device, inode, bytes, and time of the last change in ns."""


def take(files: Iterable[Path]) -> dict[str, Stamp]:
    """The stamp of each file that is there, through links."""
    found = {}
    for file in files:
        if (now := _stamp(file)) is not None:
            found[str(file)] = now
    return found


def changed(stamps: Mapping[str, Stamp]) -> list[Problem]:
    """The files that are no longer what they were."""
    problems = []
    for file, then in stamps.items():
        now = _stamp(file)
        if now != then:
            what = "was removed" if now is None else "changed"
            problems.append(
                Problem(f"{file} {what} while it was read", "wait until nothing writes there, and run again")
            )
    return problems


def _stamp(file: str | Path) -> Stamp | None:
    try:
        state = os.stat(file)
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
