"""openpi's pi0-FAST: a PaliGemma that writes actions as tokens. Leaves: openpi, models/pi0_fast.py.

openpi has no PyTorch network for it, and needs none: transformers' PaliGemma is the same function,
and LeRobot's `pi0_fast` policy wraps that. Logits of a given sequence agree (:data:`IN_TRANSFORMERS`
proves it). Generated sequences need not: openpi's sampling puts the token of step n at position
`prefill_len + n + 1`, one further than its training and every PyTorch runtime do.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge import Companions, Facts, Family, FullModel, Layout, Model, Part, Problem, Rule

from . import configs, policy_facts
from .gemma import expert
from .openpi import FAMILY as OPENPI
from .siglip import tower

#: `.vision_model` is in the file though not in the modules of 5.23: every transformers loads it
_TRANSFORMERS = Layout(
    name="transformers",
    loading="""\
from transformers import PaliGemmaForConditionalGeneration
from peft import PeftModel

model = PaliGemmaForConditionalGeneration.from_pretrained("BASE")
model = PeftModel.from_pretrained(model, "ADAPTER")""",
)

#: lerobot, policies/pi0_fast/modeling_pi0_fast.py: a PaliGemma inside the policy's `model`, nothing tied
_LEROBOT = Layout(
    name="lerobot",
    prefixes=(("", "model.paligemma_with_expert.paligemma."),),
    ties=False,
    needs_base_name=True,
    loading="""\
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from peft import PeftModel

policy = PI0FastPolicy.from_pretrained("BASE")
policy = PeftModel.from_pretrained(policy, "ADAPTER")""",
)


def _model(*, fused_qkv: bool) -> Model:
    projector = "model.multi_modal_projector.linear"
    embedding = "model.language_model.embed_tokens.weight"
    return Model(
        name="pi0_fast",
        parts=(
            Part("siglip", tower("model.vision_tower.vision_model")),
            Part(
                "projector",
                (
                    Rule("PaliGemma/img/head/kernel", f"{projector}.weight", "image width -> width image"),
                    Rule("PaliGemma/img/head/bias", f"{projector}.bias", "width -> width"),
                ),
            ),
            Part(
                "paligemma",
                (
                    Rule("PaliGemma/llm/embedder/input_embedding", embedding, "vocab width -> vocab width"),
                    *expert("", "model.language_model", fused_qkv=fused_qkv, adaptive=False),
                ),
                stock_alpha={16: 16.0},
            ),
        ),
        same=(("siglip.width", "projector.image"), ("paligemma.width", "projector.width")),
        tied={"lm_head.weight": embedding},
        # openpi's one gemma_2b and its one SigLIP (models/gemma_fast.py, models/siglip.py)
        stock={"paligemma.dim": 256, "siglip.head": 16},
        layouts=(_TRANSFORMERS, _LEROBOT),
    )


#: field of config.json -> axis: what pi0 has as `vlm_config` is here the whole
DIMENSIONS = {
    # the name that every version of transformers reads
    field.removeprefix("vlm_config.").replace("image_token_id", "image_token_index"): axis
    for field, axis in configs.DIMENSIONS.items()
    if field.startswith("vlm_config.")
}

#: ids of the tokenizer that openpi trains with (models/tokenizer.py)
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def known_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a ``config.json`` of transformers' PaliGemma."""
    return configs.known_sizes({"vlm_config": config})


def known_model(config: Mapping[str, Any]) -> str | None:
    """``pi0_fast`` where LeRobot's ``config.json`` says so, or it is that of transformers' PaliGemma."""
    named = config.get("type", config.get("model_type"))
    return "pi0_fast" if named in ("pi0_fast", "paligemma") else None


def companions(facts: Facts) -> Companions:
    """Everything beside the tensors that the layout's loader reads."""
    return configs.with_facts(facts, _config)


