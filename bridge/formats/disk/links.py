"""Symlinks in a source: a file may be reached through one only where the source itself has it.

The content of what is read ends in an output, perhaps a published one, so a link must not bring in a
file from elsewhere. Two kinds are followed: those within the source, and those of a hub's cache,
whose snapshots consist of links into the ``blobs`` of the same repository (huggingface_hub,
file_download.py). The path that a user names may be a link: that is the user's choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from bridge.errors import Problem


def link_problem(path: str, home: str) -> Problem | None:
    """The problem of a file that a link brings into a source from elsewhere; None where there is none.

    Args:
        path: of the file, absolute.
        home: the directory that was named as the source; links above it, and itself, may lead anywhere.
    """
    if not _linked(path, home):
        return None
    real, inside = os.path.realpath(path), os.path.realpath(home)
    if os.path.commonpath([real, inside]) == inside or os.path.dirname(real) in _blobs(inside):
        return None
    return Problem(
        f"{path} is a symlink to {real}, outside the checkpoint",
        "put a copy of the file in the place of the link, if it belongs to the checkpoint",
    )


def link_problems(paths: Iterable[str], home: str) -> list[Problem]:
    """The problems of all files that links bring in. Looks at each directory once."""
    linked: dict[str, bool] = {}
    problems = []
    for path in paths:
        directory = os.path.dirname(path)
        if directory not in linked:
            linked[directory] = _linked(directory, home)
        problem = link_problem(path, home) if linked[directory] or os.path.islink(path) else None
        if problem is not None:
            problems.append(problem)
    return problems


def _linked(path: str, home: str) -> bool:
    """Whether a path, or a directory between it and ``home``, is a symlink."""
    while len(path) > len(home):
        if os.path.islink(path):
            return True
        path = os.path.dirname(path)
    return False


def _blobs(inside: str) -> list[str]:
    """Where the files of a hub's snapshot are, if ``inside`` is one or a directory in one."""
    places = []
    while (above := os.path.dirname(inside)) != inside:
        if os.path.basename(above) == "snapshots":
            places.append(os.path.join(os.path.dirname(above), "blobs"))
        inside = above
    return places
