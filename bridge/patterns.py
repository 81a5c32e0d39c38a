"""Regular expressions from a foreign file, matched in bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterable

MAX_PATTERN = 8192
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
        try:
            self.match(_ending(pattern), "")
        except regex.error as error:
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
