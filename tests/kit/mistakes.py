"""Mistakes that people make when they convert a policy, made here with numpy alone.

In a merge each is a change of the folded leaves: what a converter with that mistake would have
folded. The mapping by hand (`tests.kit.golden.by_hand`) tells which PyTorch weights that makes wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kit.checkpoints import Array, Tree
from tests.kit.golden import BLOCK, EXPERTS, Golden, State, tensor

Scales = Mapping[str, float]
PREFIX = "base_model.model."
FRONT = f"{BLOCK}/attn"
IMAGE = "PaliGemma/img/Transformer/encoderblock"


@dataclass(frozen=True)
class Folded:
    """A checkpoint, and its folded leaves to spoil."""

    leaves: Tree
    """As trained, factors apart."""
    scales: Scales
    """alpha / rank of the attention's factors, by part."""
    tree: Tree
    """Folded, float32."""

    def fold(self, leaf: str, product: Array, scale: float = 1.0) -> None:
        """Another product of the factors of a leaf."""
        self.tree[leaf] = (self.leaves[leaf].astype(np.float64) + scale * product).astype(np.float32)


def factors(leaves: Mapping[str, Array], leaf: str) -> tuple[Array, Array]:
    stem = leaf.removesuffix("w") if leaf.endswith("/w") else f"{leaf}_"
    a, b = (leaves[f"{stem}{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
    return a, b


def folded(leaves: Tree, scales: Scales) -> Folded:
    """The leaves with every product summed in, as openpi's einsums apply them, in float64 and cast once."""
    found = Folded(leaves, scales, {k: v.astype(np.float32) for k, v in leaves.items() if "lora_" not in k})
    for part, suffix, _ in EXPERTS:
        if part not in scales:
            continue
        for name in ("q_einsum", "kv_einsum"):
            a, b = factors(leaves, f"{FRONT}/{name}{suffix}/w")
            found.fold(f"{FRONT}/{name}{suffix}/w", a @ b, scales[part])
        # the heads are contracted in the first einsum, and once more in the second
        a, b = factors(leaves, f"{FRONT}/attn_vec_einsum{suffix}/w")
        found.fold(f"{FRONT}/attn_vec_einsum{suffix}/w", a @ b.sum(1, keepdims=True), scales[part])
        for name in ("gating_einsum", "linear"):
            a, b = factors(leaves, f"{BLOCK}/mlp{suffix}/{name}")
            found.fold(f"{BLOCK}/mlp{suffix}/{name}", a @ b)
    return found


def per_head(right: Folded) -> None:
    """`attn_vec_einsum` merged head by head: six of nine public merge scripts."""
    for part, suffix, _ in EXPERTS:
        a, b = factors(right.leaves, leaf := f"{FRONT}/attn_vec_einsum{suffix}/w")
        right.fold(leaf, a @ b, right.scales[part])


def feed_forward_scaled(right: Folded) -> None:
    """alpha / rank on the feed-forward, where openpi's runtime has none."""
    for part, suffix, _ in EXPERTS:
        for name in ("gating_einsum", "linear"):
            a, b = factors(right.leaves, leaf := f"{BLOCK}/mlp{suffix}/{name}")
            right.fold(leaf, a @ b, right.scales[part])


def scale_forgotten(right: Folded) -> None:
    """The attention's products without alpha / rank."""
    for _, suffix, _ in EXPERTS:
        for name in ("q_einsum", "kv_einsum"):
            a, b = factors(right.leaves, leaf := f"{FRONT}/{name}{suffix}/w")
            right.fold(leaf, a @ b)
        a, b = factors(right.leaves, leaf := f"{FRONT}/attn_vec_einsum{suffix}/w")
        right.fold(leaf, a @ b.sum(1, keepdims=True))


def factors_dropped(right: Folded) -> None:
    """openpi's own script (#958)."""
    for _, suffix, _ in EXPERTS:
        for name in ("attn/q_einsum{}/w", "attn/kv_einsum{}/w", "attn/attn_vec_einsum{}/w",
                     "mlp{}/gating_einsum", "mlp{}/linear"):  # fmt: skip
            right.fold(f"{BLOCK}/{name.format(suffix)}", np.zeros(()))


def changing(leaf: str, change: Callable[[Array], Array]) -> Callable[[Folded], None]:
    """A mistake in the values of one leaf."""

    def plant(right: Folded) -> None:
        found = change(right.tree[leaf])
        assert found.shape == right.tree[leaf].shape
        right.tree[leaf] = np.ascontiguousarray(found)

    return plant


def bit(number: int, at: tuple[int, ...]) -> Callable[[Array], Array]:
    """One bit of one float32 flipped: 31 is the sign, 30 to 23 the exponent, 22 to 0 the mantissa."""

    def change(array: Array) -> Array:
        array = np.array(array, np.float32)
        array.view(np.uint32)[at] ^= np.uint32(1 << number)
        return array

    return change


def zeroed(at: int) -> Callable[[Array], Array]:
    """One layer of a stack zeroed."""

    def change(array: Array) -> Array:
        array = array.copy()
        array[at] = 0
        return array

    return change


#: with LoRA: mistakes in the merge, in every module of a kind
IN_MERGE: dict[str, Callable[[Folded], None]] = {
    "attn_vec_einsum merged head by head": per_head,
    "feed-forward scaled": feed_forward_scaled,
    "attention's scale forgotten": scale_forgotten,
    "factors dropped": factors_dropped,
}

#: in any checkpoint: mistakes in one leaf
IN_LEAVES: dict[str, Callable[[Folded], None]] = {
    "gate and up swapped": changing(f"{BLOCK}/mlp_1/gating_einsum", lambda leaf: leaf[:, ::-1]),
    "k and v swapped": changing(f"{FRONT}/kv_einsum/w", lambda leaf: leaf[:, ::-1]),
    "one layer shifted": changing(f"{BLOCK}/mlp/linear", lambda leaf: np.roll(leaf, 1, axis=0)),
    "norms shifted": changing(f"{BLOCK}/pre_ffw_norm/scale", lambda leaf: np.roll(leaf, 1, axis=0)),
    "a square transposed": changing(
        f"{IMAGE}/MultiHeadDotProductAttention_0/query/kernel",
        lambda leaf: leaf.reshape(len(leaf), -1, leaf.shape[1]).swapaxes(1, 2).reshape(leaf.shape),
    ),
    "a tower's layer shifted": changing(
        f"{IMAGE}/MlpBlock_0/Dense_0/kernel", lambda leaf: np.roll(leaf, 1, axis=0)
    ),
    "one tensor zeroed": changing(f"{FRONT}/q_einsum_1/w", zeroed(2)),
    "a bias zeroed": changing("action_in_proj/bias", np.zeros_like),
    "exponent bit": changing(f"{BLOCK}/mlp_1/linear", bit(23, (1, 5, 7))),
    "sign bit": changing(f"{FRONT}/attn_vec_einsum/w", bit(31, (0, 3, 5, 7))),
    "highest bit of a mantissa": changing(f"{FRONT}/q_einsum/w", bit(22, (2, 3, 5, 7))),
}


# Factors, PEFT's and openpi's.


Change = Callable[[State, dict[str, Any], Golden], None]


def modules(state: Mapping[str, object], kind: str) -> list[str]:
    """The modules of an adapter that match."""
    found = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return [module for module in found if re.search(kind, module)]


def scaled(kind: str, power: int) -> Change:
    """Factors whose product is off by the scale: left out, or applied where the runtime has none."""

    def change(state: State, config: dict[str, Any], source: Golden) -> None:
        for module in modules(state, kind):
            part = "expert" if "gemma_expert" in module else "paligemma"
            state[f"{module}.lora_B.weight"] *= source.scales[part] ** power

    return change


def blocks_per_head(state: State, config: dict[str, Any], source: Golden) -> None:
    """o_proj as a block for each head, as q_proj rightly is: the product of a per-head merge."""
    for part, suffix, gemma in EXPERTS:
        a, b = factors(source.leaves, f"{FRONT}/attn_vec_einsum{suffix}/w")
        layers, heads, dim, rank = a.shape
        for i in range(layers):
            lora_a = np.zeros((heads, rank, heads, dim))
            for n in range(heads):
                lora_a[n, :, n] = a[i, n].T
            lora_b = np.concatenate([b[i, n].T for n in range(heads)], axis=1) * source.scales[part]
            stem = f"{PREFIX}{gemma}.layers.{i}.self_attn.o_proj"
            state[f"{stem}.lora_A.weight"] = tensor(lora_a.reshape(heads * rank, -1).astype(np.float32))
            state[f"{stem}.lora_B.weight"] = tensor(lora_b.astype(np.float32))
    ranks = {
        "^" + re.escape(module.removeprefix(PREFIX)): len(state[f"{module}.lora_A.weight"])
        for module in modules(state, "")
    }
    config |= {"rank_pattern": ranks, "alpha_pattern": ranks}


def one_head(state: State, config: dict[str, Any], source: Golden) -> None:
    """lora_b of the first head, where all are summed."""
    for part, suffix, gemma in EXPERTS:
        _, b = factors(source.leaves, f"{FRONT}/attn_vec_einsum{suffix}/w")
        for i in range(len(b)):
            name = f"{PREFIX}{gemma}.layers.{i}.self_attn.o_proj.lora_B.weight"
            state[name] = tensor((source.scales[part] * b[i, 0].T).astype(np.float32))


def swapped(first: str, second: str) -> Change:
    """The factors of two modules exchanged, in every layer."""

    def change(state: State, config: dict[str, Any], source: Golden) -> None:
        for name in [name for name in state if first in name]:
            other = name.replace(first, second)
            state[name], state[other] = state[other], state[name]

    return change


def shifted(kind: str) -> Change:
    """The factors of one kind of module a layer further."""

    def change(state: State, config: dict[str, Any], source: Golden) -> None:
        names = sorted(name for name in state if re.search(kind, name))
        for half in ("lora_A", "lora_B"):
            layers = [name for name in names if half in name]
            values = [state[name] for name in layers]
            for name, value in zip(layers, values[1:] + values[:1], strict=True):
                state[name] = value

    return change


def altered(name: str, alter: Callable[[Array], Array]) -> Change:
    """One tensor of one factor, changed."""

    def change(state: State, config: dict[str, Any], source: Golden) -> None:
        (found,) = (each for each in state if each.endswith(f"{name}.weight"))
        state[found] = tensor(alter(state[found].numpy()))

    return change


def left_out(kind: str) -> Change:
    """Modules that the adapter does not have."""

    def change(state: State, config: dict[str, Any], source: Golden) -> None:
        for name in [name for name in state if re.search(kind, name)]:
            del state[name]

    return change


def doubled(state: State, config: dict[str, Any], source: Golden) -> None:
    """Another alpha in the config alone."""
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {pattern: 2 * alpha for pattern, alpha in config["alpha_pattern"].items()}


#: mistake -> (how it is made, the modules it makes wrong)
IN_ADAPTER: dict[str, tuple[Change, str]] = {
    "attn_vec_einsum head by head": (blocks_per_head, r"o_proj"),
    "one head for the sum": (one_head, r"o_proj"),
    "attention's scale forgotten": (scaled("self_attn", -1), r"language_model.*self_attn|expert.*self_attn"),
    "feed-forward scaled": (scaled("mlp", 1), r"language_model.*mlp|expert.*mlp"),
    "alpha doubled": (doubled, r"language_model|expert"),
    "gate and up swapped": (swapped("gate_proj", "up_proj"), r"(gate|up)_proj"),
    "k and v swapped": (swapped("k_proj", "v_proj"), r"[kv]_proj"),
    "one layer shifted": (
        shifted(r"gemma_expert.*down_proj"),
        r"gemma_expert.*down_proj",
    ),
    "a factor zeroed": (
        altered("gemma_expert.model.layers.2.self_attn.q_proj.lora_B", np.zeros_like),
        r"gemma_expert.*layers\.2.*q_proj",
    ),
    "exponent bit": (
        altered("gemma_expert.model.layers.0.mlp.gate_proj.lora_A", bit(23, (1, 7))),
        r"gemma_expert.*layers\.0.*gate_proj",
    ),
    "highest bit of a mantissa": (
        altered("language_model.layers.2.self_attn.v_proj.lora_B", bit(22, (5, 1))),
        r"language_model.*layers\.2.*v_proj",
    ),
}


#: leaf, change of its values, weights made wrong
IN_FACTORS: dict[str, tuple[str, Callable[[Array], Array], str]] = {
    "one layer shifted": (
        "mlp/linear_lora_b",
        lambda leaf: np.roll(leaf, 1, axis=0),
        r"language_model.*down_proj",
    ),
    "gate and up swapped": (
        "mlp_1/gating_einsum_lora_a",
        lambda leaf: leaf[:, ::-1],
        r"gemma_expert.*(gate|up)_proj",
    ),
    "heads summed twice": (
        "attn/attn_vec_einsum/lora_b",
        lambda leaf: np.broadcast_to(leaf.sum(1, keepdims=True), leaf.shape),
        r"language_model.*o_proj",
    ),
    "scale folded in and left": ("attn/q_einsum_1/lora_b", lambda leaf: leaf * 2, r"gemma_expert.*q_proj"),
    "a factor zeroed": ("attn/kv_einsum/lora_a", np.zeros_like, r"language_model.*[kv]_proj"),
    "exponent bit": (
        "attn/q_einsum/lora_a",
        bit(24, (1, 2, 3, 0)),
        r"language_model.*\.1\..*q_proj",
    ),
}
