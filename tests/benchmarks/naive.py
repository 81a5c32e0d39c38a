"""The way that needs no tool: restore with Orbax, fold and transpose with numpy, save with torch.

Everything is in memory, as in most scripts that convert checkpoints. Stock ranks, so that every
scale is 1; openpi applies the factors of ``attn_vec_einsum`` with ``lora_b`` summed over heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.kit import checkpoints

Arrays = Mapping[str, np.ndarray]
PALIGEMMA = "paligemma_with_expert.paligemma"
EXPERT = "paligemma_with_expert.gemma_expert.model"


def convert(source: Path, destination: Path) -> None:
    """Make an openpi state_dict in float32 of a step directory, LoRA folded in."""
    import torch
    from safetensors.torch import save_file

    params = checkpoints.restore(source)
    state: dict[str, np.ndarray] = {}
    language = f"{PALIGEMMA}.model.language_model"
    state[f"{PALIGEMMA}.lm_head.weight"] = params["PaliGemma/llm/embedder/input_embedding"]
    _gemma(params, "", language, state)
    _gemma(params, "_1", EXPERT, state)
    _siglip(params, f"{PALIGEMMA}.model.vision_tower.vision_model", state)
    projector = f"{PALIGEMMA}.model.multi_modal_projector.linear"
    _dense(params, "PaliGemma/img/head", projector, state)
    for name in (
        "action_in_proj",
        "action_out_proj",
        "state_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    ):
        _dense(params, name, name, state)
    vocab, width = len(state[f"{PALIGEMMA}.lm_head.weight"]), params["action_in_proj/bias"].shape[0]
    state["paligemma_with_expert.gemma_expert.lm_head.weight"] = np.zeros((vocab, width), np.float32)
    destination.mkdir()
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array.astype(np.float32)))
        for name, array in state.items()
    }
    save_file(tensors, destination / "model.safetensors")


def _folded(params: Arrays, weight: str, factor: str, *, summed: bool = False) -> np.ndarray:
    w = params[weight].astype(np.float32)
    if f"{factor}lora_a" not in params:
        return w
    a, b = (params[f"{factor}lora_{which}"].astype(np.float32) for which in "ab")
    if summed:
        b = b.sum(axis=-3, keepdims=True)
    return w + a @ b


def _gemma(params: Arrays, suffix: str, name: str, state: dict[str, np.ndarray]) -> None:
    leaves = "PaliGemma/llm/layers"
    q, kv, o = (
        _folded(params, f"{leaves}/attn/{which}{suffix}/w", f"{leaves}/attn/{which}{suffix}/", summed=summed)
        for which, summed in (("q_einsum", False), ("kv_einsum", False), ("attn_vec_einsum", True))
    )
    gating, down = (
        _folded(params, f"{leaves}/mlp{suffix}/{which}", f"{leaves}/mlp{suffix}/{which}_")
        for which in ("gating_einsum", "linear")
    )
    for layer in range(len(q)):
        to = f"{name}.layers.{layer}"
        width = q.shape[2]
        state[f"{to}.self_attn.q_proj.weight"] = q[layer].transpose(0, 2, 1).reshape(-1, width)
        state[f"{to}.self_attn.k_proj.weight"] = kv[layer, 0].transpose(0, 2, 1).reshape(-1, width)
        state[f"{to}.self_attn.v_proj.weight"] = kv[layer, 1].transpose(0, 2, 1).reshape(-1, width)
        state[f"{to}.self_attn.o_proj.weight"] = o[layer].reshape(-1, width).T
        state[f"{to}.mlp.gate_proj.weight"] = gating[layer, 0].T
        state[f"{to}.mlp.up_proj.weight"] = gating[layer, 1].T
        state[f"{to}.mlp.down_proj.weight"] = down[layer].T
        for norm, theirs in (
            ("pre_attention_norm", "input_layernorm"),
            ("pre_ffw_norm", "post_attention_layernorm"),
        ):
            state[f"{to}.{theirs}.weight"] = params[f"{leaves}/{norm}{suffix}/scale"][layer]
    state[f"{name}.norm.weight"] = params[f"PaliGemma/llm/final_norm{suffix}/scale"]


def _siglip(params: Arrays, name: str, state: dict[str, np.ndarray]) -> None:
    leaves, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    patch = f"{name}.embeddings.patch_embedding"
    state[f"{patch}.weight"] = params[f"{leaves}/embedding/kernel"].transpose(3, 2, 0, 1)
    state[f"{patch}.bias"] = params[f"{leaves}/embedding/bias"]
    state[f"{name}.embeddings.position_embedding.weight"] = params[f"{leaves}/pos_embedding"][0]
    width = params[f"{leaves}/embedding/bias"].shape[0]
    for layer in range(len(params[f"{block}/LayerNorm_0/scale"])):
        to = f"{name}.encoder.layers.{layer}"
        for norm, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
            state[f"{to}.{theirs}.weight"] = params[f"{block}/{norm}/scale"][layer]
            state[f"{to}.{theirs}.bias"] = params[f"{block}/{norm}/bias"][layer]
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for head, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            kernel = params[f"{attention}/{head}/kernel"][layer]
            state[f"{to}.self_attn.{theirs}.weight"] = kernel.reshape(width, width).T
            state[f"{to}.self_attn.{theirs}.bias"] = params[f"{attention}/{head}/bias"][layer].reshape(width)
        kernel = params[f"{attention}/out/kernel"][layer]
        state[f"{to}.self_attn.out_proj.weight"] = kernel.reshape(width, width).T
        state[f"{to}.self_attn.out_proj.bias"] = params[f"{attention}/out/bias"][layer]
        for dense, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            state[f"{to}.mlp.{theirs}.weight"] = params[f"{block}/MlpBlock_0/{dense}/kernel"][layer].T
            state[f"{to}.mlp.{theirs}.bias"] = params[f"{block}/MlpBlock_0/{dense}/bias"][layer]
    for which, theirs in (("scale", "weight"), ("bias", "bias")):
        state[f"{name}.post_layernorm.{theirs}"] = params[f"{leaves}/Transformer/encoder_norm/{which}"]


def _dense(params: Arrays, leaf: str, name: str, state: dict[str, np.ndarray]) -> None:
    state[f"{name}.weight"] = params[f"{leaf}/kernel"].T
    state[f"{name}.bias"] = params[f"{leaf}/bias"]
