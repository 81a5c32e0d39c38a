"""The kinds of facts that policies like openpi's have beside their weights."""

from __future__ import annotations

from typing import Any

from bridge import FactKind

from . import norm_stats

#: names in a list
MAX_NAMES = 64


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a length of something that is there."""
    return type(value) is int and 0 < value < 1 << 31


def _whole(value: Any) -> int:
    if not is_whole(value):
        raise ValueError(f"{value!r:.40} is not a positive whole number")
    return int(value)


def _word(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 300:
        raise ValueError(f"{value!r:.40} is not a name")
    return value


def _method(value: Any) -> str:
    if value not in norm_stats.METHODS:
        raise ValueError(f"{value!r:.40} is not {' or '.join(norm_stats.METHODS)}")
    return str(value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        raise ValueError(f"{value!r:.40} is not a list of names")
    return tuple(map(_word, value))


def _sides(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r:.40} is not a height and a width")
    return tuple(map(_whole, value))


NORM_STATS = FactKind(
    key="norm_stats",
    title="norm stats",
    show=norm_stats.show,
    same=norm_stats.same,
    contrast=norm_stats.contrast,
    matters=True,
    needed=True,
    flag="norm_stats",
    encode=norm_stats.encode,
    decode=norm_stats.decode,
)
METHOD = FactKind(key="norm_method", title="normalisation", matters=True, decode=_method)
ASSET_ID = FactKind(key="asset_id", title="asset id", flag="asset_id", decode=_word)
HORIZON = FactKind(
    key="action_horizon", title="action horizon", matters=True, flag="action_horizon", decode=_whole
)
STATE_WIDTH = FactKind(key="state_width", title="state width", decode=_whole)
ACTION_WIDTH = FactKind(key="action_width", title="action width", decode=_whole)
CAMERAS = FactKind(key="cameras", title="cameras", show=", ".join, encode=list, decode=_names)
RESOLUTION = FactKind(
    key="resolution", title="image resolution", show=lambda sides: "x".join(map(str, sides)),
    encode=list, decode=_sides,
)  # fmt: skip
TOKENIZER = FactKind(key="tokenizer", title="tokenizer", decode=_word)
PROMPT_LENGTH = FactKind(key="prompt_length", title="prompt length", decode=_whole)

KINDS = (
    NORM_STATS, METHOD, ASSET_ID, HORIZON, STATE_WIDTH, ACTION_WIDTH, CAMERAS, RESOLUTION, TOKENIZER, PROMPT_LENGTH,
)  # fmt: skip
