"""openpi's online LoRA in jax, written by hand after its models/lora.py, and the gradients that reach it."""

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.kit import golden
from tests.kit.checkpoints import Array, Tree
from tests.kit.golden import BLOCK

#: openpi's einsums of a pair (models/lora.py), a layer at a time: the input, `a`, what is between, `b`, the output.
#: Each entry between the two, the batch aside, trains by itself
EINSUMS = {
    "q_einsum": ("BTD", "NDL", "BTNL", "NLH", "BTNH"),
    "kv_einsum": ("BTD", "CKDL", "CBTKL", "CKLH", "CBTKH"),
    "qkv_einsum": ("BTD", "CNDL", "CBTNL", "CNLH", "CBTNH"),
    "attn_vec_einsum": ("BTNH", "NHL", "BTL", "NLD", "BTD"),
    "gating_einsum": ("BTD", "CDL", "CBTL", "CLF", "CBTF"),
    "linear": ("BTF", "FL", "BTL", "LD", "BTD"),
}


def einsum_lora(
    leaves: Mapping[str, Array], leaf: str, layer: int, equation: str, x: Array, scale: float
) -> jax.Array:
    """`lora.Einsum.__call__`, with LoRAConfig's axes (-2, -1) and label "L"."""
    result = jnp.einsum(equation, x, leaves[f"{leaf}/w"][layer])
    if f"{leaf}/lora_a" in leaves:
        lhs, rhs, out = re.split(",|->", equation)
        a_label, b_label = rhs[-2], rhs[-1]
        a_out = out.replace(b_label, "L")
        lora = jnp.einsum(f"{lhs},{rhs.replace(b_label, 'L')}->{a_out}", x, leaves[f"{leaf}/lora_a"][layer])
        lora = jnp.einsum(
            f"{a_out},{rhs.replace(a_label, 'L')}->{out}", lora, leaves[f"{leaf}/lora_b"][layer]
        )
        result = result + lora * scale
    return result


def dot_lora(leaves: Mapping[str, Array], leaf: str, at: tuple[int, ...], x: Array) -> jax.Array:
    """`lora.FeedForward._dot`, which applies no scale."""
    result = jnp.dot(x, leaves[leaf][at])
    if f"{leaf}_lora_a" in leaves:
        result = result + jnp.dot(jnp.dot(x, leaves[f"{leaf}_lora_a"][at]), leaves[f"{leaf}_lora_b"][at])
    return result


def online(
    leaves: Mapping[str, Array], scales: Mapping[str, float]
) -> Iterator[tuple[str, Array, jax.Array]]:
    """Every projection: its path in PyTorch, a random input as PyTorch takes it, openpi's output."""
    assert jax.config.jax_default_matmul_precision in (None, "highest")
    rng = np.random.default_rng(3)

    def random(*shape: int) -> jax.Array:
        return rng.standard_normal(shape, dtype=np.float32)

    for part, suffix, prefix in golden.EXPERTS:
        scale = scales.get(part, float("nan"))
        for i in range(len(leaves[f"{BLOCK}/mlp{suffix}/linear"])):
            attention, layer = f"{BLOCK}/attn", f"{prefix}.layers.{i}"
            width = leaves[f"{BLOCK}/mlp{suffix}/linear"].shape[-1]
            x = random(2, 5, width)
            if f"{attention}/qkv_einsum{suffix}/w" in leaves:
                out = einsum_lora(leaves, f"{attention}/qkv_einsum{suffix}", i, "BSD,3KDH->3BSKH", x, scale)
                for name, one in zip("qkv", out, strict=True):
                    yield f"{layer}.self_attn.{name}_proj", x, one.reshape(2, 5, -1)
            else:
                out = einsum_lora(leaves, f"{attention}/q_einsum{suffix}", i, "BTD,NDH->BTNH", x, scale)
                yield f"{layer}.self_attn.q_proj", x, out.reshape(2, 5, -1)
                out = einsum_lora(leaves, f"{attention}/kv_einsum{suffix}", i, "BSD,2KDH->2BSKH", x, scale)
                for name, one in zip("kv", out, strict=True):
                    yield f"{layer}.self_attn.{name}_proj", x, one.reshape(2, 5, -1)
            heads, dim = leaves[f"{attention}/attn_vec_einsum{suffix}/w"].shape[1:3]
            y = random(2, 5, heads, dim)
            out = einsum_lora(leaves, f"{attention}/attn_vec_einsum{suffix}", i, "BTNH,NHD->BTD", y, scale)
            yield f"{layer}.self_attn.o_proj", y.reshape(2, 5, -1), out
            for j, name in enumerate(("gate", "up")):
                yield (
                    f"{layer}.mlp.{name}_proj",
                    x,
                    dot_lora(leaves, f"{BLOCK}/mlp{suffix}/gating_einsum", (i, j), x),
                )
            z = random(2, 5, leaves[f"{BLOCK}/mlp{suffix}/linear"].shape[1])
            yield f"{layer}.mlp.down_proj", z, dot_lora(leaves, f"{BLOCK}/mlp{suffix}/linear", (i,), z)


