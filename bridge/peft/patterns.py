"""Untrusted regular expressions, matched in bounded time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

MAX_PATTERN = 8192
#: repeats in one pattern, and the product of its counted ones: the cost of compiling grows with both
MAX_REPEATS = 200
MAX_COUNTED = 1000
#: syntax of the module `regex` that `re`, which PEFT uses, lacks: fuzziness, recursion, classes, flags
_FOREIGN = re.compile(r"\{[^}]*[^\d,}][^}]*\}|\(\?(?:[R0-9&|]|P>|[a-zA-Z]*[bBefprVwW])|\\[LpPKGXRhHmMN]|\[:")
#: the upper bound of a counted repeat; five digits exceed any limit
_COUNTED = re.compile(r"\{(?:\d*,)?0*(\d{1,5})")
#: for all patterns of an adapter and all of its modules together: processor time, as a busy machine is no fault
SECONDS = 2.0
#: on top of it, for each module
SECONDS_PER_MODULE = 1e-4
#: a pattern whose characters stand for themselves, but for the dot
_PLAIN = re.compile(r"[\w.-]+")


class Clock:
    """A budget of processor time that all matches of untrusted patterns share."""

    def __init__(self, seconds: float = SECONDS, modules: int = 0) -> None:
        self.seconds = seconds + modules * SECONDS_PER_MODULE
        self._left = self.seconds
        self._compiled: dict[str, Any] = {}

    @property
    def spent(self) -> str:
        """What to say where the budget is spent."""
        return f"takes longer than {self.seconds:.2g} s"

    def check(self, pattern: str) -> str:
        """What is wrong with a pattern; empty if nothing. Raises TimeoutError when the budget is spent."""
        import regex

        if len(pattern) > MAX_PATTERN:
            return f"has {len(pattern)} characters"
        if _PLAIN.fullmatch(pattern) is not None:
            return ""  # and compiling ten thousand of them takes long
        counted = [int(number) for number in _COUNTED.findall(pattern)]
        if sum(map(pattern.count, "*+?{")) > MAX_REPEATS or math.prod(counted) > MAX_COUNTED:
            return "has too many repeats"
        if _FOREIGN.search(pattern):
            return "uses syntax that Python's re does not support"
        try:
            self.match(_ending(pattern), "")
        except TimeoutError:
            raise
        except (regex.error, RecursionError, ValueError, OverflowError, LookupError, MemoryError) as error:
            return f"is not a valid regular expression ({error})"
        return ""

    def match(self, pattern: str, text: str, *, whole: bool = False) -> dict[str, str] | None:
        """The named groups of ``re.match``, or of ``re.fullmatch`` if ``whole``; None without a match.

        Raises:
            TimeoutError: the budget is spent.
        """
        began = self.started()
        try:
            # compiling counts: ten thousand patterns take seconds
            compiled = self._compiled.get(pattern) or self._compile(pattern)
            match = (compiled.fullmatch if whole else compiled.match)(text, timeout=self._left)
        finally:
            self.ended(began)
        return None if match is None else match.groupdict()

    def _compile(self, pattern: str) -> Any:
        import regex

        # the cache of the module itself is of no use to a thousand patterns
        self._compiled[pattern] = regex.compile(pattern)
        return self._compiled[pattern]

    def started(self) -> float:
        """When something starts that takes of the budget. Raises TimeoutError where that is spent."""
        if self._left <= 0:
            raise TimeoutError
        return time.thread_time()

    def ended(self, began: float) -> None:
        """Take the time since something started from the budget."""
        self._left -= time.thread_time() - began


class Patterns:
    """Patterns tried in order against the ends of module paths, as PEFT's ``get_pattern_key`` tries them.

    Most are paths, of which there may be as many as modules: those are looked up. A dot in them stands for
    any character, so they are kept by their length and by where their dots are.
    """

    def __init__(self, patterns: Iterable[str], clock: Clock) -> None:
        self._clock = clock
        self._patterns = list(patterns)
        self._others: list[int] = []
        self._paths: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for number, pattern in enumerate(self._patterns):
            if _PLAIN.fullmatch(pattern) is None:
                self._others.append(number)
                continue
            dots = tuple(at for at, character in enumerate(pattern) if character == ".")
            self._paths.setdefault(len(pattern), {}).setdefault(dots, {})[pattern] = number

    def first(self, module: str) -> str | None:
        """The first that matches. Raises TimeoutError: the budget is spent."""
        hit = min(self._looked_up(module), default=len(self._patterns))
        for number in self._others:
            if number > hit or self._matches(number, module):
                hit = min(number, hit)
                break
        return self._patterns[hit] if hit < len(self._patterns) else None

    def all(self, module: str) -> list[str]:
        """All that match, in order. Raises TimeoutError: the budget is spent."""
        others = (number for number in self._others if self._matches(number, module))
        return [self._patterns[number] for number in sorted((*self._looked_up(module), *others))]

    def _matches(self, number: int, module: str) -> bool:
        return self._clock.match(_ending(self._patterns[number]), module) is not None

    def _looked_up(self, module: str) -> list[int]:
        """Numbers of the paths that match."""
        if not self._paths:
            return []
        began = self._clock.started()
        hits = []
        for ending in endings(module):
            for dots, paths in self._paths.get(len(ending), {}).items():
                characters = list(ending)
                for at in dots:
                    characters[at] = "."
                if (number := paths.get("".join(characters))) is not None:
                    hits.append(number)
        self._clock.ended(began)
        return hits


def endings(module: str) -> Iterator[str]:
    """The tail of a path after each dot, the shortest first, and the path."""
    at = module.rfind(".")
    while at >= 0:
        yield module[at + 1 :]
        at = module.rfind(".", 0, at)
    yield module


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
