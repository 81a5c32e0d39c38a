"""Refusals: one line of cause, then the flag or the step that fixes it.

Every refusal is a :class:`Refusal`. It carries one or several :class:`Problem`\\ s, so that a user
sees all of them at once. When one is raised, nothing has been written.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from bridge.display import printable

#: characters of a cause or a fix; only a crafted name makes one longer
MAX_LINE = 900
#: problems in one refusal; a foreign tree may have one in each of a million leaves
MAX_PROBLEMS = 200


@dataclass(frozen=True)
class Problem:
    """One cause, on one line, and what the user can do about it."""

    cause: str
    fix: str

    def __post_init__(self) -> None:
        # the names in them come from files
        object.__setattr__(self, "cause", _bounded(printable(self.cause[: MAX_LINE + 1])))
        object.__setattr__(self, "fix", _bounded(printable(self.fix[: MAX_LINE + 1])))

    def __str__(self) -> str:
        return f"{self.cause}\n  fix: {self.fix}"


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_LINE else text[:MAX_LINE] + "…"


class Refusal(Exception):
    """A request that bridge does not carry out. ``problems`` is never empty."""

    def __init__(self, *problems: Problem) -> None:
        if len(problems) > MAX_PROBLEMS + 1:
            more = Problem(f"and {len(problems) - MAX_PROBLEMS} more problems", "fix these first")
            problems = (*problems[:MAX_PROBLEMS], more)
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class SourceRefused(Refusal):
    """The source cannot be read as a checkpoint: wrong directory, unfinished, damaged."""


class CheckpointRefused(Refusal):
    """The source is readable, but its leaves are not those of a known model."""


class RouteRefused(Refusal):
    """No converter, or chain of converters, leads from the source's state to the requested one."""


class OutputRefused(Refusal):
    """The destination exists, lies inside the source, or cannot be written."""


class ValueRefused(Refusal):
    """A weight is not finite, or does not fit the dtype it would be written in."""


class ProofFailed(Refusal):
    """An output failed its proof, and was not published."""


class PluginRefused(Refusal):
    """A registered plugin, a model family or a format, cannot be loaded."""


#: what to do about an error of the operating system
_FIXES = {
    errno.ENOSPC: "free some space, or choose an output on another disk",
    errno.EDQUOT: "free some of your quota, or choose an output on another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f), or choose an output on another file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use --workers 1",
    errno.ENFILE: "the system has too many open files: close other programs and run again",
    errno.EACCES: "check the permissions of the path",
    errno.EPERM: "check the permissions of the path",
    errno.EROFS: "the file system is mounted read-only: choose a path on another",
    errno.EIO: "the disk or its connection is failing: check the system log before writing to it again",
    errno.ELOOP: "the path's symlinks form a loop: give the path without them",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOMEM: "use --workers 1, or a machine with more memory",
    errno.EXDEV: "choose another output, or move the old one elsewhere with mv, which copies it",
    errno.ESTALE: "remount the network file system",
}


def system_problem(error: OSError, where: object = None) -> Problem:
    """An error of the operating system, with its file; ``where`` stands in when it names none."""
    name = error.filename if error.filename is not None else where
    said = error.strerror or str(error) or type(error).__name__
    cause = said if name is None else f"{name}: {said}"
    return Problem(cause, _FIXES.get(error.errno or 0, "check the path and its file system, and run again"))


def reason(error: Exception) -> str:
    """What an exception says: a KeyError or TypeError, which nobody wrote for a reader, with its type."""
    return str(error) if isinstance(error, ValueError) else repr(error)


def refuse_if(problems: Iterable[Problem], kind: type[Refusal]) -> None:
    """Raise ``kind`` with every problem, in order, if there are any."""
    collected = tuple(problems)
    if collected:
        raise kind(*collected)
