"""The files that loaders want beside the weights.

transformers reads ``config.json`` (models/pi0/configuration_pi0.py); openpi ignores it, and finds
its own dimensions in a training config. A sub-config replaces the class's defaults whole, so
every field that matters is written.
"""

from __future__ import annotations

import json
import math
from typing import Any

from bridge import Companions, Facts

from . import lerobot

#: openpi's `action_horizon` is in no weight; this is its default (models/pi0_config.py)
DEFAULT_HORIZON = 50


def companions(facts: Facts) -> Companions:
    """Everything beside ``model.safetensors`` that the layout's loader reads."""
    horizon = facts.settings.get("action_horizon")
    notes: tuple[str, ...] = ()
    if horizon is None:
        horizon = DEFAULT_HORIZON
        notes = (
            f"the action horizon is in no weight: {horizon} is assumed, --action-horizon says otherwise",
        )
    if facts.layout.name == "lerobot":
        made = lerobot.companions(facts, horizon)
        return Companions(made.files, (*notes, *made.notes))
    text = json.dumps(_transformers(facts, horizon), indent=2) + "\n"
    return Companions({"config.json": text.encode()}, notes)


def _transformers(facts: Facts, horizon: int) -> dict[str, Any]:
    sizes = facts.sizes
    vocab, action = sizes["paligemma.vocab"], sizes["projections.action"]
    return {
        "architectures": ["PI0ForConditionalGeneration"],
        # transformers knows no pi05: it refuses the name, which is better than running it as pi0
        "model_type": facts.model.name,
        "dtype": facts.dtype,
        "vlm_config": {
            "model_type": "paligemma",
            "hidden_size": sizes["paligemma.width"],
            "projection_dim": sizes["paligemma.width"],
            "vocab_size": vocab,
            # the first id behind the vocabulary: any id inside it is a word
            "image_token_id": vocab,
            "text_config": _gemma(facts, "paligemma"),
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": sizes["siglip.width"],
                "num_hidden_layers": sizes["siglip.layer"],
                "intermediate_size": sizes["siglip.hidden"],
                "num_attention_heads": sizes["siglip.head"],
                "patch_size": sizes["siglip.rows"],
                "image_size": math.isqrt(sizes["siglip.token"]) * sizes["siglip.rows"],
                "num_channels": sizes["siglip.channel"],
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
                "vision_use_head": False,
            },
        },
        "dit_config": _gemma(facts, "expert"),
        "chunk_size": horizon,
        "max_state_dim": action,
        "max_action_dim": action,
        "num_inference_steps": 10,
        "min_period": 4e-3,
        "max_period": 4.0,
    }


def _gemma(facts: Facts, part: str) -> dict[str, Any]:
    sizes = facts.sizes
    heads = sizes["paligemma.head"]
    return {
        "model_type": "gemma",
        "hidden_size": sizes[f"{part}.width"],
        "num_hidden_layers": sizes["paligemma.layer"],
        "intermediate_size": sizes[f"{part}.hidden"],
        "num_attention_heads": heads,
        # no axis of its own where q, k and v are one leaf: there are then as many
        "num_key_value_heads": sizes.get("paligemma.group", heads),
        "head_dim": sizes["paligemma.dim"],
        "vocab_size": sizes["paligemma.vocab"],
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 8192,
        "attention_bias": False,
        "use_bidirectional_attention": True,
    }
