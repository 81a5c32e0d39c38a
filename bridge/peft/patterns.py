"""Regular expressions from a foreign file, matched in bounded time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

MAX_PATTERN = 8192
#: repeats in one pattern, and the product of those that are counted: compiling takes time and memory by these
MAX_REPEATS = 200
MAX_COUNTED = 1000
#: what the module `regex` reads and `re`, which PEFT uses, does not: fuzziness, recursion, classes, flags
_FOREIGN = re.compile(r"\{[^}]*[^\d,}][^}]*\}|\(\?(?:[R0-9&|]|P>|[a-zA-Z]*[bBefprVwW])|\\[LpPKGXRhHmMN]|\[:")
#: the last number of a counted repeat; one above 9999 is above any bound
_COUNTED = re.compile(r"\{(?:\d*,)?0*(\d{1,5})")
#: what all patterns of an adapter may take together, for all of its modules
SECONDS = 2.0


class Clock:
    """Matches foreign patterns in bounded time, all of them together."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._left = seconds

    def matching(self, patterns: Iterable[str], module: str) -> list[str]:
        """The patterns that match, in order, as PEFT's ``get_pattern_key`` tries them.

        Raises:
            TimeoutError: the time is up.
        """
        return [pattern for pattern in patterns if self.match(_ending(pattern), module) is not None]

    def check(self, pattern: str) -> str:
        """What is wrong with a pattern, or nothing. Raises TimeoutError when the time is up."""
        import regex

        if len(pattern) > MAX_PATTERN:
            return f"has {len(pattern)} characters"
        counted = [int(number) for number in _COUNTED.findall(pattern)]
        if sum(map(pattern.count, "*+?{")) > MAX_REPEATS or math.prod(counted) > MAX_COUNTED:
            return "repeats too much to be tried"
        if _FOREIGN.search(pattern):
            return "is none of PEFT's: Python's re does not know it"
        try:
            self.match(_ending(pattern), "")
        except TimeoutError:
            raise
        except (regex.error, RecursionError, ValueError, OverflowError, LookupError, MemoryError) as error:
            return f"is no regular expression ({error})"
        return ""

    def match(self, pattern: str, text: str, *, whole: bool = False) -> dict[str, str] | None:
        """``re.match`` or ``re.fullmatch``: the named groups where it does.

        Raises:
            TimeoutError: the time is up.
        """
        import regex

        if self._left <= 0:
            raise TimeoutError
        began = time.monotonic()
        try:
            found = (regex.fullmatch if whole else regex.match)(pattern, text, timeout=self._left)
        finally:
            self._left -= time.monotonic() - began
        return None if found is None else found.groupdict()


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
