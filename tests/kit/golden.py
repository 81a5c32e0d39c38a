"""The golden checkpoints, and what outputs are held against: recorded runs, simulated runs, names by hand.

Nothing here uses bridge's rules or LoRA algebra: these are the oracles.
"""

import functools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

import bridge
from tests.kit import checkpoints
from tests.kit.checkpoints import Array, Tree

State: TypeAlias = dict[str, torch.Tensor]
Recorded: TypeAlias = Mapping[str, Array]
"""Inputs and outputs of modules: `<module>/<layer>/input`, `<module>/<layer>/output`."""

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "golden"
# The demo's sample is a golden checkpoint, and is kept once.
SAMPLE = ROOT / "cli" / "sample"

NAMES = ("pi0_lora", "pi05_lora", "pi0_base")
WITH_LORA = ("pi0_lora", "pi05_lora")

#: Relative error that float32 itself makes: the recorded outputs are 6.6e-7 from a float64 fold.
TOLERANCE = 2e-6

PALIGEMMA = "paligemma_with_expert.paligemma"
EXPERT = "paligemma_with_expert.gemma_expert"
#: Part, suffix of its leaves, PyTorch prefix of its Gemma.
EXPERTS = (("paligemma", "", f"{PALIGEMMA}.model.language_model"), ("expert", "_1", f"{EXPERT}.model"))
LM_HEAD = f"{PALIGEMMA}.lm_head.weight"
EMBED_TOKENS = f"{PALIGEMMA}.model.language_model.embed_tokens.weight"
DEAD_HEAD = f"{EXPERT}.lm_head.weight"

BLOCK = "PaliGemma/llm/layers"

#: Prefixes of openpi's names and of PI0ForConditionalGeneration's own modules.
TRANSFORMERS = {
    "paligemma_with_expert.paligemma.model.vision_tower.vision_model.": "model.vlm.vision_tower.",
    "paligemma_with_expert.paligemma.model.multi_modal_projector.": "model.vlm.multi_modal_projector.",
    "paligemma_with_expert.paligemma.model.language_model.": "model.vlm.language_model.",
    "paligemma_with_expert.paligemma.lm_head.": "model.vlm.language_model.embed_tokens.",
    "paligemma_with_expert.gemma_expert.model.": "model.dit.",
    "paligemma_with_expert.gemma_expert.lm_head.": "model.dit.embed_tokens.",
    "action_in_proj.": "embed_action_time.action_in_proj.",
    "action_out_proj.": "action_out_proj.",
    "state_proj.": "embed_action_time.state_proj.",
    "action_time_mlp_": "embed_action_time.action_time_mlp_",
}


@dataclass(frozen=True)
class Golden:
    """A checkpoint that openpi saved, and what its runtime computed from it."""

    name: str

    @functools.cached_property
    def home(self) -> Path:
        return SAMPLE / self.name if self.name == "pi0_lora" else DATA / self.name

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.home / "facts.json").read_text())
        return facts

    @functools.cached_property
    def checkpoint(self) -> Path:
        """What a user names: a step directory, or a release."""
        return self.home / str(self.facts["checkpoint"])

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """What converting it takes: the alphas, which no checkpoint stores."""
        alphas = {expert: lora["alpha"] for expert, lora in self.facts["lora"].items()}
        return {"lora_alpha": alphas} if alphas else {}

    @functools.cached_property
    def scales(self) -> dict[str, float]:
        return {expert: lora["alpha"] / lora["rank"] for expert, lora in self.facts["lora"].items()}

    @functools.cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Names and shapes in the state_dict of openpi's PyTorch model."""
        shapes: dict[str, list[int]] = json.loads((DATA / self.name / "torch_shapes.json").read_text())
        return shapes

    @functools.cached_property
    def runtime(self) -> Recorded:
        """What openpi's modules returned for random inputs."""
        return dict(np.load(self.home / "runtime.npz"))

    @functools.cached_property
    def actions(self) -> Recorded:
        """One observation, the noise, and the actions that openpi sampled."""
        return dict(np.load(DATA / self.name / "sample_actions.npz"))

    @functools.cached_property
    def leaves(self) -> Tree:
        """The leaves as Orbax itself restores them."""
        return checkpoints.restore(self.checkpoint)


@functools.cache
def golden(name: str) -> Golden:
    return Golden(name)


# Outputs.


def convert(src: Path, dst: Path, **options: Any) -> State:
    """Convert to `torch-merged`, and read what safetensors finds in the file."""
    bridge.convert(src, dst, **{"to": "torch-merged", **options})
    return read(dst)


def read(directory: Path) -> State:
    """The tensors of an output, as safetensors loads them."""
    state: State = safetensors.torch.load_file(directory / "model.safetensors")
    return state


