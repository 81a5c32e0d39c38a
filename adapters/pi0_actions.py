"""pi0's actions, sampled by stock transformers from a recorded observation.

A reference is what examples/record_actions.py writes: ``state``, ``tokenized_prompt``,
``tokenized_prompt_mask``, ``image/<camera>`` (batch, height, width, channel, in [-1, 1]),
``image_mask/<camera>``, ``noise`` and the ``actions`` that openpi's JAX model sampled in ten steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge import FullModel, Problem

STEPS = 10


def _load(directory: Path, recorded: Mapping[str, np.ndarray]) -> tuple[Any, Problem | None]:
    import torch
    from transformers import PI0Config, PI0ForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = PI0Config.from_pretrained(directory)
    # the length of a chunk is in no weight: the recording has it
    config.chunk_size = recorded["actions"].shape[1]
    model, info = PI0ForConditionalGeneration.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        # openpi's attention is matmul, softmax, matmul: a fused kernel rounds in its own way
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    faults = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if not faults:
        return model, None
    cause = f"{directory}: transformers does not load all of it: {json.dumps(faults)[:300]}"
    return model, Problem(cause, "convert again")


def _sample(model: Any, recorded: Mapping[str, np.ndarray]) -> np.ndarray:
    import torch

    prompt = recorded["tokenized_prompt"][:, recorded["tokenized_prompt_mask"][0]].astype(np.int64)
    cameras = [
        recorded[name]
        for name in recorded
        if name.startswith("image/") and recorded[name.replace("image/", "image_mask/", 1)].all()
    ]
    # what is masked is left out, which is the same function: nothing attends to it
    images = np.stack(cameras, axis=1).transpose(0, 1, 4, 2, 3).copy()
    vlm = model.config.vlm_config
    placeholders = np.full((1, images.shape[1] * vlm.text_config.num_image_tokens), vlm.image_token_id)
    tokens = torch.from_numpy(np.concatenate([placeholders, prompt], axis=1))
    actions = model.sample_actions(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_attention_mask=torch.ones(images.shape[:2], dtype=torch.bool),
        pixel_values=torch.from_numpy(images),
        state=torch.from_numpy(recorded["state"]),
        noise=torch.from_numpy(recorded["noise"]),
        num_steps=STEPS,
    )
    return np.asarray(actions.float().numpy())


IN_TRANSFORMERS = FullModel(
    runtime="transformers",
    needs=("torch", "transformers:PI0Config", "transformers:PI0ForConditionalGeneration"),
    layout="transformers",
    models=frozenset({"pi0"}),
    inputs=frozenset({"state", "tokenized_prompt", "tokenized_prompt_mask", "noise", "actions"}),
    output="actions",
    load=_load,
    run=_sample,
    # on a policy without LoRA the two frameworks differ by 4e-5
    allowed=5e-5,
    # 1.7e-2 was measured with bfloat16, on actions up to 3.6
    allowed_narrow=5e-2,
    record_with="record it as examples/record_actions.py does",
)
