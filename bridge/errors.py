"""What bridge says when it refuses: one line of cause, then the flag or step that fixes it.

Every refusal is a :class:`Refusal`. It may carry several :class:`Problem`\\ s, so that a user
sees all of them at once. Nothing has been written when one is raised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One cause, in one line, and what the user can do about it."""

    cause: str
    fix: str

    def __str__(self) -> str:
        return f"{self.cause}\n  fix: {self.fix}"


class Refusal(Exception):
    """A request that bridge does not carry out. ``problems`` is never empty."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class SourceRefused(Refusal):
    """The source cannot be read as a checkpoint: wrong directory, unfinished, damaged."""


class CheckpointRefused(Refusal):
    """The source is readable, but its leaves are not those of a model bridge knows."""


class RouteRefused(Refusal):
    """No converter, or no chain of them, leads from the source's state to the one asked for."""


class OutputRefused(Refusal):
    """The destination exists, lies inside the source, or cannot be written."""


class ValueRefused(Refusal):
    """A weight is not finite, or does not fit the dtype it should be written in."""


class ProofFailed(Refusal):
    """An output was written and does not mean what it should; it was not published."""


class PluginRefused(Refusal):
    """A registered adapter or format cannot be loaded."""


def refuse_if(problems: Iterable[Problem], kind: type[Refusal]) -> None:
    """Raise ``kind`` with every problem, in the order found, unless there are none."""
    found = tuple(problems)
    if found:
        raise kind(*found)