def header(directory: Path) -> dict[str, str]:
    """The metadata in the header of an output."""
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        return dict(file.metadata())


def files(directory: Path) -> dict[str, bytes]:
    """Everything below a directory: path to bytes."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


# Bits.


def tensor(array: Array) -> torch.Tensor:
    """A tensor of the same bits."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits(value: torch.Tensor) -> bytes:
    """Its bytes in C order."""
    raw: bytes = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw


def differing(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> set[str]:
    """Names that only one side has, or whose dtype, shape or bits differ."""
    return (expected.keys() ^ found.keys()) | {
        name
        for name in expected.keys() & found.keys()
        if expected[name].dtype != found[name].dtype
        or expected[name].shape != found[name].shape
        or bits(expected[name]) != bits(found[name])
    }


def by_hand(leaves: Mapping[str, Array]) -> State:
    """Every tensor of openpi's PyTorch model (tied name aside) from the leaves, factors left out.

    One explicit transpose a line, heads put together one by one: the mapping a second time, not
    from bridge's table.
    """
    named: Tree = {
        LM_HEAD: leaves["PaliGemma/llm/embedder/input_embedding"],
        DEAD_HEAD: np.zeros(
            (len(leaves["PaliGemma/llm/embedder/input_embedding"]), len(leaves["action_in_proj/bias"])),
            np.float32,
        ),
    }
    for name in ("action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out",
                 "time_mlp_in", "time_mlp_out"):  # fmt: skip
        if f"{name}/kernel" in leaves:
            named[f"{name}.weight"] = leaves[f"{name}/kernel"].T
            named[f"{name}.bias"] = leaves[f"{name}/bias"]
    named.update(_tower(leaves))
    for _, suffix, gemma in EXPERTS:
        named.update(_gemma(leaves, suffix, gemma))
    return {name: tensor(array) for name, array in named.items()}


def _tower(leaves: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    image, tower = "PaliGemma/img", f"{PALIGEMMA}.model.vision_tower.vision_model"
    yield (
        f"{tower}.embeddings.patch_embedding.weight",
        leaves[f"{image}/embedding/kernel"].transpose(3, 2, 0, 1),
    )
    yield f"{tower}.embeddings.patch_embedding.bias", leaves[f"{image}/embedding/bias"]
    yield f"{tower}.embeddings.position_embedding.weight", leaves[f"{image}/pos_embedding"][0]
    yield f"{tower}.post_layernorm.weight", leaves[f"{image}/Transformer/encoder_norm/scale"]
    yield f"{tower}.post_layernorm.bias", leaves[f"{image}/Transformer/encoder_norm/bias"]
    yield f"{PALIGEMMA}.model.multi_modal_projector.linear.weight", leaves[f"{image}/head/kernel"].T
    yield f"{PALIGEMMA}.model.multi_modal_projector.linear.bias", leaves[f"{image}/head/bias"]
    block = f"{image}/Transformer/encoderblock"
    attention, mlp = f"{block}/MultiHeadDotProductAttention_0", f"{block}/MlpBlock_0"
    for i in range(len(leaves[f"{block}/LayerNorm_0/scale"])):
        layer = f"{tower}.encoder.layers.{i}"
        for jax, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
            yield f"{layer}.{theirs}.weight", leaves[f"{block}/{jax}/scale"][i]
            yield f"{layer}.{theirs}.bias", leaves[f"{block}/{jax}/bias"][i]
        for jax, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            kernel, bias = leaves[f"{attention}/{jax}/kernel"][i], leaves[f"{attention}/{jax}/bias"][i]
            heads = range(kernel.shape[1])  # kernel: width, head, dim
            yield f"{layer}.self_attn.{theirs}.weight", np.concatenate([kernel[:, n].T for n in heads])
            yield f"{layer}.self_attn.{theirs}.bias", np.concatenate([bias[n] for n in heads])
        kernel = leaves[f"{attention}/out/kernel"][i]  # head, dim, width
        out = np.concatenate([kernel[n].T for n in range(len(kernel))], axis=1)
        yield f"{layer}.self_attn.out_proj.weight", out
        yield f"{layer}.self_attn.out_proj.bias", leaves[f"{attention}/out/bias"][i]
        for jax, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            yield f"{layer}.mlp.{theirs}.weight", leaves[f"{mlp}/{jax}/kernel"][i].T
            yield f"{layer}.mlp.{theirs}.bias", leaves[f"{mlp}/{jax}/bias"][i]


def _gemma(leaves: Mapping[str, Array], suffix: str, gemma: str) -> Iterator[tuple[str, Array]]:
    attention, mlp = f"{BLOCK}/attn", f"{BLOCK}/mlp{suffix}"

    def norm(leaf: str, weight: str, at: Any) -> Iterator[tuple[str, Array]]:
        if f"{leaf}/scale" in leaves:
            yield f"{weight}.weight", leaves[f"{leaf}/scale"][at]
        else:
            yield f"{weight}.dense.weight", leaves[f"{leaf}/Dense_0/kernel"][at].T
            yield f"{weight}.dense.bias", leaves[f"{leaf}/Dense_0/bias"][at]

    yield from norm(f"PaliGemma/llm/final_norm{suffix}", f"{gemma}.norm", ...)
    for i in range(len(leaves[f"{mlp}/linear"])):
        layer = f"{gemma}.layers.{i}"
        fused = leaves.get(f"{attention}/qkv_einsum{suffix}/w")
        if fused is None:
            q = leaves[f"{attention}/q_einsum{suffix}/w"][i]
            k, v = leaves[f"{attention}/kv_einsum{suffix}/w"][i]
        else:
            q, k, v = fused[i]
        for name, w in (("q_proj", q), ("k_proj", k), ("v_proj", v)):  # head, width, dim
            yield f"{layer}.self_attn.{name}.weight", np.concatenate([head.T for head in w])
        w = leaves[f"{attention}/attn_vec_einsum{suffix}/w"][i]  # head, dim, width
        yield f"{layer}.self_attn.o_proj.weight", np.concatenate([head.T for head in w], axis=1)
        gate, up = leaves[f"{mlp}/gating_einsum"][i]
        yield f"{layer}.mlp.gate_proj.weight", gate.T
        yield f"{layer}.mlp.up_proj.weight", up.T
        yield f"{layer}.mlp.down_proj.weight", leaves[f"{mlp}/linear"][i].T
        yield from norm(f"{BLOCK}/pre_attention_norm{suffix}", f"{layer}.input_layernorm", i)
        yield from norm(f"{BLOCK}/pre_ffw_norm{suffix}", f"{layer}.post_attention_layernorm", i)


def merged_names(leaves: Mapping[str, Array]) -> set[str]:
    """The weights that factors are summed into."""
    return {
        name
        for _, suffix, gemma in EXPERTS
        if f"{BLOCK}/mlp{suffix}/linear_lora_a" in leaves
        for i in range(len(leaves[f"{BLOCK}/mlp{suffix}/linear"]))
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        for name in [f"{gemma}.layers.{i}.{module}.weight"]
    }  # fmt: skip


def held_in_float32(name: str) -> bool:
    """Whether openpi's PyTorch runtime keeps this tensor in float32 in a bfloat16 policy."""
    return (
        ".embeddings." in name
        or name.startswith((f"{PALIGEMMA}.model.language_model.norm.", f"{EXPERT}.model.norm."))
        or ".input_layernorm." in name
        or ".post_attention_layernorm." in name
    )


# Function: what a merged weight computes, against what openpi computes.


def runtime_errors(recorded: Recorded, state: State, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Relative error of every recorded module when its merged weights are plain linear layers.

    max |difference| / max |recorded|, by `<module>/<layer>`.
    """
    assert torch.get_float32_matmul_precision() == "highest"
    errors = {}
    for key in recorded:
        if not key.endswith("/input"):
            continue
        module = key.removesuffix("/input")
        x = torch.from_numpy(recorded[key]).to(dtype)
        reference = recorded[f"{module}/output"].astype(np.float64)
        got = _linear(module, x, state, reference.shape).to(torch.float64).numpy()
        errors[module] = float(np.abs(got - reference).max() / np.abs(reference).max())
    assert errors, "nothing was compared"
    return errors


def _linear(module: str, x: torch.Tensor, state: State, shape: tuple[int, ...]) -> torch.Tensor:
    parsed = re.fullmatch(rf"{BLOCK}/(?:attn/)?(\w+?)(_1)?/(\d+)", module)
    assert parsed is not None, module
    kind, suffix, number = parsed.groups()
    layer = f"{EXPERTS[suffix == '_1'][2]}.layers.{number}"

    def apply(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{layer}.{name}.weight"].to(x.dtype))

    if kind == "mlp":
        gate = F.gelu(apply("mlp.gate_proj", x), approximate="tanh")
        return apply("mlp.down_proj", gate * apply("mlp.up_proj", x))
    if kind == "attn_vec_einsum":
        return apply("self_attn.o_proj", x.flatten(-2))
    names = {"q_einsum": "q", "kv_einsum": "kv", "qkv_einsum": "qkv"}[kind]
    return torch.stack([apply(f"self_attn.{name}_proj", x) for name in names]).reshape(shape)


#: openpi's einsums (models/gemma.py). numpy takes no digits: "2" and "3" are written "Z".
EQUATIONS = {
    "q_einsum": "BTD,NDH->BTNH",
    "kv_einsum": "BSD,ZKDH->ZBSKH",
    "qkv_einsum": "BSD,ZKDH->ZBSKH",
    "attn_vec_einsum": "BTNH,NHD->BTD",
}


def simulate(
    leaves: Mapping[str, Array], scales: Mapping[str, float], inputs: Recorded | None = None
) -> Tree:
    """What openpi's modules compute from weights and factors, in float64: `Einsum`, `FeedForward`.

    The factors are applied one after the other, as models/lora.py does; nothing is folded.

    Args:
        leaves: the checkpoint.
        scales: factor of the attention's LoRA product, by part.
        inputs: recorded inputs to take; random ones otherwise.
    """
    recorded: Tree = {}
    for part, suffix, _ in EXPERTS:
        scale = scales.get(part, 0.0)
        for i in range(len(leaves[f"{BLOCK}/mlp{suffix}/linear"])):
            for kind, equation in EQUATIONS.items():
                leaf, key = f"{BLOCK}/attn/{kind}{suffix}", f"{BLOCK}/attn/{kind}{suffix}/{i}"
                if f"{leaf}/w" not in leaves:
                    continue
                w, a, b = (_layer(leaves, f"{leaf}/{name}", i) for name in ("w", "lora_a", "lora_b"))
                assert w is not None
                width = w.shape[:-1] if kind == "attn_vec_einsum" else w.shape[-2:-1]
                x = _input(key, inputs, width)
                recorded[f"{key}/input"] = x
                recorded[f"{key}/output"] = _einsum(equation, x.astype(np.float64), w, a, b, scale)
            mlp, key = f"{BLOCK}/mlp{suffix}", f"{BLOCK}/mlp{suffix}/{i}"
            gating, a, b = (
                _layer(leaves, f"{mlp}/gating_einsum{name}", i) for name in ("", "_lora_a", "_lora_b")
            )
            assert gating is not None
            x = _input(key, inputs, gating.shape[1:2])
            gate, up = (
                _dot(
                    x.astype(np.float64),
                    gating[j],
                    *((None, None) if a is None or b is None else (a[j], b[j])),
                )
                for j in (0, 1)
            )
            linear, a, b = (_layer(leaves, f"{mlp}/linear{name}", i) for name in ("", "_lora_a", "_lora_b"))
            assert linear is not None
            recorded[f"{key}/input"] = x
            recorded[f"{key}/output"] = _dot(_gelu(gate) * up, linear, a, b)
    return recorded


def _layer(leaves: Mapping[str, Array], name: str, layer: int) -> npt.NDArray[np.float64] | None:
    return leaves[name][layer].astype(np.float64) if name in leaves else None


def _input(key: str, inputs: Recorded | None, width: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if inputs is not None:
        return inputs[f"{key}/input"]
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal((2, 5, *width), dtype=np.float32)


def _einsum(equation: str, x: Array, w: Array, a: Array | None, b: Array | None, scale: float) -> Array:
    result: Array = np.einsum(equation, x, w)
    if a is not None and b is not None:
        # lora.Einsum._make_lora_eqns, with LoRAConfig's axes (-2, -1) and label "L"
        lhs, rhs, out = re.split(",|->", equation)
        a_label, b_label = rhs[-2], rhs[-1]
        a_out = out.replace(b_label, "L")
        inner = np.einsum(f"{lhs},{rhs.replace(b_label, 'L')}->{a_out}", x, a)
        result = result + scale * np.einsum(f"{a_out},{rhs.replace(a_label, 'L')}->{out}", inner, b)
    return result


def _dot(x: Array, w: Array, a: Array | None, b: Array | None) -> Array:
    return x @ w if a is None or b is None else x @ w + (x @ a) @ b


def _gelu(x: Array) -> Array:
    inside = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    result: Array = 0.5 * x * (1 + np.tanh(inside))
    return result


# openpi's strict load.


def module_of(shapes: Mapping[str, list[int]]) -> torch.nn.Module:
    """A module with exactly these parameters, and the two embeddings tied, as in openpi's model."""
    root = torch.nn.Module()
    tied = torch.nn.Parameter(torch.full(tuple(shapes[LM_HEAD]), torch.nan))
    for name, shape in shapes.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, torch.nn.Module())
            node = node.get_submodule(parent)
        own = torch.nn.Parameter(torch.full(tuple(shape), torch.nan))
        node.register_parameter(last, tied if name in (LM_HEAD, EMBED_TOKENS) else own)
    return root
