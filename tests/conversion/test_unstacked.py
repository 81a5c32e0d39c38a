"""Families whose trees are nothing like openpi's, through every conversion, against their einsums in float64.

A leaf a layer, factored by role, without a scale; the same with alpha / rank and a suffix after every path;
layers along axis 1; a leaf a layer factored as openpi does, without a declared einsum. See tests/kit/families.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from bridge import Refusal, VerifyOptions
from tests.kit.digest import digest
from tests.kit.families import (
    ALPHA,
    INNER_HEADS,
    LAYERS,
    RANK,
    SCALED,
    SCANNED,
    SIZES,
    TOYS,
    UNSCALED,
    Array,
    Leaves,
    Toy,
    linear_error,
    peft_error,
    restore,
    save,
    state_of,
)
from tests.kit.plugins import registered

#: relative error that merging in float32 may make
MERGED = 5e-7
#: of PEFT's matrices, whose second one has the scale multiplied in
SPLIT = 2e-7
#: of one sum of products in float64
EXACT = 1e-12


@dataclass
class Forms:
    """A toy's checkpoint in every form, each converted once, on first use."""

    toy: Toy
    home: Path
    results: dict[str, bridge.Result] = field(default_factory=dict)

    def __getitem__(self, form: str) -> Path:
        path = self.home / form
        if not path.exists():
            getattr(self, f"_{form}")(path)
        return path

    def convert(self, src: str, path: Path, to: str, **options: Any) -> None:
        self.results[path.name] = bridge.convert(self[src], path, to=to, **options)

    def _run(self, path: Path) -> None:
        save(self.toy.leaves(), path, self.toy.family.tree)

    def _frozen(self, path: Path) -> None:
        save(self.toy.leaves(lora=False), path, self.toy.family.tree)

    def _merged(self, path: Path) -> None:
        self.convert("run", path, "torch-merged", **self.toy.alphas)

    def _base(self, path: Path) -> None:
        self.convert("run", path, "torch-base")

    def _adapter(self, path: Path) -> None:
        self.convert("run", path, "peft-adapter", **self.toy.alphas)

    def _exported(self, path: Path) -> None:
        self.convert("frozen", path, "torch-merged", dtype="keep")

    def _imported(self, path: Path) -> None:
        self.convert("exported", path, "orbax", value_suffix=bool(self.toy.family.tree.suffix))

    def _joined(self, path: Path) -> None:
        self.convert(
            "adapter", path, "orbax", base=self["base"], value_suffix=bool(self.toy.family.tree.suffix)
        )

    def _joined_bare(self, path: Path) -> None:
        self.convert("adapter", path, "orbax", base=self["frozen"])

    def _remerged(self, path: Path) -> None:
        self.convert("adapter", path, "torch-merged", base=self["base"])

    def _folded(self, path: Path) -> None:
        self.convert("adapter", path, "orbax", base=self["base"], fold=True)


@pytest.fixture(scope="module", params=list(TOYS))
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forms]:
    toy = TOYS[request.param]
    with registered([toy.family], alone=True):
        yield Forms(toy, tmp_path_factory.mktemp(request.param))


