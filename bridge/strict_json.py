"""Untrusted JSON, parsed in bounded time and memory.

A file's contents decide what is allocated, compared and printed next. So the number of values and
the depth are limited, duplicate keys are refused (parsers disagree on which one counts), and the
encoding is UTF-8.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

MAX_VALUES = 4_000_000
MAX_DEPTH = 64
MAX_SHOWN = 200


class _Ambiguous(ValueError):
    """A duplicate key in an object."""


def parse(text: bytes, most: int = MAX_VALUES) -> Any:
    """Parse a JSON text.

    Args:
        text: as read from a file.
        most: limit on the number of values, counted by punctuation, that inside strings included.

    Raises:
        ValueError: it is not JSON, or exceeds a limit; the message is one line.
    """
    # every value costs one of these marks, so they bound the objects that parsing creates
    marks = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if marks > most:
        raise ValueError(f"it has {marks} values, more than the limit of {most}")
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
    """Parse a JSON text that must be an object; see :func:`parse`."""
    value = parse(text, most)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def shown(value: object) -> str:
    """An untrusted value in a message, at bounded length."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Ambiguous(f"duplicate key {shown(key)[1:-1]}")
    return value


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
