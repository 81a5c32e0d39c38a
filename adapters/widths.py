"""How wide a robot's states and actions are, which openpi pads with zeros to the model's width."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

#: LeRobot's config.json: where the features are, and the feature
_FEATURES = {"state": ("input_features", "observation.state"), "actions": ("output_features", "action")}


def robot_widths(assets: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, int]:
    """The widths that norm stats and LeRobot's ``config.json`` state, by where they do."""
    widths: dict[str, int] = {}
    for path, data in assets.items():
        if not path.endswith("/norm_stats.json"):
            continue
        try:
            stats = json.loads(data)["norm_stats"]
            widths |= {f"{key} in {path}": _moving(stats[key]) for key in _FEATURES if key in stats}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # not openpi's: whoever reads them says so
    for key, (where, feature) in _FEATURES.items():
        try:
            (width,) = config[where][feature]["shape"]
        except (LookupError, TypeError, ValueError):
            continue
        if type(width) is int:
            widths[f"{key} in config.json"] = width
    return widths


def _moving(stats: Mapping[str, Any]) -> int:
    """The dimensions up to the last that is not zero throughout, as padding is in older stats."""
    vectors = [np.asarray(values, np.float64) for values in stats.values() if isinstance(values, list)]
    return max((int(np.flatnonzero(vector)[-1]) + 1 for vector in vectors if vector.any()), default=0)