def equal(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert np.array_equal(found[name], array), name


def test_the_toys_have_what_this_file_is_about() -> None:
    for toy in TOYS.values():
        model = toy.family.models[0]
        assert all(layout.name not in ("openpi", "lerobot", "transformers") for layout in model.layouts)
    assert (UNSCALED.family.tree.root, UNSCALED.family.tree.suffix) == ("", "")
    assert "layer_0/attn/q_einsum/w" in UNSCALED.leaves()
    assert SCANNED.leaves()["decoder/layers/self_attention/out/kernel"].shape[1] == LAYERS
    assert SCANNED.leaves()["decoder/layers/self_attention/query/kernel"].shape[1] == LAYERS
    assert not any(rule.runtime for rule in INNER_HEADS.family.models[0].rules)
    assert UNSCALED.scale == 1 and SCALED.scale not in (1, ALPHA)
    assert SIZES["N"] * SIZES["H"] != SIZES["D"]


def test_merged(forms: Forms) -> None:
    leaves, state = forms.toy.leaves(), state_of(forms["merged"])
    outputs = forms.toy.outputs(leaves)
    assert state.keys() == outputs.keys() | forms.toy.equal(leaves).keys()
    assert linear_error(outputs, state) < MERGED
    equal({name: state[name] for name in forms.toy.equal(leaves)}, forms.toy.equal(leaves))


def test_what_the_factors_do_is_seen(forms: Forms) -> None:
    """Without them every output is another, by more than rounding: or nothing here would prove anything."""
    leaves, base = forms.toy.leaves(), state_of(forms["base"])
    for name, output in forms.toy.outputs(leaves).items():
        assert linear_error({name: output}, base) > 0.05


def test_base(forms: Forms) -> None:
    leaves, state = forms.toy.leaves(), state_of(forms["base"])
    assert linear_error(forms.toy.outputs(leaves, lora=False), state) < EXACT
    equal({name: state[name] for name in forms.toy.equal(leaves)}, forms.toy.equal(leaves))
    exported = state_of(forms["exported"])
    equal(exported, state)


def test_adapter(forms: Forms) -> None:
    """By the proof that runs before it is published, and by PEFT on the base's linear layers."""
    leaves, adapter = forms.toy.leaves(), forms["adapter"]
    proof = forms.results["adapter"].proof
    assert proof is not None
    outputs = forms.toy.outputs(leaves)
    assert {f"{module}.weight" for module in proof.errors} == outputs.keys()
    assert proof.largest < SPLIT
    assert max(proof.outputs.values()) < 1e-6
    assert peft_error(outputs, state_of(forms["base"]), adapter) < SPLIT


def test_ranks_of_the_adapter(forms: Forms) -> None:
    """By role the rank stays what it is, heads sharing a factor; openpi's heads have one each."""
    config = json.loads((forms["adapter"] / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    heads = {RANK, RANK * SIZES["N"]}
    assert ranks == (heads if forms.toy is INNER_HEADS else {RANK})


def test_keep_alpha(forms: Forms, tmp_path: Path) -> None:
    """Factors as they are stored, the scale in lora_alpha: exact, but for a sum over heads in float32."""
    bridge.convert(forms["run"], tmp_path / "kept", to="peft-adapter", keep_alpha=True, **forms.toy.alphas)
    outputs = forms.toy.outputs(forms.toy.leaves())
    allowed = SPLIT if forms.toy is INNER_HEADS else EXACT
    assert peft_error(outputs, state_of(forms["base"]), tmp_path / "kept") < allowed


def test_import(forms: Forms) -> None:
    """Every leaf comes back bit for bit, as Orbax itself restores it."""
    equal(restore(forms["imported"], forms.toy.family.tree), forms.toy.leaves(lora=False))


def test_join(forms: Forms) -> None:
    """Weights bit for bit, and factors that the runtime's einsums make the same of."""
    leaves = forms.toy.leaves()
    found = restore(forms["joined"], forms.toy.family.tree)
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in leaves.items()
    }
    frozen = forms.toy.leaves(lora=False)
    equal({name: found[name] for name in frozen}, frozen)
    expected, made = forms.toy.outputs(leaves), forms.toy.outputs(found)
    for name, (_, out) in expected.items():
        assert np.abs(made[name][1] - out).max() < SPLIT * np.abs(out).max(), name


def test_join_onto_a_jax_base_without_a_suffix(forms: Forms) -> None:
    found = restore(forms["joined_bare"], forms.toy.family.tree, suffixed=False)
    equal(found, restore(forms["joined"], forms.toy.family.tree))


def test_join_keeps_factors_bit_for_bit_where_nothing_is_scaled(forms: Forms) -> None:
    if forms.toy is not UNSCALED:
        return
    equal(restore(forms["joined"], forms.toy.family.tree), forms.toy.leaves())


def test_merge(forms: Forms) -> None:
    state = state_of(forms["remerged"])
    assert linear_error(forms.toy.outputs(forms.toy.leaves()), state) < MERGED


def test_fold_into_a_pytree(forms: Forms) -> None:
    found = restore(forms["folded"], forms.toy.family.tree, suffixed=False)
    assert found.keys() == forms.toy.leaves(lora=False).keys()
    expected = forms.toy.outputs(forms.toy.leaves())
    made = forms.toy.outputs(found, lora=False)
    assert (
        max(np.abs(made[name][1] - out).max() / np.abs(out).max() for name, (_, out) in expected.items())
        < MERGED
    )


PAIRS = [
    ("run", "merged", None),
    ("run", "base", None),
    ("frozen", "exported", None),
    ("frozen", "imported", None),
    ("run", "adapter", "base"),
    ("run", "joined", None),
    ("run", "remerged", None),
    ("merged", "folded", None),
    ("joined", "adapter", "frozen"),
]


@pytest.mark.parametrize(("src", "dst", "base"), PAIRS, ids=[f"{a}-{b}" for a, b, _ in PAIRS])
def test_verify(forms: Forms, src: str, dst: str, base: str | None) -> None:
    options: VerifyOptions = {"base": forms[base]} if base is not None else {}
    if (src, dst) == ("merged", "folded"):
        # summed in another order
        options["rtol"] = 1e-6
    if (src, dst) == ("run", "base"):
        # the weights of a run beside its factors are not what it computes
        with_factors = bridge.verify(forms[src], forms[dst], **forms.toy.alphas)
        assert not with_factors.holds
        assert len(with_factors.problems) == len(forms.toy.outputs(forms.toy.leaves()))
        return
    verdict = bridge.verify(forms[src], forms[dst], **forms.toy.alphas, **options)
    assert verdict.holds, verdict.problems
    names = {check.name for check in verdict.checks}
    leaves = forms.toy.leaves()
    assert names == forms.toy.outputs(leaves).keys() | forms.toy.equal(leaves).keys()
    if "run" in (src, dst) or "adapter" in (src, dst):
        # whatever has factors is run, with or without a declared einsum
        assert verdict.counts["runtime"] == len(forms.toy.outputs(leaves))


def test_verify_sees_one_wrong_factor(forms: Forms, tmp_path: Path) -> None:
    """Of the JAX run, beside an adapter that was right: in each module, and in no other."""
    leaves, toy = forms.toy.leaves(), forms.toy
    for number, each in enumerate(toy.applied):
        wrong = dict(leaves)
        name = each.b.format(layer=1)
        wrong[name] = leaves[name] * np.float32(1.01)
        src = save(wrong, tmp_path / str(number), toy.family.tree)
        verdict = bridge.verify(src, forms["adapter"], base=forms["base"], **toy.alphas)
        failed = {problem.cause.split(":")[0] for problem in verdict.problems}
        expected = {
            weight for numbers, index, weight in each.weights() if numbers["layer"] == 1 or "Y" in each.base
        }
        assert failed == expected


def test_diff(forms: Forms) -> None:
    comparison = bridge.diff(forms["base"], forms["run"], **forms.toy.alphas)
    outputs = forms.toy.outputs(forms.toy.leaves())
    assert {difference.name for difference in comparison.changed} == outputs.keys()
    assert {difference.lora for difference in comparison.changed} == {"b"}
    changes = {difference.name: difference.gap for difference in comparison.differences}
    merged, base = state_of(forms["merged"]), state_of(forms["base"])
    for name in outputs:
        assert changes[name] == pytest.approx(np.linalg.norm(merged[name] - base[name]), rel=1e-5)
    assert not bridge.diff(forms["frozen"], forms["base"]).changed


def test_describe(forms: Forms) -> None:
    toy = forms.toy
    run = bridge.describe(forms["run"])
    assert run.state == "orbax[base+lora]" and run.model == toy.family.name and not run.problems
    (part,) = run.parts
    assert part.sizes["layer"] == LAYERS and part.lora is not None
    assert part.lora["ranks"] == {"LoRA": RANK}
    assert part.parameters == sum(array.size for array in toy.leaves().values())
    assert run.value_suffix == bool(toy.family.tree.suffix)
    adapter = bridge.describe(forms["adapter"])
    assert adapter.state == "peft-adapter[lora]" and adapter.layout == "plain" and not adapter.problems
    base = bridge.describe(forms["base"])
    assert base.parts[0].sizes.items() >= {"layer": LAYERS, "dim": SIZES["H"], "head": SIZES["N"]}.items()


def test_load_jax(forms: Forms) -> None:
    leaves = forms.toy.leaves()
    equal(flattened(bridge.load_jax(forms["run"])), leaves)
    equal(flattened(bridge.load_jax(forms["exported"])), forms.toy.leaves(lora=False))
    joined = flattened(bridge.load_jax(forms["adapter"], base=forms["base"]))
    equal(joined, restore(forms["joined"], forms.toy.family.tree))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Leaves:
    leaves: Leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flattened(value, f"{prefix}{key}/")
        else:
            leaves[prefix + key] = np.asarray(value)
    return leaves


def test_load_torch(forms: Forms) -> None:
    state = bridge.load_torch(forms["run"], **forms.toy.alphas)
    equal({name: array.numpy() for name, array in state.items()}, state_of(forms["merged"]))


def test_other_layout(forms: Forms, tmp_path: Path) -> None:
    """Prefixes of a layout of the family's own, there and back."""
    bridge.convert(forms["run"], tmp_path / "base", to="torch-base", layout="inner")
    state = state_of(tmp_path / "base")
    assert all(name.startswith("language.model.") for name in state)
    bridge.convert(forms["run"], tmp_path / "adapter", to="peft-adapter", layout="inner", **forms.toy.alphas)
    named = {f"language.{name}": output for name, output in forms.toy.outputs(forms.toy.leaves()).items()}
    assert peft_error(named, state, tmp_path / "adapter") < SPLIT
    assert bridge.describe(tmp_path / "adapter").layout == "inner"
    bridge.convert(tmp_path / "adapter", tmp_path / "joined", to="orbax", base=forms["base"])
    found = restore(tmp_path / "joined", forms.toy.family.tree, suffixed=False)
    equal(found, restore(forms["joined"], forms.toy.family.tree))


def test_outputs_are_the_same_bytes_again(forms: Forms, tmp_path: Path) -> None:
    bridge.convert(forms["run"], tmp_path / "again", to="torch-merged", workers=1, **forms.toy.alphas)
    assert digest(tmp_path / "again") == digest(forms["merged"])


def test_a_plan_takes_a_line_for_all_layers(forms: Forms) -> None:
    for to in ("torch-merged", "peft-adapter"):
        lines = str(bridge.plan(forms["run"], None, to=to, **forms.toy.alphas)).splitlines()
        rules = len(list(forms.toy.family.models[0].rules))
        assert len(lines) < 2 * rules + 15
        assert any(f"layers.{{0..{LAYERS - 1}}}" in line for line in lines)
    lines = str(bridge.plan(forms["exported"], None, to="orbax")).splitlines()
    assert sum(" -> " in line for line in lines) == len(list(forms.toy.family.models[0].rules)) + 2


def test_scales_are_said(forms: Forms) -> None:
    text = str(bridge.plan(forms["run"], None, to="torch-merged", **forms.toy.alphas))
    if forms.toy is UNSCALED:
        assert "lora scale   1: Toy unscaled applies no scale" in text
    else:
        assert f"lora scale   body: rank {RANK}, alpha 3 (given), alpha/rank = 0.6" in text
    card = (forms["adapter"] / "README.md").read_text()
    row = f"| body | {RANK} | – | 1 |" if forms.toy is UNSCALED else f"| body | {RANK} | 3 | 0.6 |"
    assert row in card
    assert ("applies no scale" in card) == (forms.toy is UNSCALED)
    assert ("is folded into `lora_B`" in card) == (forms.toy is not UNSCALED)


# What speaks against a tree with a leaf for each layer.


def refused(path: Path, to: str = "torch-merged", **options: Any) -> list[str]:
    with pytest.raises(Refusal) as caught:
        bridge.plan(path, None, to=to, **options)
    return [problem.cause.removeprefix(f"{path}: ") for problem in caught.value.problems]


@pytest.fixture
def unscaled(tmp_path: Path) -> Iterator[Path]:
    with registered([UNSCALED.family], alone=True):
        yield tmp_path


Q, A, B = (
    "layer_{}/attn/q_einsum/w",
    "layer_{}/attn/q_einsum/_LoRAEinsum_0/lora/a",
    "layer_{}/attn/q_einsum/_LoRAEinsum_0/lora/b",
)


def without(*names: str) -> Leaves:
    return {name: array for name, array in UNSCALED.leaves().items() if name not in names}


def test_a_missing_layer_is_named(unscaled: Path) -> None:
    src = save(without(Q.format(1)), unscaled / "src", UNSCALED.family.tree)
    assert refused(src) == ["layer_1/attn/q_einsum/w is missing"]


def test_a_leaf_that_all_layers_lack_is_named_once(unscaled: Path) -> None:
    names = [path.format(n) for path in (Q, A, B) for n in range(LAYERS)]
    src = save(without(*names), unscaled / "src", UNSCALED.family.tree)
    assert refused(src) == ["leaf layer_*/attn/q_einsum/w of unscaled is missing"]


def test_all_that_is_missing_is_said_at_once(unscaled: Path) -> None:
    """A layer here, a factor there, a leaf of no rule: in one refusal, grouped."""
    leaves = without(Q.format(2), *(B.format(n) for n in range(LAYERS)), "layer_0/norm/scale")
    leaves |= {f"layer_{n}/attn/_key_norm/scale": np.zeros(SIZES["H"], np.float32) for n in range(LAYERS)}
    src = save(leaves, unscaled / "src", UNSCALED.family.tree)
    assert refused(src) == [
        "leaf layer_{0..2}/attn/_key_norm/scale is not part of unscaled",
        f"{A.format('{0..2}')} is there, but its counterpart {B.format('{0..2}')} is missing",
        "layer_0/norm/scale is missing",
        "layer_2/attn/q_einsum/w is missing",
    ]


def test_a_layer_without_factors_is_named(unscaled: Path) -> None:
    names = [path.format(n) for path in (A, B) for n in (0, 2)]
    src = save(without(*names), unscaled / "src", UNSCALED.family.tree)
    causes = refused(src)
    assert len(causes) == 1
    assert causes[0].startswith("layer_{0,2}/attn/q_einsum/w has no LoRA factors, but layer_")


def test_a_layer_of_another_shape_is_named(unscaled: Path) -> None:
    leaves = UNSCALED.leaves()
    leaves[Q.format(1)] = np.zeros((SIZES["N"], SIZES["D"], SIZES["H"] + 1), np.float32)
    src = save(leaves, unscaled / "src", UNSCALED.family.tree)
    (cause,) = refused(src)
    assert cause.startswith("layer_1/attn/q_einsum/w: body.dim is 12, but 11 in ")


def test_a_factor_of_another_rank_is_named(unscaled: Path) -> None:
    leaves = UNSCALED.leaves()
    leaves[A.format(1)] = np.zeros((SIZES["D"], RANK + 2), np.float32)
    src = save(leaves, unscaled / "src", UNSCALED.family.tree)
    (cause,) = refused(src)
    assert cause.startswith(f"{A.format(1)}: body.rank is 7, but 5 in ")


def test_a_layer_that_is_not_finite_is_named(unscaled: Path) -> None:
    leaves = UNSCALED.leaves()
    for n in (0, 2):
        leaves[Q.format(n)][3, 1, 2] = np.nan
    src = save(leaves, unscaled / "src", UNSCALED.family.tree)
    with pytest.raises(Refusal) as caught:
        bridge.convert(src, unscaled / "out", to="torch-merged")
    named = [problem.cause for problem in caught.value.problems]
    assert named == [f"{src}: layer_{n}/attn/q_einsum/w contains NaN or infinite values" for n in (0, 2)]
    assert not (unscaled / "out").exists()


def test_missing_weights_of_a_state_dict_are_named_with_what_else_is_wrong(unscaled: Path) -> None:
    from safetensors.numpy import save_file

    src = save(UNSCALED.leaves(lora=False), unscaled / "src", UNSCALED.family.tree)
    bridge.convert(src, unscaled / "torch", to="torch-merged")
    state = state_of(unscaled / "torch")
    for n in (0, 1):
        del state[f"model.layers.{n}.mlp.up_proj.weight"]
    state["model.extra.weight"] = np.zeros(3, np.float32)
    (unscaled / "damaged").mkdir()
    save_file(state, unscaled / "damaged" / "model.safetensors")
    assert refused(unscaled / "damaged", "orbax") == [
        "tensor model.extra.weight is not part of unscaled",
        "model.layers.{0..1}.mlp.up_proj.weight is missing",
    ]


# Scales and ranks of what is joined.


def test_an_alpha_without_a_scale_is_refused(unscaled: Path) -> None:
    src = save(UNSCALED.leaves(), unscaled / "src", UNSCALED.family.tree)
    assert refused(src, lora_alpha=ALPHA) == ["--lora-alpha is given, but there are no scaled LoRA factors"]
    bridge.convert(src, unscaled / "adapter", to="peft-adapter", with_base=True)
    options: dict[str, Any] = {"to": "orbax", "base": unscaled / "adapter" / "base"}
    assert refused(unscaled / "adapter", **options, lora_alpha=ALPHA) == [
        "--lora-alpha is given, but Toy unscaled never scales LoRA factors"
    ]
    assert refused(unscaled / "adapter", **options, lora_alpha={"body": ALPHA}) == [
        "--lora-alpha names body, whose LoRA factors Toy unscaled never scales"
    ]
    assert refused(unscaled / "adapter", **options, rslora=True) == [
        "--rslora is given, but Toy unscaled never scales LoRA factors"
    ]


def test_a_rank_that_nothing_records_is_asked_for(unscaled: Path) -> None:
    src = save(UNSCALED.leaves(), unscaled / "src", UNSCALED.family.tree)
    bridge.convert(src, unscaled / "adapter", to="peft-adapter", with_base=True)
    (unscaled / "adapter" / "bridge.json").unlink()
    base = unscaled / "adapter" / "base"
    assert refused(unscaled / "adapter", "orbax", base=base) == [
        "the rank body should have in Toy unscaled is unknown"
    ]
    bridge.convert(unscaled / "adapter", unscaled / "joined", to="orbax", base=base, rank={"body": RANK + 2})
    found = restore(unscaled / "joined", UNSCALED.family.tree)
    assert found[A.format(0)].shape == (SIZES["D"], RANK + 2)
    expected, made = UNSCALED.outputs(UNSCALED.leaves()), UNSCALED.outputs(found)
    for name, (_, out) in expected.items():
        assert np.abs(made[name][1] - out).max() < EXACT * np.abs(out).max()


def test_a_suffix_that_the_family_has_not_is_refused(unscaled: Path) -> None:
    src = save(UNSCALED.leaves(lora=False), unscaled / "src", UNSCALED.family.tree)
    bridge.convert(src, unscaled / "torch", to="torch-merged")
    assert refused(unscaled / "torch", "orbax", value_suffix=True) == [
        "--value-suffix has no effect: the leaf names of Toy unscaled have no suffix"
    ]


# An adapter that PEFT trained: first factors of their own for k and v, any scale.


def trained(path: Path, toy: Toy, *, rank: int, alpha: float) -> dict[str, tuple[Array, Array]]:
    """An adapter over every module, as PEFT saves it; the matrices by weight."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(13)
    state: Leaves = {}
    matrices = {}
    for name, (x, out) in toy.outputs(toy.leaves(lora=False), lora=False).items():
        a = random.standard_normal((rank, x.shape[1])).astype(np.float32)
        b = random.standard_normal((out.shape[1], rank)).astype(np.float32)
        matrices[name] = (a, b)
        module = "base_model.model." + name.removesuffix(".weight")
        state |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    path.mkdir()
    save_file(state, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": alpha,
                "target_modules": sorted({name.split(".")[-2] for name in matrices}),
                "inference_mode": True,
            }
        )
    )
    return matrices


@pytest.fixture(scope="module", params=["unscaled", "scaled", "scanned"])
def by_role(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forms]:
    toy = TOYS[request.param]
    with registered([toy.family], alone=True):
        yield Forms(toy, tmp_path_factory.mktemp(f"{request.param}_trained"))


RANK_OF_PEFT, ALPHA_OF_PEFT = 3, 7.0


def test_a_trained_adapter_joins_exactly(by_role: Forms) -> None:
    """k and v, gate and up have one first factor in JAX: both of PEFT's fit side by side in twice the rank."""
    toy, home = by_role.toy, by_role.home
    matrices = trained(home / "peft", toy, rank=RANK_OF_PEFT, alpha=ALPHA_OF_PEFT)
    options: dict[str, Any] = {"base": by_role["frozen"], "rank": {"body": 2 * RANK_OF_PEFT}}
    alphas: dict[str, Any] = {"lora_alpha": ALPHA} if toy is not UNSCALED else {}
    bridge.convert(home / "peft", home / "joined_trained", to="orbax", **options, **alphas)
    found = restore(home / "joined_trained", toy.family.tree, suffixed=False)
    scale = toy.scale if toy is UNSCALED else ALPHA / (2 * RANK_OF_PEFT)
    made = Toy(toy.family, toy.applied, toy.plain, scale).outputs(found)
    frozen = toy.outputs(toy.leaves(lora=False), lora=False)
    for name, (a, b) in matrices.items():
        x, base = frozen[name]
        wanted = base + ALPHA_OF_PEFT / RANK_OF_PEFT * x @ a.T.astype(np.float64) @ b.T.astype(np.float64)
        assert np.abs(made[name][1] - wanted).max() < 2e-6 * np.abs(wanted).max(), name
    verdict = bridge.verify(home / "peft", home / "joined_trained", base=by_role["frozen"], **alphas)
    assert verdict.holds, verdict.problems


def test_a_trained_adapter_that_does_not_fit_is_refused_and_says_what_it_needs(by_role: Forms) -> None:
    toy, home = by_role.toy, by_role.home
    if not (home / "peft_5").exists():
        trained(home / "peft_5", toy, rank=5, alpha=ALPHA_OF_PEFT)
    options: dict[str, Any] = {"base": by_role["frozen"], "rank": {"body": 5}}
    alphas: dict[str, Any] = {"lora_alpha": ALPHA} if toy is not UNSCALED else {}
    causes = refused(home / "peft_5", "orbax", **options, **alphas)
    assert causes == [
        f"base_model.model.model.layers.{{0..2}}.{module} needs rank 10 together with what shares its first "
        f"factor; {toy.family.title}'s is 5"
        for module in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ]


def test_lossy_is_the_best_and_says_its_error(by_role: Forms) -> None:
    toy, home = by_role.toy, by_role.home
    if not (home / "peft_5").exists():
        trained(home / "peft_5", toy, rank=5, alpha=ALPHA_OF_PEFT)
    from safetensors.numpy import load_file

    alphas: dict[str, Any] = {"lora_alpha": ALPHA} if toy is not UNSCALED else {}
    plan = bridge.plan(
        home / "peft_5",
        home / "lossy",
        to="orbax",
        base=by_role["frozen"],
        rank={"body": 5},
        lossy=True,
        **alphas,
    )
    plan.run()
    stored = load_file(home / "peft_5" / "adapter_model.safetensors")
    change = {
        name: stored[f"{module}.lora_B.weight"].astype(np.float64) @ stored[f"{module}.lora_A.weight"]
        for name in toy.outputs(toy.leaves())
        for module in ["base_model.model." + name.removesuffix(".weight")]
    }
    found = restore(home / "lossy", toy.family.tree, suffixed=False)
    made = units(toy, found)
    notes = dict(
        note.removeprefix("approximated: ").rsplit(" ", 1)
        for note in plan.notes
        if note.startswith("approximated: ")
    )
    assert notes and all(
        any(word in module for word in ("k_proj", "v_proj", "gate", "up")) for module in notes
    )
    for layer in range(LAYERS):
        for pair in (("self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            names = [f"model.layers.{layer}.{module}.weight" for module in pair]
            tall = ALPHA_OF_PEFT / 5 * np.concatenate([change[name] for name in names])
            u, s, vt = np.linalg.svd(tall, full_matrices=False)
            best = (u[:, :5] * s[:5]) @ vt[:5]
            ours = np.concatenate([made[name] for name in names])
            assert np.abs(ours - best).max() < 1e-5 * np.abs(best).max()
            lost = np.linalg.norm(tall - best) / np.linalg.norm(tall)
            for name in names:
                module = "base_model.model." + name.removesuffix(".weight")
                assert float(notes[module]) == pytest.approx(lost, rel=5e-3)


def units(toy: Toy, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """The change of every weight, from what the runtime makes of inputs with and without factors."""
    scale = toy.scale if toy is UNSCALED else ALPHA / 5
    runs = Toy(toy.family, toy.applied, toy.plain, scale)
    made: dict[str, list[Array]] = {}
    changes = {}
    for each in range(30):
        outputs, base = runs.outputs(leaves, seed=each), runs.outputs(leaves, lora=False, seed=each)
        for name, (x, out) in outputs.items():
            made.setdefault(name, []).append(np.hstack([x, out - base[name][1]]))
    for name, (x, _) in runs.outputs(leaves).items():
        both = np.concatenate(made[name])
        solution, *_ = np.linalg.lstsq(both[:, : x.shape[1]], both[:, x.shape[1] :], rcond=None)
        changes[name] = solution.T
    return changes
