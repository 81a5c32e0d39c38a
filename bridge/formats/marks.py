"""Whether files are still those that were opened: their inode, size and time of change.

A checkpoint may be pruned, resaved or fetched again while it is converted. What was read is then
of two checkpoints, and no checksum of the output would tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bridge.errors import Problem

Mark = tuple[int, int, int, int]
"""Device, inode, bytes, and time of the last change in nanoseconds."""

FIX = "let whatever writes it end, and convert again"


def mark(paths: Iterable[Path]) -> dict[str, Mark]:
    """Files as they are now; symlinks are followed. Those that are not there are left out."""
    found = {}
    for path in paths:
        try:
            state = os.stat(path)
        except FileNotFoundError:
            continue
        found[str(path)] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    return found


def changed(marks: Mapping[str, Mark]) -> list[Problem]:
    """The files that are not as they were, in one problem."""
    now = mark(map(Path, marks))
    wrong = [path for path, was in marks.items() if now.get(path) != was]
    if not wrong:
        return []
    what = "changed" if wrong[0] in now else "was removed"
    more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
    return [Problem(f"{wrong[0]} {what} while it was read{more}", FIX)]
