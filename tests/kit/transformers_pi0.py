"""An independent PyTorch runtime of pi0: the stock model of `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PI0ForConditionalGeneration

STEPS = 10


def load(directory: Path, dtype: torch.dtype) -> PI0ForConditionalGeneration:
    """Load a directory of `config.json` and `model.safetensors`, every tensor accounted for."""
    # The call returns a pair only under output_loading_info, which its annotation leaves out.
    pair: Any = PI0ForConditionalGeneration.from_pretrained(
        directory,
        dtype=dtype,
        # openpi's attention is matmul, softmax, matmul; a fused kernel would round in its own way.
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    model: PI0ForConditionalGeneration = pair[0]
    info: dict[str, Any] = pair[1]
    # A tensor that the file lacks is filled with random numbers, and only a warning says so.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], f"{problem}: {sorted(map(str, info[problem]))}"
    return model


def _prompt(recorded: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """The real prompt tokens, shape (1, tokens)."""
    tokens, mask = recorded["tokenized_prompt"], recorded["tokenized_prompt_mask"]
    assert len(tokens) == 1, "dropping tokens by their mask needs a batch of one"
    return tokens[:, mask[0]].astype(np.int64)


def _cameras(recorded: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """The unmasked images in their recorded order, shape (1, cameras, channels, height, width)."""
    # The recorded order is the order of openpi's prefix, which sorting could change.
    names = [key.removeprefix("image/") for key in recorded if key.startswith("image/")]
    kept = [recorded[f"image/{name}"] for name in names if recorded[f"image_mask/{name}"].all()]
    return np.stack(kept, axis=1).transpose(0, 1, 4, 2, 3).copy()


def sample_actions(
    model: PI0ForConditionalGeneration, recorded: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float32]:
    """Denoise the recorded noise under the recorded observation, as `recorded["actions"]` was."""
    prompt, cameras = _prompt(recorded), _cameras(recorded)
    vlm: Any = model.config.vlm_config
    image = vlm.image_token_id
    # A placeholder that is also a word would have the model read an image where the word stands.
    assert not (prompt == image).any(), "image_token_id is a token of the prompt"

    # What is masked is left out, which is the same function: nothing attends to it, and it does
    # not count in the positions.
    placeholders = np.full((1, cameras.shape[1] * vlm.text_config.num_image_tokens), image)
    input_ids = torch.from_numpy(np.concatenate([placeholders, prompt], axis=1))
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_attention_mask": torch.ones(cameras.shape[:2], dtype=torch.bool),
        "pixel_values": torch.from_numpy(cameras).to(model.dtype),
        "state": torch.from_numpy(recorded["state"]).to(model.dtype),
        "noise": torch.from_numpy(recorded["noise"]).to(model.dtype),
    }
    actions: npt.NDArray[np.float32] = model.sample_actions(**inputs, num_steps=STEPS).float().numpy()
    return actions