# Gradients.


def jax_gradients(leaves: Mapping[str, Array], scales: Mapping[str, float]) -> Tree:
    """Of the LoRA leaves by jax.grad, where every projection is pulled towards random outputs."""
    factors = {leaf: jnp.asarray(array, jnp.float32) for leaf, array in leaves.items() if "lora" in leaf}

    def loss(factors: Mapping[str, Any]) -> jax.Array:
        total = jnp.zeros(())
        for path, _, out in online({**leaves, **factors}, scales):
            rng = np.random.default_rng(zlib.crc32(path.encode()))
            total += jnp.mean((out - rng.standard_normal(out.shape, dtype=np.float32)) ** 2)
        return total

    return {leaf: np.asarray(array) for leaf, array in jax.jit(jax.grad(loss))(factors).items()}


def gradients(leaves: Mapping[str, Array]) -> Tree:
    """Of the LoRA leaves by hand, for random inputs and random gradients of the outputs: jax takes seconds."""
    found: Tree = {}
    for stem in stems(leaves):
        x, a, between, b, out = EINSUMS[_kind(stem)]
        pairs = zip(leaves[f"{stem}a"], leaves[f"{stem}b"], strict=True)
        layers = []
        for number, pair in enumerate(pairs):
            first, second = (factor.astype(np.float64) for factor in pair)
            sizes = dict(zip(a, first.shape, strict=True)) | dict(zip(b, second.shape, strict=True))
            rng = np.random.default_rng([number, zlib.crc32(stem.encode())])
            given, pulled = (
                rng.standard_normal([sizes.get(label, 3) for label in labels]) for labels in (x, out)
            )
            middle = np.einsum(f"{x},{a}->{between}", given, first)
            back = np.einsum(f"{out},{b}->{between}", pulled, second)
            layers.append(
                (
                    np.einsum(f"{x},{between}->{a}", given, back),
                    np.einsum(f"{between},{out},{b}->{b}", middle, pulled, np.ones_like(second)),
                )
            )
        for which, of_layers in zip("ab", zip(*layers, strict=True), strict=True):
            found[f"{stem}{which}"] = np.stack(of_layers)
    return found


def stems(leaves: Mapping[str, Array]) -> list[str]:
    """The pairs, by their paths up to `a` or `b`."""
    return [leaf[:-1] for leaf in leaves if leaf.endswith("lora_a")]


def _kind(stem: str) -> str:
    return next(kind for kind in EINSUMS if re.search(rf"/{kind}(_1)?[/_]lora_$", stem))


def _reached(stem: str, gradient: Mapping[str, Array]) -> dict[str, Array]:
    """For each factor of a pair, which entries between the einsums it gets a gradient at."""
    _, a, between, b, _ = EINSUMS[_kind(stem)]
    own = "Y" + between.replace("B", "").replace("T", "")
    return {
        which: np.einsum(f"Y{labels}->{own}", np.abs(gradient[f"{stem}{which}"])) > 0
        for which, labels in (("a", a), ("b", b))
    }


def dead_ranks(leaves: Mapping[str, Array], gradient: Mapping[str, Array] | None = None) -> dict[str, int]:
    """For each pair: how many of its ranks get a gradient in neither factor."""
    gradient = gradients(leaves) if gradient is None else gradient
    dead = {}
    for stem in stems(leaves):
        reached = _reached(stem, gradient)
        dead[stem] = int(np.count_nonzero(~(reached["a"] | reached["b"])))
    return dead


def untrained_after_a_step(
    leaves: Mapping[str, Array], gradient: Mapping[str, Array] | None = None
) -> list[str]:
    """The factors with an entry that no gradient reaches once both have taken one step."""
    changes = gradients(leaves) if gradient is None else gradient
    stepped = {leaf: leaves[leaf].astype(np.float64) - changes[leaf] for leaf in changes}
    second = gradients(stepped)
    return [
        f"{stem}{which}"
        for stem in stems(stepped)
        for which, reached in _reached(stem, second).items()
        if not reached.all()
    ]