def _config(facts: Facts) -> Companions:
    """transformers' ``config.json``, where the checkpoint records all that is in it."""
    # q, k and v in one leaf: as many kv heads as heads
    sizes = {"paligemma.group": facts.sizes.get("paligemma.head"), **facts.sizes}
    unknown = sorted({axis for axis in DIMENSIONS.values() if sizes.get(axis) is None})
    if unknown:
        return Companions({}, (f"no config.json: the base does not tell {', '.join(unknown)}",))
    fixed = copy.deepcopy(configs.FIXED["vlm_config"])
    config: dict[str, Any] = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        **fixed,
        "dtype": facts.dtype,
        # PaliGemma's own classes decide what attends to what, in each version in its own way
        "text_config": {k: v for k, v in configs.GEMMA.items() if k != "use_bidirectional_attention"},
        **TOKENS,
    }
    for field, axis in DIMENSIONS.items():
        parent, _, last = field.rpartition(".")
        (config[parent] if parent else config)[last] = sizes[axis]
    side = math.isqrt(facts.sizes["siglip.token"]) * facts.sizes["siglip.rows"]
    config["vision_config"]["image_size"] = side
    return Companions({"config.json": _json(config)})


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


#: a recording: `tokens`, what embed_inputs of openpi's Pi0FAST makes of the masks, `image/<camera>` (batch,
#: height, width, channel, in [-1, 1]) in the order of `camera_order`, and the `logits` of every position
RECORD_WITH = "record what openpi's Pi0FAST.embed_inputs is given and returns, and its logits"


def _load(directory: Path, recorded: Mapping[str, np.ndarray]) -> tuple[Any, Problem | None]:
    import torch
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = PaliGemmaForConditionalGeneration.from_pretrained(
        directory,
        dtype=torch.float32,
        # openpi's attention is matmul, softmax, matmul: a fused kernel rounds in its own way
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    faults = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if faults:
        cause = f"{directory}: transformers does not load all of it: {json.dumps(faults)[:300]}"
        return model, Problem(cause, "convert again")
    absent = [name for name in _images(recorded) if name not in recorded]
    if absent:
        return model, Problem(f"the recording lacks {', '.join(absent)}", RECORD_WITH)
    return model, None


def _images(recorded: Mapping[str, np.ndarray]) -> list[str]:
    return [f"image/{camera}" for camera in recorded["camera_order"]]


def _logits(model: Any, recorded: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits of every position; at padding, which nothing attends to, the recorded ones."""
    import torch

    tokens, mask = recorded["tokens"].astype(np.int64), recorded["prefix_mask"]
    images = np.concatenate([recorded[name] for name in _images(recorded)]).transpose(0, 3, 1, 2).copy()
    placeholders = np.full((len(tokens), mask.shape[1] - tokens.shape[1]), model.config.image_token_index)
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(np.concatenate([placeholders, tokens], axis=1)),
            pixel_values=torch.from_numpy(images),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            # images and prompt attend to each other, what comes after to what is before it
            token_type_ids=torch.from_numpy(recorded["prefix_ar_mask"].astype(np.int64)),
        )
    return np.where(mask[..., None], output.logits.numpy(), recorded["logits"])


IN_TRANSFORMERS = FullModel(
    runtime="transformers",
    needs=("torch", "transformers:PaliGemmaForConditionalGeneration"),
    layout="transformers",
    models=frozenset({"pi0_fast"}),
    inputs=frozenset({"tokens", "prefix_mask", "prefix_ar_mask", "camera_order", "logits"}),
    output="logits",
    load=_load,
    run=_logits,
    # 4.8e-6 was measured with weights that were folded by hand
    allowed=5e-5,
    # 1.2e-2 was measured with bfloat16, on logits up to 9.5
    allowed_narrow=5e-2,
    record_with=RECORD_WITH,
)

FAMILY = Family(
    name="pi0_fast",
    title="openpi",
    noun="policy",
    models=tuple(_model(fused_qkv=fused_qkv) for fused_qkv in (False, True)),
    export_dtype=OPENPI.export_dtype,
    fold_dtype=OPENPI.fold_dtype,
    # a LoRA run freezes all of llm but its factors (models/pi0_fast.py, get_freeze_filter)
    frozen_dtype=OPENPI.frozen_dtype,
    trained_beside="vision tower and projector",
    unscaled=OPENPI.unscaled,
    companions=companions,
    known_sizes=known_sizes,
    known_model=known_model,
    size_hint="put the config.json of the PaliGemma beside them (num_attention_heads, head_dim)",
    assets=OPENPI.assets,
    facts=OPENPI.facts,
    options=policy_facts.OPTIONS,
    full_models=(IN_TRANSFORMERS,),
)
