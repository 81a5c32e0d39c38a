"""LeRobot's policy directory: ``config.json`` beside the weights. Fields: lerobot 0.6, policies/pi0.

LeRobot names dimensions by variant and refuses unknown fields, so it can only describe the stock
ones; and it swallows shape errors on load, so a config that does not fit is worse than none.
"""

from __future__ import annotations

import json
import math
from typing import Any

from bridge import Companions, Facts

#: the only dimensions that lerobot's variants `gemma_2b`, `gemma_300m` and its vision tower stand for
STOCK = {
    "paligemma.width": 2048, "paligemma.hidden": 16384, "paligemma.layer": 18, "paligemma.head": 8,
    "paligemma.group": 1, "paligemma.dim": 256, "paligemma.vocab": 257152,
    "expert.width": 1024, "expert.hidden": 4096,
    "siglip.width": 1152, "siglip.layer": 27, "siglip.hidden": 4304, "siglip.head": 16, "siglip.rows": 14,
}  # fmt: skip


def companions(facts: Facts, horizon: int) -> Companions:
    """LeRobot's ``config.json``, where it can say what the weights are."""
    odd = [f"{axis} {facts.sizes.get(axis)}" for axis, size in STOCK.items() if facts.sizes.get(axis) != size]
    if odd:
        return Companions(
            {},
            (f"no config.json: LeRobot knows only gemma_2b with gemma_300m, and this has {', '.join(odd)}",),
        )
    text = json.dumps(_config(facts, horizon), indent=2) + "\n"
    return Companions({"config.json": text.encode()})


def _config(facts: Facts, horizon: int) -> dict[str, Any]:
    action = facts.sizes["projections.action"]
    resolution = math.isqrt(facts.sizes["siglip.token"]) * facts.sizes["siglip.rows"]
    normalization = "QUANTILES" if facts.model.name == "pi05" else "MEAN_STD"
    return {
        "type": facts.model.name,
        "chunk_size": horizon,
        "n_action_steps": horizon,
        "max_action_dim": action,
        "max_state_dim": action,
        "dtype": facts.dtype if facts.dtype in ("float32", "bfloat16") else "float32",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "image_resolution": [resolution, resolution],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": normalization, "ACTION": normalization},
    }
