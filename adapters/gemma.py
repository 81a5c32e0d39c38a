"""The Gemma transformer as openpi writes it: one table, used for PaliGemma and the action expert.

Leaves and shapes: openpi, models/gemma.py and models/lora.py. Two experts share one scanned
stack; the second has the suffix ``_1``. No value changes on the way: norms keep openpi's ``1 + scale``.
The last entry of a projection is the einsum that openpi runs it by, with k|v and gate|up taken out.
"""

from __future__ import annotations

from bridge import Factoring, Normal, Rule

#: `LoRAConfig.init_fn` (models/lora.py)
START = Normal(0.01)

#: `lora.Einsum` keeps its factors beside ``w`` and multiplies their product by alpha / rank
EINSUM = Factoring(
    name="attention", leaf="/w", a="/lora_a", b="/lora_b", rank="rank", scaled=True, start=START
)

#: `lora.FeedForward` keeps them beside the leaf and never scales them, whatever alpha is
FEED_FORWARD = Factoring(
    name="feed-forward", leaf="", a="_lora_a", b="_lora_b", rank="ffn_rank", scaled=False, start=START
)


def expert(suffix: str, weights: str, *, fused_qkv: bool, adaptive: bool) -> tuple[Rule, ...]:
    """The layers of one expert.

    Args:
        suffix: of the expert's leaves, ``""`` or ``"_1"``.
        weights: PyTorch prefix of the Gemma model, up to ``layers``.
        fused_qkv: openpi stores q, k and v in one leaf when there are as many kv heads as heads.
        adaptive: pi0.5's adaRMS: norms are dense layers of the time embedding.
    """
    leaves, layer = "PaliGemma/llm/layers", f"{weights}.layers.{{layer}}"
    attention, mlp = f"{leaves}/attn", f"{leaves}/mlp{suffix}"
    projections = (
        (
            Rule(f"{attention}/qkv_einsum{suffix}/w", layer + ".self_attn.{qkv:q_proj|k_proj|v_proj}.weight",
                 "layer qkv head width dim -> (head dim) width", EINSUM, "BSD,KDH->BSKH"),
        )
        if fused_qkv
        else (
            Rule(f"{attention}/q_einsum{suffix}/w", layer + ".self_attn.q_proj.weight",
                 "layer head width dim -> (head dim) width", EINSUM, "BTD,NDH->BTNH"),
            Rule(f"{attention}/kv_einsum{suffix}/w", layer + ".self_attn.{kv:k_proj|v_proj}.weight",
                 "layer kv group width dim -> (group dim) width", EINSUM, "BSD,KDH->BSKH"),
        )
    )  # fmt: skip
    return (
        *projections,
        Rule(f"{attention}/attn_vec_einsum{suffix}/w", layer + ".self_attn.o_proj.weight",
             "layer head dim width -> width (head dim)", EINSUM, "BTNH,NHD->BTD"),
        Rule(f"{mlp}/gating_einsum", layer + ".mlp.{branch:gate_proj|up_proj}.weight",
             "layer branch width hidden -> hidden width", FEED_FORWARD, "BTD,DF->BTF"),
        Rule(f"{mlp}/linear", layer + ".mlp.down_proj.weight",
             "layer hidden width -> width hidden", FEED_FORWARD, "BTF,FD->BTD"),
        *_norm(f"{leaves}/pre_attention_norm{suffix}", layer + ".input_layernorm", "layer ", adaptive),
        *_norm(f"{leaves}/pre_ffw_norm{suffix}", layer + ".post_attention_layernorm", "layer ", adaptive),
        *_norm(f"PaliGemma/llm/final_norm{suffix}", f"{weights}.norm", "", adaptive),
    )  # fmt: skip


def _norm(leaf: str, weight: str, stacked: str, adaptive: bool) -> tuple[Rule, ...]:
    if not adaptive:
        return (Rule(f"{leaf}/scale", f"{weight}.weight", f"{stacked}width -> width", dtype="float32"),)
    return (
        Rule(f"{leaf}/Dense_0/kernel", f"{weight}.dense.weight",
             f"{stacked}width modulation -> modulation width", dtype="float32"),
        Rule(f"{leaf}/Dense_0/bias", f"{weight}.dense.bias",
             f"{stacked}modulation -> modulation", dtype="float32"),
    )  # fmt: skip
