"""What bridge says when it refuses: one line of cause, then the flag or step that fixes it.

Every refusal is a :class:`Refusal`. It may carry several :class:`Problem`\\ s, so that a user
sees all of them at once. Nothing has been written when one is raised.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

#: of a cause or a fix; what is longer was made to be
MAX_LINE = 900
#: problems that one refusal carries; a foreign tree may have a fault in each of a million leaves
MAX_PROBLEMS = 200


@dataclass(frozen=True)
class Problem:
    """One cause, in one line, and what the user can do about it."""

    cause: str
    fix: str

    def __post_init__(self) -> None:
        # names in them come from files
        object.__setattr__(self, "cause", _bounded(printable(self.cause[: MAX_LINE + 1])))
        object.__setattr__(self, "fix", _bounded(printable(self.fix[: MAX_LINE + 1])))

    def __str__(self) -> str:
        return f"{self.cause}\n  fix: {self.fix}"


def printable(text: str) -> str:
    """Text for one line of a terminal: a name may hold line breaks, escapes, or bytes of no encoding."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_LINE else text[:MAX_LINE] + "…"


class Refusal(Exception):
    """A request that bridge does not carry out. ``problems`` is never empty."""

    def __init__(self, *problems: Problem) -> None:
        if len(problems) > MAX_PROBLEMS + 1:
            more = Problem(f"and {len(problems) - MAX_PROBLEMS} more faults", "mend these first")
            problems = (*problems[:MAX_PROBLEMS], more)
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


#: what mends a failure of the operating system
_FIXES = {
    errno.ENOSPC: "free some space, or name an output elsewhere",
    errno.EDQUOT: "your quota is used up: free some space, or name an output elsewhere",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name an output on another file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use --workers 1",
    errno.ENFILE: "the system has too many files open: end other processes, and run again",
    errno.EACCES: "check the permissions of the path",
    errno.EPERM: "check the permissions of the path",
    errno.EROFS: "the file system is mounted read-only: name a path on another",
    errno.EIO: "the disk or its connection fails: check the system's log before anything is written to it again",
    errno.ELOOP: "symlinks of the path lead in a circle: name the path itself",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOMEM: "use --workers 1, or a machine with more memory",
    errno.ESTALE: "mount the network file system again",
}


def system_problem(error: OSError, where: object = None) -> Problem:
    """What the operating system refused, with the file, or ``where`` when it does not say one."""
    name = error.filename if error.filename is not None else where
    said = error.strerror or str(error) or type(error).__name__
    cause = said if name is None else f"{name}: {said}"
    return Problem(cause, _FIXES.get(error.errno or 0, "check the path and its file system, and run again"))


def refuse_if(problems: Iterable[Problem], kind: type[Refusal]) -> None:
    """Raise ``kind`` with every problem, in the order found, unless there are none."""
    found = tuple(problems)
    if found:
        raise kind(*found)
