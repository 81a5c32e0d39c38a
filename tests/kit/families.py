"""Families that no test of one runtime has: a leaf a layer, layers along axis 1, factors by role.

Beside each stands what its runtime computes, as einsums written by hand; nothing here uses bridge's algebra.

Labels: T token, D width, N head, H dim, K group, C k|v or gate|up, F hidden, V vocabulary, Y layer, R rank.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bridge import Factoring, Family, Layout, Model, Part, Rule, Tree, by_role

Array: TypeAlias = npt.NDArray[Any]
Leaves: TypeAlias = dict[str, Array]
Outputs: TypeAlias = dict[str, tuple[Array, Array]]
"""By weight: an input (tokens, in), and what the runtime makes of it (tokens, out). float64."""

TOKENS = 6
#: primes, no two alike but for the architecture's 2; heads x dim is not the width, and alpha not the rank
SIZES = dict(zip("DNHKCFVYR", (29, 13, 11, 7, 2, 17, 19, 3, 5), strict=True))
LAYERS, RANK, ALPHA = SIZES["Y"], SIZES["R"], 3.0

_LAYOUTS = (
    Layout(name="plain", loading="model = PeftModel.from_pretrained(BASE, ADAPTER)"),
    Layout(name="inner", prefixes=(("model.", "language.model."),)),
)


@dataclass(frozen=True)
class Applied:
    """A leaf with its factors, and the einsums by which its runtime applies them."""

    leaf: str
    """With ``{layer}`` where each layer has a leaf of its own."""
    a: str
    b: str
    weight: str
    """PyTorch name, with ``{layer}`` and ``{word}``."""
    base: str
    """Its output begins with Y, where layers are stacked, and C, where there are words."""
    lora: tuple[str, str]
    words: tuple[str, ...] = ("",)

    def weights(self) -> Iterator[tuple[dict[str, int], tuple[int, ...], str]]:
        """Every weight: its leaf's numbers, its place in the output, its name."""
        stacked = "Y" in self.base
        for layer, (number, word) in itertools.product(range(LAYERS), enumerate(self.words)):
            index = (layer,) * stacked + (number,) * ("C" in self.base)
            yield {"layer": layer}, index, self.weight.format(layer=layer, word=word)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every leaf and factor, and its shape."""
        for layer in range(1 if "Y" in self.base else LAYERS):
            for path, einsum in ((self.leaf, self.base), *zip((self.a, self.b), self.lora, strict=True)):
                labels = einsum.split("->")[0].split(",")[1]
                yield path.format(layer=layer), tuple(SIZES[label] for label in labels)


@dataclass(frozen=True)
class Plain:
    """Leaves that no LoRA applies to: the PyTorch tensor is equal, axis by axis."""

    leaf: str
    weight: str
    labels: str


@dataclass(frozen=True)
class Toy:
    """A family of one model, and what its runtime computes."""

    family: Family
    applied: tuple[Applied, ...]
    plain: tuple[Plain, ...]
    scale: float

    @property
    def alphas(self) -> dict[str, Any]:
        """The options that converting its factors takes."""
        return {"lora_alpha": ALPHA} if self.scale != 1 else {}

    def shapes(self, *, lora: bool) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for each in self.applied:
            own = {each.a, each.b}
            for path, shape in each.shapes():
                if lora or not any(path == factor.format(layer=n) for factor in own for n in range(LAYERS)):
                    shapes[path] = shape
        for plain in self.plain:
            for layer in range(LAYERS):
                shapes[plain.leaf.format(layer=layer)] = tuple(SIZES[label] for label in plain.labels)
        return shapes

    def leaves(self, *, lora: bool = True, dtype: npt.DTypeLike = np.float32) -> Leaves:
        """Random leaves by path, the same with and without factors."""
        made = {}
        for path, shape in self.shapes(lora=lora).items():
            random = np.random.default_rng(zlib.crc32(path.encode()))
            made[path] = (random.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)
        return made

    def outputs(self, leaves: Mapping[str, Array], *, lora: bool = True, seed: int = 7) -> Outputs:
        """What the runtime computes with every weight that it applies to an input."""
        outputs: Outputs = {}
        for each in self.applied:
            made: dict[str, tuple[Array, Array]] = {}
            for numbers, index, name in each.weights():
                leaf = each.leaf.format(**numbers)
                if leaf not in made:
                    made[leaf] = self._run(each, leaves, numbers, lora, seed)
                x, out = made[leaf]
                outputs[name] = x.reshape(TOKENS, -1), out[index].reshape(TOKENS, -1)
        return outputs

    def _run(
        self, each: Applied, leaves: Mapping[str, Array], numbers: Mapping[str, int], lora: bool, seed: int
    ) -> tuple[Array, Array]:
        leaf, a, b = (path.format(**numbers) for path in (each.leaf, each.a, each.b))
        labels = each.base.split(",")[0]
        x = np.random.default_rng(seed).standard_normal([TOKENS, *(SIZES[label] for label in labels[1:])])
        out = np.einsum(each.base, x, leaves[leaf].astype(np.float64))
        if lora:
            first, second = each.lora
            middle = np.einsum(first, x, leaves[a].astype(np.float64))
            out = out + self.scale * np.einsum(second, middle, leaves[b].astype(np.float64))
        return x, out

    def equal(self, leaves: Mapping[str, Array]) -> Leaves:
        """Weights that are leaves as they are, by PyTorch name."""
        return {
            plain.weight.format(layer=layer): leaves[plain.leaf.format(layer=layer)][
                (..., layer) if plain.labels.endswith("Y") else ...
            ]
            for plain in self.plain
            for layer in range(LAYERS)
        }


def save(leaves: Mapping[str, Array], path: Path, tree: Tree) -> Path:
    """Write leaves as Orbax itself saves a pytree: the directory is the checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    root: dict[str, Any] = {}
    for name, array in leaves.items():
        *parents, last = f"{tree.root}{name}{tree.suffix}".split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jax.device_put(array)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(root))
    return path


