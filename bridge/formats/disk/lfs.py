"""Git LFS pointers: short texts in place of files that were not fetched."""

from __future__ import annotations

from bridge.display import counted
from bridge.errors import Problem

POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(start: bytes) -> bool:
    """Whether a file with these first bytes is a pointer."""
    return start.startswith(POINTER)


def pointer_problem(first: object, count: int = 1) -> Problem:
    """The problem of ``count`` pointers, of which the first is named."""
    which = f"{first} is a git-lfs pointer"
    if count > 1:
        which = f"{first} and {counted(count - 1, 'more file')} are git-lfs pointers"
    return Problem(f"{which}, not data", "run `git lfs pull` in the repository that the checkpoint came from")
