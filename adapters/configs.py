"""The files that loaders want beside the weights, and the dimensions such a file tells.

transformers reads ``config.json`` (models/pi0/configuration_pi0.py); openpi ignores it, and finds
its own dimensions in a training config. A sub-config replaces the class's defaults whole, so
every field that matters is written. The table of dimensions serves both ways: a state_dict alone
does not tell how a projection's rows are split into heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from bridge import Companions, Facts

from . import lerobot, lerobot_read, policy_facts
from .kinds import HORIZON

#: field of config.json -> axis
DIMENSIONS = {
    "vlm_config.hidden_size": "paligemma.width",
    "vlm_config.projection_dim": "paligemma.width",
    "vlm_config.vocab_size": "paligemma.vocab",
    # the first id behind the vocabulary: any id inside it is a word
    "vlm_config.image_token_id": "paligemma.vocab",
    "vlm_config.vision_config.hidden_size": "siglip.width",
    "vlm_config.vision_config.num_hidden_layers": "siglip.layer",
    "vlm_config.vision_config.intermediate_size": "siglip.hidden",
    "vlm_config.vision_config.num_attention_heads": "siglip.head",
    "vlm_config.vision_config.patch_size": "siglip.rows",
    "vlm_config.vision_config.num_channels": "siglip.channel",
    "max_state_dim": "projections.action",
    "max_action_dim": "projections.action",
    **{
        f"{config}.{field}": axis
        for config, part in (("vlm_config.text_config", "paligemma"), ("dit_config", "expert"))
        for field, axis in (
            ("hidden_size", f"{part}.width"),
            ("intermediate_size", f"{part}.hidden"),
            # one size for both experts: openpi runs them through one attention
            ("num_hidden_layers", "paligemma.layer"),
            ("num_attention_heads", "paligemma.head"),
            ("num_key_value_heads", "paligemma.group"),
            ("head_dim", "paligemma.dim"),
            ("vocab_size", "paligemma.vocab"),
        )
    },
}

#: fields that are the same for every pi0
FIXED: dict[str, Any] = {
    "architectures": ["PI0ForConditionalGeneration"],
    "vlm_config": {
        "model_type": "paligemma",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
    },
    "num_inference_steps": 10,
    "min_period": 4e-3,
    "max_period": 4.0,
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma",
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "use_bidirectional_attention": True,
}

#: what no other axis tells, where q, k and v are one leaf: there are then as many kv heads as heads
_FUSED = {"paligemma.group": "paligemma.head"}


def known_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that a ``config.json`` tells, where it is one that transformers reads."""
    kind = config.get("type")
    if (
        isinstance(kind, str)
        and kind in lerobot_read.MODELS
        and config.get("paligemma_variant") == "gemma_2b"
    ):
        return dict(lerobot.STOCK)
    found: dict[str, int] = {}
    for field, axis in DIMENSIONS.items():
        value: Any = config
        for key in field.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if type(value) is int and value > 0 and not field.endswith("image_token_id"):
            found.setdefault(axis, value)
    return found


def known_model(config: Mapping[str, Any]) -> str | None:
    """The model that LeRobot's ``config.json`` (``type``) or transformers' (``model_type``) names."""
    named = config.get("type", config.get("model_type"))
    return named if named in ("pi0", "pi05") else None


def companions(facts: Facts) -> Companions:
    """Everything beside the tensors that the layout's loader reads."""
    return with_facts(facts, _pi0)


def with_facts(facts: Facts, transformers: Callable[[Facts], Companions]) -> Companions:
    """What openpi, LeRobot or transformers reads beside a checkpoint, and what no file of theirs can state.

    Args:
        facts: of an output.
        transformers: makes the ``config.json`` of weights in transformers' names, or openpi's.
    """
    if facts.in_jax or (facts.contents == "lora" and facts.layout.name != "lerobot"):
        made = Companions({})  # openpi reads no config, and PEFT its own alone
    elif facts.layout.name == "lerobot":
        made = lerobot.companions(facts)
    else:
        made = transformers(facts)
    notes = (*made.notes, *policy_facts.notes(facts))
    states_horizon = "chunk_size" in json.loads(made.files.get("config.json", b"{}"))
    in_lerobot = facts.layout.name == "lerobot" and not facts.in_jax
    if states_horizon and facts.known[HORIZON.key].assumed:
        assumed = (
            f"the checkpoint does not record the action horizon; assuming {facts.known[HORIZON.key].value} "
            "(override with --action-horizon)"
        )
        notes = (assumed, *notes)
    # LeRobot's files state everything, where there is a config
    rest = (
        {} if in_lerobot and states_horizon else policy_facts.policy_file(facts, horizon=not states_horizon)
    )
    return Companions({**made.files, **rest}, notes, assets=policy_facts.assets(facts))


def _pi0(facts: Facts) -> Companions:
    unknown = sorted({axis for axis in DIMENSIONS.values() if _size(facts, axis) is None})
    if unknown:
        return Companions({}, (f"no config.json: the base does not tell {', '.join(unknown)}",))
    text = json.dumps(_transformers(facts, facts.known[HORIZON.key].value), indent=2) + "\n"
    return Companions({"config.json": text.encode()})


def _size(facts: Facts, axis: str) -> int | None:
    return facts.sizes.get(axis, facts.sizes.get(_FUSED.get(axis, "")))


def _transformers(facts: Facts, horizon: int) -> dict[str, Any]:
    # transformers knows no pi05: it refuses the name, which is better than running it as pi0
    config: dict[str, Any] = {"model_type": facts.model.name, "dtype": facts.dtype, "chunk_size": horizon}
    config |= json.loads(json.dumps(FIXED))
    config["vlm_config"]["text_config"] = dict(GEMMA)
    config["dit_config"] = dict(GEMMA)
    for field, axis in DIMENSIONS.items():
        *parents, last = field.split(".")
        node = config
        for key in parents:
            node = node[key]
        node[last] = _size(facts, axis)
    config["vlm_config"]["vision_config"]["image_size"] = policy_facts.image_side(facts.sizes)
    return config