def restore(path: Path, tree: Tree, *, suffixed: bool = True) -> Leaves:
    """Leaves by path, as Orbax restores them from an output."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(path.absolute() / "params")
    found = {}
    for keys, array in jax.tree_util.tree_flatten_with_path(restored)[0]:
        name = "/".join(str(key.key) for key in keys)
        assert name.startswith(tree.root) and (not suffixed or name.endswith(tree.suffix))
        name = name.removeprefix(tree.root)
        found[name.removesuffix(tree.suffix) if suffixed and tree.suffix else name] = np.asarray(array)
    return found


def state_of(directory: Path) -> Leaves:
    """The tensors of an output, as safetensors loads them."""
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


def linear_error(outputs: Outputs, state: Mapping[str, Array]) -> float:
    """Largest error of a runtime's output where its weights are plain linear layers, over its largest output."""
    errors = []
    for name, (x, expected) in outputs.items():
        made = x @ state[name].astype(np.float64).T
        errors.append(float(np.abs(made - expected).max() / np.abs(expected).max()))
    return max(errors)


def peft_error(outputs: Outputs, base: Mapping[str, Array], adapter: Path) -> float:
    """The same for the base's linear layers with an adapter that PEFT loads onto them, in float64."""
    import torch
    from peft import PeftModel

    root = torch.nn.Module()
    root.config = {"model_type": "custom"}  # type: ignore[assignment]
    for name, array in base.items():
        *parents, last = name.removesuffix(".weight").split(".")
        node = root
        for part in parents:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node.get_submodule(part)
        if array.ndim == 2:
            linear = torch.nn.Linear(array.shape[1], array.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(torch.from_numpy(array.astype(np.float32)))
            node.add_module(last, linear)
        else:
            node.add_module(last, torch.nn.Module())
    model = PeftModel.from_pretrained(root, str(adapter)).double()
    errors = []
    with torch.no_grad():
        for name, (x, expected) in outputs.items():
            module = model.base_model.model.get_submodule(name.removesuffix(".weight"))
            assert hasattr(module, "lora_A"), f"PEFT gives no LoRA to {name}"
            made = module(torch.from_numpy(x)).numpy()
            errors.append(float(np.abs(made - expected).max() / np.abs(expected).max()))
    return max(errors)


# A leaf a layer, factors by role, as google-deepmind/gemma and Tunix store them.


def _unstacked(
    name: str, tree: Tree, layer: str, factors: Mapping[str, tuple[str, str, str]], *, scale: float
) -> Toy:
    """Args:
    layer: path of a layer, with ``{layer}``.
    factors: of each leaf: what its factors replace, and the endings of both.
    scale: 1 for a runtime that never scales.
    """
    attention, mlp = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    leaves = {
        "q": f"{layer}/attn/q_einsum/w",
        "kv": f"{layer}/attn/kv_einsum/w",
        "o": f"{layer}/attn/attn_vec_einsum/w",
        "gating": f"{layer}/mlp/gating_einsum",
        "linear": f"{layer}/mlp/linear",
    }
    factoring = {
        kind: Factoring(leaf=leaf, a=a, b=b, rank="rank", scaled=scale != 1, axes=by_role, name="LoRA")
        for kind, (leaf, a, b) in factors.items()
    }
    rules = (
        Rule("embedder/input_embedding", "model.embed_tokens.weight", "vocab width -> vocab width"),
        Rule("final_norm/scale", "model.norm.weight", "width -> width", dtype="float32"),
        Rule(f"{layer}/norm/scale", "model.layers.{layer}.norm.weight", "width -> width", dtype="float32"),
        Rule(leaves["q"], attention + ".q_proj.weight", "head width dim -> (head dim) width",
             factoring["q"], "BTD,NDH->BTNH"),
        Rule(leaves["kv"], attention + ".{kv:k_proj|v_proj}.weight", "kv group width dim -> (group dim) width",
             factoring["kv"], "BSD,KDH->BSKH"),
        Rule(leaves["o"], attention + ".o_proj.weight", "head dim width -> width (head dim)",
             factoring["o"], "BTNH,NHD->BTD"),
        Rule(leaves["gating"], mlp + ".{branch:gate_proj|up_proj}.weight",
             "branch hidden width -> hidden width", factoring["gating"], "BTD,FD->BTF"),
        Rule(leaves["linear"], mlp + ".down_proj.weight", "hidden width -> width hidden",
             factoring["linear"], "BTF,FD->BTD"),
    )  # fmt: skip

    def applied(kind: str, weight: str, base: str, first: str, second: str, *words: str) -> Applied:
        replaced, a, b = factors[kind]
        stem = leaves[kind].removesuffix(replaced)
        return Applied(leaves[kind], stem + a, stem + b, weight, base, (first, second), words or ("",))

    return Toy(
        Family(
            name=name,
            title=f"Toy {name}",
            models=(
                Model(
                    name=name, parts=(Part("body", rules),), layouts=_LAYOUTS, stock={"body.dim": SIZES["H"]}
                ),
            ),
            tree=tree,
        ),
        (
            applied("q", attention + ".q_proj.weight", "TD,NDH->TNH", "TD,DR->TR", "TR,RNH->TNH"),
            applied(
                "kv",
                attention + ".{word}_proj.weight",
                "TD,CKDH->CTKH",
                "TD,DR->TR",
                "TR,RCKH->CTKH",
                "k",
                "v",
            ),
            applied("o", attention + ".o_proj.weight", "TNH,NHD->TD", "TNH,NHR->TR", "TR,RD->TD"),
            applied(
                "gating", mlp + ".{word}_proj.weight", "TD,CFD->CTF", "TD,DR->TR", "TR,RCF->CTF", "gate", "up"
            ),
            applied("linear", mlp + ".down_proj.weight", "TF,FD->TD", "TF,FR->TR", "TR,RD->TD"),
        ),
        (
            Plain("embedder/input_embedding", "model.embed_tokens.weight", "VD"),
            Plain("final_norm/scale", "model.norm.weight", "D"),
            Plain(f"{layer}/norm/scale", "model.layers.{layer}.norm.weight", "D"),
        ),
        scale,
    )


_ADAPTER = ("/w", "/_LoRAEinsum_0/lora/a", "/_LoRAEinsum_0/lora/b")

#: no scale, nothing around the paths
UNSCALED = _unstacked(
    "unscaled",
    Tree(root="", suffix=""),
    "layer_{layer}",
    {
        "q": _ADAPTER,
        "kv": _ADAPTER,
        "o": _ADAPTER,
        "gating": (
            "/gating_einsum",
            "/_LoRAEinsum_gating_einsum/lora/a",
            "/_LoRAEinsum_gating_einsum/lora/b",
        ),
        "linear": ("/linear", "/_LoRAEinsum_linear/lora/a", "/_LoRAEinsum_linear/lora/b"),
    },
    scale=1.0,
)

#: alpha / rank everywhere, and a suffix after every path
SCALED = _unstacked(
    "scaled",
    Tree(root="model/", suffix="/raw"),
    "layers/{layer}",
    dict.fromkeys(("q", "kv", "o", "gating", "linear"), ("", "_lora_a", "_lora_b")),
    scale=ALPHA / RANK,
)


# Layers along axis 1, as MaxText scans them.


def _along_axis_1() -> Toy:
    lora = Factoring(leaf="", a="_lora_a", b="_lora_b", rank="rank", scaled=True, axes=by_role)
    attention, mlp = "decoder/layers/self_attention", "decoder/layers/mlp"
    names = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    rules = (
        Rule("token_embedder/embedding", "model.embed_tokens.weight", "vocab width -> vocab width"),
        Rule("decoder/layers/norm/scale", "model.layers.{layer}.norm.weight", "width layer -> width", dtype="float32"),
        Rule(f"{attention}/query/kernel", names[0] + ".q_proj.weight", "width layer head dim -> (head dim) width",
             lora, "BTD,DNH->BTNH"),
        Rule(f"{attention}/kv/kernel", names[0] + ".{kv:k_proj|v_proj}.weight",
             "width layer kv group dim -> (group dim) width", lora, "BTD,DKH->BTKH"),
        Rule(f"{attention}/out/kernel", names[0] + ".o_proj.weight", "head layer dim width -> width (head dim)",
             lora, "BTNH,NHD->BTD"),
        Rule(f"{mlp}/wi/kernel", names[1] + ".{branch:gate_proj|up_proj}.weight",
             "width layer branch hidden -> hidden width", lora, "BTD,DF->BTF"),
        Rule(f"{mlp}/wo/kernel", names[1] + ".down_proj.weight", "hidden layer width -> width hidden",
             lora, "BTF,FD->BTD"),
    )  # fmt: skip

    def applied(leaf: str, weight: str, base: str, first: str, second: str, *words: str) -> Applied:
        return Applied(
            leaf, f"{leaf}_lora_a", f"{leaf}_lora_b", weight, base, (first, second), words or ("",)
        )

    return Toy(
        Family(
            name="scanned",
            title="Toy scanned",
            models=(
                Model(
                    name="scanned",
                    parts=(Part("body", rules, stock_alpha={RANK: ALPHA}),),
                    layouts=_LAYOUTS,
                    stock={"body.dim": SIZES["H"]},
                ),
            ),
            tree=Tree(root="params/", suffix=""),
        ),
        (
            applied(f"{attention}/query/kernel", names[0] + ".q_proj.weight",
                    "TD,DYNH->YTNH", "TD,DYR->YTR", "YTR,RYNH->YTNH"),
            applied(f"{attention}/kv/kernel", names[0] + ".{word}_proj.weight",
                    "TD,DYCKH->YCTKH", "TD,DYR->YTR", "YTR,RYCKH->YCTKH", "k", "v"),
            applied(f"{attention}/out/kernel", names[0] + ".o_proj.weight",
                    "TNH,NYHD->YTD", "TNH,NYHR->YTR", "YTR,RYD->YTD"),
            applied(f"{mlp}/wi/kernel", names[1] + ".{word}_proj.weight",
                    "TD,DYCF->YCTF", "TD,DYR->YTR", "YTR,RYCF->YCTF", "gate", "up"),
            applied(f"{mlp}/wo/kernel", names[1] + ".down_proj.weight",
                    "TF,FYD->YTD", "TF,FYR->YTR", "YTR,RYD->YTD"),
        ),
        (
            Plain("token_embedder/embedding", "model.embed_tokens.weight", "VD"),
            Plain("decoder/layers/norm/scale", "model.layers.{layer}.norm.weight", "DY"),
        ),
        ALPHA / RANK,
    )  # fmt: skip


SCANNED = _along_axis_1()


# A leaf a layer, factored as openpi factors, without a declared einsum, rows in another order.


def _inner_heads() -> Toy:
    lora = Factoring(leaf="/w", a="/a", b="/b", rank="rank", scaled=True)
    rules = (
        Rule("embed", "model.embed_tokens.weight", "vocab width -> vocab width"),
        Rule("block_{layer}/norm", "model.layers.{layer}.norm.weight", "width -> width"),
        Rule("block_{layer}/in/w", "model.layers.{layer}.mix_in.weight", "head width dim -> (dim head) width", lora),
        Rule("block_{layer}/out/w", "model.layers.{layer}.mix_out.weight", "head dim width -> width (head dim)", lora),
    )  # fmt: skip
    return Toy(
        Family(
            name="inner_heads",
            title="Toy inner heads",
            models=(
                Model(
                    name="inner_heads",
                    parts=(Part("body", rules),),
                    layouts=_LAYOUTS,
                    stock={"body.dim": SIZES["H"]},
                ),
            ),
            tree=Tree(root="", suffix=""),
        ),
        (
            Applied("block_{layer}/in/w", "block_{layer}/in/a", "block_{layer}/in/b",
                    "model.layers.{layer}.mix_in.weight", "TD,NDH->THN", ("TD,NDR->TNR", "TNR,NRH->THN")),
            Applied("block_{layer}/out/w", "block_{layer}/out/a", "block_{layer}/out/b",
                    "model.layers.{layer}.mix_out.weight", "TNH,NHD->TD", ("TNH,NHR->TR", "TR,NRD->TD")),
        ),
        (
            Plain("embed", "model.embed_tokens.weight", "VD"),
            Plain("block_{layer}/norm", "model.layers.{layer}.norm.weight", "D"),
        ),
        ALPHA / RANK,
    )  # fmt: skip


INNER_HEADS = _inner_heads()

TOYS = {toy.family.name: toy for toy in (UNSCALED, SCALED, SCANNED, INNER_HEADS)}
