"""SigLIP, pi0's vision tower. Leaves and shapes: openpi, models/siglip.py (So400m/14, scanned)."""

from __future__ import annotations

from bridge import Rule

_LEAVES = "PaliGemma/img"
_BLOCK = f"{_LEAVES}/Transformer/encoderblock"


def tower(weights: str) -> tuple[Rule, ...]:
    """The vision tower, under the PyTorch prefix ``weights``."""
    layer = f"{weights}.encoder.layers.{{layer}}"
    return (
        Rule(f"{_LEAVES}/embedding/kernel", f"{weights}.embeddings.patch_embedding.weight",
             "rows columns channel width -> width channel rows columns", dtype="float32"),
        Rule(f"{_LEAVES}/embedding/bias", f"{weights}.embeddings.patch_embedding.bias",
             "width -> width", dtype="float32"),
        Rule(f"{_LEAVES}/pos_embedding", f"{weights}.embeddings.position_embedding.weight",
             "1 token width -> token width", dtype="float32"),
        *_layer_norm(f"{_BLOCK}/LayerNorm_0", f"{layer}.layer_norm1", "layer "),
        *(rule for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
          for rule in _head(f"{_BLOCK}/MultiHeadDotProductAttention_0/{ours}", f"{layer}.self_attn.{theirs}")),
        Rule(f"{_BLOCK}/MultiHeadDotProductAttention_0/out/kernel", f"{layer}.self_attn.out_proj.weight",
             "layer head dim width -> width (head dim)"),
        Rule(f"{_BLOCK}/MultiHeadDotProductAttention_0/out/bias", f"{layer}.self_attn.out_proj.bias",
             "layer width -> width"),
        *_layer_norm(f"{_BLOCK}/LayerNorm_1", f"{layer}.layer_norm2", "layer "),
        *_dense(f"{_BLOCK}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1", "width", "hidden"),
        *_dense(f"{_BLOCK}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2", "hidden", "width"),
        *_layer_norm(f"{_LEAVES}/Transformer/encoder_norm", f"{weights}.post_layernorm", ""),
    )  # fmt: skip


def _head(leaf: str, weight: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{leaf}/kernel", f"{weight}.weight", "layer width head dim -> (head dim) width"),
        Rule(f"{leaf}/bias", f"{weight}.bias", "layer head dim -> (head dim)"),
    )


def _dense(leaf: str, weight: str, inner: str, outer: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{leaf}/kernel", f"{weight}.weight", f"layer {inner} {outer} -> {outer} {inner}"),
        Rule(f"{leaf}/bias", f"{weight}.bias", f"layer {outer} -> {outer}"),
    )


def _layer_norm(leaf: str, weight: str, stacked: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{leaf}/scale", f"{weight}.weight", f"{stacked}width -> width"),
        Rule(f"{leaf}/bias", f"{weight}.bias", f"{stacked}width -> width"),
    )
