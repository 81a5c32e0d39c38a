"""The whole policy in a runtime of its own: stock transformers' pi0 on a recorded observation.

A reference file is an ``.npz`` with ``state``, ``tokenized_prompt``, ``tokenized_prompt_mask``,
``image/<camera>`` (batch, height, width, channel, in [-1, 1]), ``image_mask/<camera>``, ``noise``
and the ``actions`` that openpi's JAX model sampled from it in ten steps.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.errors import Problem, Refusal

if TYPE_CHECKING:
    from bridge.compare.sides import Side

NEEDED = {"state", "tokenized_prompt", "tokenized_prompt_mask", "noise", "actions"}
#: the one whose modules are called as in transformers' network
LAYOUT = "transformers"
STEPS = 10
#: largest difference of an action: on a policy without LoRA the two frameworks differ by 4e-5
ALLOWED = 5e-5
#: where weights were rounded to 16 bits: 1.7e-2 was measured with bfloat16, on actions up to 3.6
ALLOWED_NARROW = 5e-2


def refuse_unless_runnable(dst: str | Path, side: Side) -> None:
    """Refuse what stock transformers has no network for.

    Raises:
        Refusal: pi0.5, a pytree, or an adapter that names modules of another layout's network.
    """
    if side.inputs.model.name != "pi0" or side.is_jax:
        raise Refusal(
            Problem(
                f"transformers runs pi0 from PyTorch weights, and {dst} is {side.inputs.model.name} "
                f"as {side.checkpoint.state}",
                "convert it to torch-merged, or leave --full-model out",
            )
        )
    layout = side.checkpoint.layout
    if side.inputs.base is not None and layout is not None and layout.name != LAYOUT:
        raise Refusal(
            Problem(
                f"{dst} is an adapter for the modules of {layout.name}'s network, and transformers has its own",
                f"convert it with --layout {LAYOUT}, or leave --full-model out",
            )
        )


def compare_actions(
    dst: str | Path, base: str | Path | None, side: Side, reference: str | Path
) -> tuple[dict[str, float], list[Problem]]:
    """Sample actions with the destination, in float32, and compare them with the recorded ones.

    Raises:
        Refusal: transformers does not load the weights whole, or the reference lacks an array.
    """
    recorded = _recorded(reference)
    if missing := sorted(NEEDED - recorded.keys()):
        raise Refusal(
            Problem(
                f"{reference} has no {', '.join(missing)}", "record it as examples/record_actions.py does"
            )
        )
    allowed = ALLOWED
    if any(spec.dtype.itemsize < 4 for spec in side.inputs.weights.source.specs.values()):
        allowed = ALLOWED_NARROW
    model = _load(Path(base if base is not None and side.inputs.base is not None else dst), recorded)
    if side.inputs.base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, dst).base_model.model
    gap = np.abs(_sample(model, recorded) - recorded["actions"])
    figures = {"max_abs": float(gap.max()), "mean_abs": float(gap.mean()), "allowed": allowed}
    if figures["max_abs"] <= allowed:
        return figures, []
    return figures, [
        Problem(
            f"{dst}: its actions differ from the recorded ones by {figures['max_abs']:.1e} "
            f"({allowed:.0e} allowed)",
            "the modules above say where; without any, the reference is of another policy",
        )
    ]


def _recorded(reference: str | Path) -> dict[str, np.ndarray]:
    try:
        # without pickles, which is numpy's default
        with np.load(reference, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise Refusal(
            Problem(f"{reference} is no recording: {error}", "record the actions again, as an .npz")
        ) from error


def _load(directory: Path, recorded: dict[str, np.ndarray]) -> Any:
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
    if faults:
        raise Refusal(
            Problem(
                f"{directory}: transformers does not load it whole: {json.dumps(faults)[:300]}",
                "convert again",
            )
        )
    return model


def _sample(model: Any, recorded: dict[str, np.ndarray]) -> np.ndarray:
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
