"""Untrusted regular expressions, matched in bounded time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

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


class Clock:
    """A budget of processor time that all matches of untrusted patterns share."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._left = seconds

    def matching(self, patterns: Iterable[str], module: str) -> list[str]:
        """The patterns that match, in order, as PEFT's ``get_pattern_key`` tries them.

        Raises:
            TimeoutError: the budget is spent.
        """
        return [pattern for pattern in patterns if self.match(_ending(pattern), module) is not None]

    def check(self, pattern: str) -> str:
        """What is wrong with a pattern; empty if nothing. Raises TimeoutError when the budget is spent."""
        import regex

        if len(pattern) > MAX_PATTERN:
            return f"has {len(pattern)} characters"
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
        import regex

        if self._left <= 0:
            raise TimeoutError
        began = time.thread_time()
        try:
            match = (regex.fullmatch if whole else regex.match)(pattern, text, timeout=self._left)
        finally:
            self._left -= time.thread_time() - began
        return None if match is None else match.groupdict()


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
