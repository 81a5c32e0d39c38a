"""From the directory that people have at hand to the one with the weights: runs, steps, a hub's cache.

A hub's cache has for each repository ``refs/main`` (the name of a snapshot), ``snapshots/`` and
``blobs/`` (huggingface_hub, file_download.py). Trainers write steps named by their number; which
directory of a run or a step the weights are in, families declare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from bridge.display import printable
from bridge.errors import Problem, SourceRefused
from bridge.formats.disk.location import Location, is_safe_path
from bridge.rules.family import families

SNAPSHOTS, REFS = "snapshots", "refs"
#: bytes of a ref: the name of a commit
MAX_REF = 1 << 10
#: a run, its checkpoints, a step, the weights in it
MAX_DEPTH = 5

_STEP = re.compile(r"(?:(?:checkpoint|ckpt|step|iter|epoch)[-_])?(?P<number>[0-9]{1,19})")

Claimed = Callable[[Location], bool]
"""Whether a format recognizes a location."""


def find(location: Location, claimed: Claimed) -> tuple[Location, tuple[str, ...]]:
    """The location that a format recognizes at or below a path, and notes about the choices on the way.

    Where there is none, the path itself.

    Raises:
        SourceRefused: a hub's cache has several snapshots and does not say which is current.
    """
    found = _find(location, claimed, MAX_DEPTH)
    return (location, ()) if found is None else (found[0].entered(), found[1])


def _find(location: Location, claimed: Claimed, depth: int) -> tuple[Location, tuple[str, ...]] | None:
    if claimed(location):
        return location, ()
    if depth == 0:
        return None
    names = location.names()
    if SNAPSHOTS in names:
        return _snapshot(location, claimed, depth)
    for name in (name for family in families() for name in family.directories):
        inner = _find(location / name, claimed, depth - 1) if name in names else None
        if inner is not None:
            return inner[0], inner[1] or (f"using {_below(inner[0], location)} of {location}",)
    return _newest(location, names, claimed, depth)


def _newest(
    location: Location, names: list[str], claimed: Claimed, depth: int
) -> tuple[Location, tuple[str, ...]] | None:
    """The newest step with weights in it."""
    steps = sorted(steps_in(names), reverse=True)
    for index, (_, name) in enumerate(steps):
        inner = _find(location / name, claimed, depth - 1)
        if inner is not None:
            note = f"using {_below(inner[0], location)}, the newest of {len(steps) - index} in {location}"
            if skipped := [skipped for _, skipped in steps[:index]]:
                note += f" (without weights: {', '.join(skipped)})"
            return inner[0], (printable(note),)
    return None


def steps_in(names: list[str]) -> Iterator[tuple[int, str]]:
    """Directories named as steps, with their numbers: ``000300``, ``checkpoint-300``, ``step_300``.

    Not ``run_2``: the newest of several runs is another model, and not ``tmp_3``, which was not finished.
    """
    for name in names:
        step = _STEP.fullmatch(name)
        if step is not None:
            yield int(step["number"]), name


def _snapshot(location: Location, claimed: Claimed, depth: int) -> tuple[Location, tuple[str, ...]] | None:
    """The current snapshot of a repository in a hub's cache."""
    snapshots = (location / SNAPSHOTS).names()
    ref = (location / REFS / "main").read_bytes(MAX_REF)
    current = None if ref is None else ref.decode(errors="replace").strip()
    if current is None and len(snapshots) == 1:
        current = snapshots[0]
    if current is None or current not in snapshots or not is_safe_path(current):
        what = f"names {current}, which is not there" if current else "is missing"
        raise SourceRefused(
            Problem(
                f"{location / REFS / 'main'} {what}; there are {', '.join(snapshots) or 'no snapshots'}",
                f"give one of them: {location / SNAPSHOTS / (snapshots[0] if snapshots else 'COMMIT')}",
            )
        )
    inner = _find(location / SNAPSHOTS / current, claimed, depth - 1)
    if inner is None:
        return None
    return inner[0], (f"using {_below(inner[0], location)}, the current snapshot of {location.name}",)


def _below(inner: Location, outer: Location) -> str:
    return str(inner).removeprefix(f"{str(outer).rstrip('/')}/")
