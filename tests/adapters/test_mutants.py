"""Mistakes that people make, planted: the comparisons of `test_to_torch` must see each, where it is.

A comparison that no mistake can fail proves nothing. Each mutant is caught in exactly the modules
or tensors it touches; everything else still holds.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge.formats.safetensors.torch import TorchSink
from bridge.rules.factoring import FactorAxes
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Array
from tests.kit.golden import TOLERANCE, differing
from tests.kit.mutants import Plant, in_axes, in_rules

#: A mistake is larger than float32's own error by at least this much: five hundred times.
SEEN = 1e-3

EVERYTHING = r"/(q_einsum|kv_einsum|attn_vec_einsum|mlp)(_1)?/"
ATTENTION = r"/(q_einsum|kv_einsum|attn_vec_einsum)(_1)?/"


# How mistakes are planted.


def exchanged(leaf: str, first: str, second: str) -> Plant:
    """Two names exchanged in the PyTorch names of the leaves that match `leaf`."""
    other = {first: second, second: first}

    def change(rule: bridge.Rule) -> bridge.Rule:
        if not re.search(leaf, rule.leaf):
            return rule
        weight = re.sub(rf"\b({first}|{second})\b", lambda found: other[found[0]], rule.weight)
        return dataclasses.replace(rule, weight=weight)

    return in_rules(change)


def feed_forward_scaled(patch: pytest.MonkeyPatch) -> None:
    """alpha / rank on the feed-forward's factors too, where openpi's runtime has none."""

    def change(rule: bridge.Rule) -> bridge.Rule:
        if rule.lora is None or rule.lora.scaled:
            return rule
        return dataclasses.replace(rule, lora=dataclasses.replace(rule.lora, scaled=True, rank="rank"))

    in_rules(change)(patch)


def in_scale(scale: Callable[[int, float], float]) -> Plant:
    """Another factor for the attention's product, from rank and alpha."""
    return lambda patch: patch.setattr(
        "bridge.lora.factors.scaling", lambda rank, alpha, *, rslora: scale(rank, alpha)
    )


def in_change(change: Callable[[Array, Array, tuple[int, ...]], Array]) -> Plant:
    """Another product of the two factors of a weight, whose last axes are factored.

    Args:
        change: from both factors, and the axes of the heads that openpi's two einsums contract.
    """

    def split(axes: FactorAxes, a: Array, b: Array) -> tuple[Array, Array]:
        heads = tuple(map(axes.b.index, axes.summed))
        weight = axes.equation.arrange(change(a, b, heads))
        return np.eye(weight.shape[1], dtype=weight.dtype), weight

    return lambda patch: patch.setattr("bridge.lora.factors.split", split)


def per_head(a: Array, b: Array, heads: tuple[int, ...]) -> Array:
    """Six of nine public merges: a[n] @ b[n] in `attn_vec_einsum`, head by head."""
    product: Array = np.matmul(a, b)
    return product


def both_summed(a: Array, b: Array, heads: tuple[int, ...]) -> Array:
    """Heads contracted in both factors before they are multiplied."""
    if heads:
        a, b = (np.broadcast_to(f.sum(heads, keepdims=True), f.shape) for f in (a, b))
    return per_head(a, b, heads)


def dropped(a: Array, b: Array, heads: tuple[int, ...]) -> Array:
    """openpi's own script (#958): the factors are left out."""
    return np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)


def mean_over_heads(a: Array, b: Array, heads: tuple[int, ...]) -> Array:
    """Heads averaged, where openpi's second einsum sums them."""
    return per_head(a, b.mean(heads, keepdims=True) if heads else b, heads)


def transposed_squares(patch: pytest.MonkeyPatch) -> None:
    """A forgotten transpose, wherever the shape does not tell."""
    write = TorchSink.write

    def mutant(self: TorchSink, name: str, array: Array, at: tuple[int, ...] | None = None) -> None:
        square = array.ndim == 2 and array.shape[0] == array.shape[1]
        write(self, name, array.T if square else array, at)

    patch.setattr(TorchSink, "write", mutant)


# What a module computes.

FUNCTIONS: dict[str, tuple[Plant, str]] = {
    "attn_vec merged head by head": (in_change(per_head), r"/attn_vec_einsum(_1)?/"),
    "attn_vec, both factors summed": (in_change(both_summed), r"/attn_vec_einsum(_1)?/"),
    "attn_vec, mean for sum": (in_change(mean_over_heads), r"/attn_vec_einsum(_1)?/"),
    "factors left out": (in_change(dropped), EVERYTHING),
    "feed-forward scaled": (feed_forward_scaled, r"/mlp(_1)?/"),
    "attention scale forgotten": (in_scale(lambda rank, alpha: 1.0), ATTENTION),
    "scale by the root of the rank": (in_scale(lambda rank, alpha: alpha / rank**0.5), ATTENTION),
    "k and v exchanged": (exchanged("kv_einsum", "k_proj", "v_proj"), r"/kv_einsum(_1)?/"),
    "gate and up exchanged": (exchanged("gating", "gate_proj", "up_proj"), r"/mlp(_1)?/"),
    "heads inside dims, q": (
        in_axes("/q_einsum/w", "layer head width dim -> (dim head) width"),
        r"/q_einsum/",
    ),
    "heads inside dims, o": (
        in_axes("/attn_vec_einsum_1/w", "layer head dim width -> width (dim head)"),
        r"/attn_vec_einsum_1/",
    ),
}


