"""JSON from foreign hands, read in bounded time and memory.

What a file says decides what is allocated, compared and printed next, so it is held down here:
few values, few levels, no key twice (readers disagree on which one counts), UTF-8 alone.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

MAX_VALUES = 4_000_000
MAX_DEPTH = 64
MAX_SHOWN = 200


class _Ambiguous(ValueError):
    """A key stands twice in one object."""


def parse(text: bytes, most: int = MAX_VALUES) -> Any:
    """The value of a JSON text.

    Args:
        text: as read from a file.
        most: values that it may hold, all told, keys and punctuation inside of text included.

    Raises:
        ValueError: it is no JSON, or not modest; the message says why, in one line.
    """
    # each value takes one of these marks: a bound on the objects that parsing makes
    marks = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if marks > most:
        raise ValueError(f"longer than any such file: {marks} values")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except _Ambiguous:
        raise
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    _check_depth(value)
    return value


def parse_object(text: bytes, most: int = MAX_VALUES) -> dict[str, Any]:
    """As :func:`parse`, for a text that must be an object."""
    value = parse(text, most)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def shown(value: object) -> str:
    """A foreign value, of bounded length, for a message."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Ambiguous(f"ambiguous: {shown(twice)[1:-1]} stands in it twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")
