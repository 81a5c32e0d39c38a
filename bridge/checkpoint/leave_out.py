"""Arrays that a user leaves out: none that the model needs, and none that would be lost unnoticed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from bridge.arrays import Spec
from bridge.checkpoint.opening import Opening
from bridge.errors import CheckpointRefused, Problem, refuse_if
from bridge.formats.contract import Source
from bridge.formats.view import View
from bridge.rules.names import grouped


@dataclass(frozen=True)
class LeftOut:
    """What of a source is not read because the user says so."""

    arrays: Mapping[str, Spec] = field(default_factory=dict)
    patterns: frozenset[str] = frozenset()
    """The patterns that match any of them."""

    def __or__(self, other: LeftOut) -> LeftOut:
        return LeftOut({**self.arrays, **other.arrays}, self.patterns | other.patterns)


NOTHING = LeftOut()


def without(
    source: Source,
    patterns: Iterable[str],
    known: Callable[[str], str],
    plain: Mapping[str, str] | None = None,
) -> tuple[Source, LeftOut]:
    """A source without the arrays that patterns match.

    Args:
        source: whose names are matched.
        patterns: as in a shell.
        known: what an array of a name is to the model; empty for one that it does not have.
        plain: the name that messages give an array, where it is another, which is matched as well.

    Raises:
        CheckpointRefused: a pattern matches an array that is something to the model.
    """
    matched = {
        name: pattern
        for pattern in patterns
        for name in source.specs
        if any(fnmatchcase(each, pattern) for each in (name, (plain or {}).get(name, name)))
    }
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, pattern in matched.items():
        if what := known(name):
            kinds.setdefault((pattern, what), []).append(name)
    refuse_if(
        (
            Problem(
                f"{source.location}: --leave-out {pattern!r} matches {name}, which {what}",
                "give a pattern that matches only what the model does not have",
            )
            for (pattern, what), names in kinds.items()
            for name in grouped(names)
        ),
        CheckpointRefused,
    )
    if not matched:
        return source, NOTHING
    arrays = {name: source.specs[name] for name in matched}
    notes = [f"left out, as --leave-out says: {name}" for name in grouped(matched)]
    kept = {name: name for name in source.specs if name not in matched}
    return View.of(source, kept, *notes), LeftOut(arrays, frozenset(matched.values()))


def pattern_for(name: str) -> str:
    """The pattern that matches a name, and those that differ in its numbers alone where it is shortened."""
    return re.sub(r"\{[^{}]*\}", "*", re.sub(r"([\[?*])", r"[\1]", name))


def unmatched(opening: Opening, found: Iterable[LeftOut]) -> list[Problem]:
    """Patterns that match nothing in any checkpoint of a verb: a misspelled one would be ignored silently."""
    used = frozenset[str]().union(*(each.patterns for each in found))
    return [
        Problem(f"--leave-out {pattern!r} matches no array", "check its spelling, or leave it out")
        for pattern in opening.leave_out
        if pattern not in used
    ]