@pytest.mark.parametrize("name", golden.WITH_LORA)
@pytest.mark.parametrize("mutant", FUNCTIONS)
def test_recorded_outputs_see(
    mutant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against openpi's recorded outputs each mutant is off by orders of magnitude, and only where it is."""
    plant, touched = FUNCTIONS[mutant]
    source = golden.golden(name)
    plant(monkeypatch)
    state = golden.convert(source.checkpoint, tmp_path / "out", **source.options)
    errors = golden.runtime_errors(source.runtime, state)
    assert any(re.search(touched, module) for module in errors)
    for module, error in errors.items():
        if re.search(touched, module):
            assert error > SEEN, module
        else:
            assert error <= TOLERANCE, module
    smallest = min(error for module, error in errors.items() if re.search(touched, module))
    print(f"{name}, {mutant}: off by {smallest:.2g} or more")


@pytest.mark.parametrize("planted", [False, True])
def test_simulation_sees_transposed_squares(
    planted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where heads x dim is the width, a weight's shape does not tell its transpose; its function does."""
    tree = checkpoints.pi0_tree(width=77, expert_width=77)  # 7 heads x 11
    source = checkpoints.save(tree, tmp_path / "100", quick=True)
    if planted:
        transposed_squares(monkeypatch)
    state = golden.convert(source, tmp_path / "out", lora_alpha=2.0)
    scales = {part: 2.0 / rank for part, rank in checkpoints.LORA.items()}
    errors = golden.runtime_errors(golden.simulate(tree, scales), state, torch.float64)
    for module, error in errors.items():
        if planted and re.search(r"/(q|attn_vec)_einsum", module):
            assert error > SEEN, module
        else:
            assert error <= TOLERANCE, module


# Which bits a tensor has.

TENSORS: dict[str, tuple[Plant, str]] = {
    "SigLIP query, heads inside dims": (
        in_axes("query/kernel", "layer width head dim -> (dim head) width"),
        r"vision_tower.*q_proj\.weight",
    ),
    "SigLIP key's bias, heads inside dims": (
        in_axes("key/bias", "layer head dim -> (dim head)"),
        r"vision_tower.*k_proj\.bias",
    ),
    "SigLIP out, heads inside dims": (
        in_axes("Attention_0/out/kernel", "layer head dim width -> width (dim head)"),
        r"vision_tower.*out_proj\.weight",
    ),
    "SigLIP query and key exchanged": (
        exchanged("DotProductAttention_0/(query|key)", "q_proj", "k_proj"),
        r"vision_tower.*[qk]_proj\.(weight|bias)",
    ),
    "SigLIP norms exchanged": (
        exchanged("encoderblock/LayerNorm", "layer_norm1", "layer_norm2"),
        r"vision_tower.*layer_norm[12]\.(weight|bias)",
    ),
    "patches' rows and columns exchanged": (
        in_axes("img/embedding/kernel", "rows columns channel width -> width channel columns rows"),
        r"patch_embedding\.weight",
    ),
    "Gemma norms exchanged": (
        exchanged("layers/pre_", "input_layernorm", "post_attention_layernorm"),
        r"(input|post_attention)_layernorm\.weight",
    ),
    "k and v exchanged": (
        exchanged("kv_einsum", "k_proj", "v_proj"),
        r"(language_model|gemma_expert).*[kv]_proj\.weight",
    ),
    "gate and up exchanged": (
        exchanged("gating", "gate_proj", "up_proj"),
        r"(gate|up)_proj\.weight",
    ),
    "o_proj, heads inside dims": (
        in_axes("attn_vec_einsum(_1)?/w", "layer head dim width -> width (dim head)"),
        r"\.o_proj\.weight",
    ),
    "squares transposed": (
        transposed_squares,
        r"vision_tower.*(q|k|v|out)_proj\.weight|action_time_mlp_out\.weight",
    ),
    "dense layers exchanged": (
        exchanged("action_in_proj|state_proj", "action_in_proj", "state_proj"),
        r"(action_in|state)_proj\.(weight|bias)",
    ),
}


@pytest.mark.parametrize("mutant", TENSORS)
def test_bits_see(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping by hand finds every tensor that a mistake in the table moves, and no other."""
    plant, touched = TENSORS[mutant]
    source = golden.golden("pi0_base")
    plant(monkeypatch)
    state = golden.convert(source.checkpoint, tmp_path / "out", dtype="float32")
    by_hand = golden.by_hand(source.leaves)
    moved = {name for name in by_hand if re.search(touched, name)}
    assert moved
    assert {name for name, weight in state.items() if weight.shape != by_hand[name].shape} == set()
    assert differing(by_hand, state) == moved
