"""What a user says of a checkpoint that is being opened, beside its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.checkpoint.options import OpenOptions
from bridge.errors import Problem, Refusal
from bridge.formats.disk.bucket import TIMEOUT
from bridge.formats.disk.location import Location
from bridge.rules.option import flag
from bridge.strict_json import parse_object

MAX_CONFIG = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The options of opening, read."""

    item: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    """By axis, as given."""
    config: Mapping[str, Any] | None = None
    """What the file of ``--config`` contains."""
    config_path: str = ""
    leave_out: tuple[str, ...] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)
    """LoRA alpha by part; ``""`` stands for all parts that are not named."""
    rslora: bool = False
    timeout: float = TIMEOUT
    """Seconds to wait for a bucket to answer."""


#: nothing beside the path
BARE = Opening()


def opening_of(
    options: OpenOptions, alphas: Mapping[str, float] | None = None, rslora: bool = False
) -> Opening:
    """The options of opening as a verb was given them.

    Args:
        options: all of a verb's, with their defaults.
        alphas: LoRA alpha by part, for factors whose alpha is in no file.
        rslora: whether they are scaled by alpha / sqrt(rank).

    Raises:
        Refusal: the file of ``--config`` is not a JSON object.
    """
    path = options["config"]
    config = None
    if path is not None:
        try:
            config = parse_object(
                Location.parse(path).waiting(options["timeout"]).read_bytes(MAX_CONFIG) or b""
            )
        except ValueError as error:
            raise Refusal(
                Problem(f"{flag('config')} {path} is not a config: {error}", "give the model's config.json")
            ) from error
    return Opening(
        item=options["item"],
        sizes=options["size"] or {},
        config=config,
        config_path=str(path or ""),
        leave_out=tuple(options["leave_out"]),
        alphas=alphas or {},
        rslora=rslora,
        timeout=options["timeout"],
    )
