"""Adapters that real PEFT loads: what they compute, against what openpi computed, and what is written."""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import xxhash
from peft import PeftModel

import bridge
from tests.kit import checkpoints, golden, transformers_pi0
from tests.kit.checkpoints import Array, Tree
from tests.kit.golden import BLOCK, TOLERANCE, State
from tests.kit.peft import (
    ATTENTION,
    CASES,
    CONFIG,
    GEMMAS,
    MLP,
    PREFIX,
    WEIGHTS,
    config_of,
    load_adapter,
    lora_modules,
    module_errors,
    relative,
    tensors_of,
    tree_of,
)
from tests.kit.record import Record

MAX_ABS = 5e-5  # of sampled actions; see proof/test_actions.py


def targeted(pattern: str, path: str) -> bool:
    """How PEFT reads a `target_modules` that is a string."""
    return re.fullmatch(pattern, path) is not None


def matching(patterns: Mapping[str, Any], path: str) -> list[str]:
    """Every key of a pattern dictionary that PEFT would take for a module, were it the first."""
    return [key for key in patterns if re.match(rf"(.*\.)?({key})$", path)]


def module_paths(layout: str, depth: int) -> list[str]:
    """The seven modules of every layer of both experts."""
    return [
        f"{gemma}.{i}.{module}"
        for gemma in GEMMAS[layout]
        for i in range(depth)
        for module in (*ATTENTION, *MLP)
    ]


@dataclass(frozen=True)
class Adapted:
    """Adapters of one golden checkpoint in one layout, and the base they apply to."""

    golden: golden.Golden
    layout: str
    home: Path
    base: State

    @property
    def depth(self) -> int:
        return int(self.golden.facts["dims"]["paligemma"]["depth"])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    name, layout = request.param
    source, home = golden.golden(name), tmp_path_factory.mktemp(f"{name}-{layout}")
    options: dict[str, Any] = {"to": "peft-adapter", "layout": layout, **source.options}
    bridge.convert(source.checkpoint, home / "folded", **options)
    bridge.convert(source.checkpoint, home / "kept", keep_alpha=True, **options)
    base = golden.convert(source.checkpoint, home / "base", to="torch-base", dtype="float32", layout=layout)
    return Adapted(source, layout, home, base)


# What adapters compute.


@pytest.mark.parametrize("alpha", ["folded", "kept"])
def test_modules_compute_what_openpi_computed(adapted: Adapted, alpha: str, record_property: Record) -> None:
    """Base plus adapter, unmerged in real PEFT, gives what openpi's LoRA modules gave, module by module."""
    model = load_adapter(adapted.base, adapted.home / alpha)
    assert sorted(lora_modules(model)) == sorted(module_paths(adapted.layout, adapted.depth))
    errors = module_errors(adapted.golden.runtime, model, adapted.layout)
    assert len(errors) == 2 * 5 * adapted.depth
    worst = max(errors, key=errors.__getitem__)
    what = f"{adapted.golden.name}, {adapted.layout}, {alpha}: relative error of {len(errors)} modules"
    record_property(what, errors[worst])
    print(f"{what} {errors[worst]:.2g} ({worst})")
    assert errors[worst] <= TOLERANCE


def test_the_comparison_has_teeth(adapted: Adapted) -> None:
    """Every recorded module is far from openpi's when the adapter is switched off."""
    model = load_adapter(adapted.base, adapted.home / "folded")
    with model.disable_adapter():
        errors = module_errors(adapted.golden.runtime, model, adapted.layout)
    assert min(errors.values()) > 1e-2


@pytest.mark.parametrize("alpha", ["folded", "kept"])
def test_merged_by_peft_is_torch_merged(
    adapted: Adapted, alpha: str, tmp_path: Path, record_property: Record
) -> None:
    """`merge_and_unload` on the base gives the weights that bridge folds itself."""
    source = adapted.golden
    merged = golden.convert(
        source.checkpoint, tmp_path / "merged", dtype="float32", layout=adapted.layout, **source.options
    )
    unloaded = load_adapter(adapted.base, adapted.home / alpha).merge_and_unload().state_dict()
    assert unloaded.keys() == merged.keys()
    worst = max(relative(unloaded[name], merged[name]) for name in merged)
    what = f"{source.name}, {adapted.layout}, {alpha}: merge_and_unload against torch-merged"
    record_property(what, worst)
    print(f"{what}: {worst:.2g}")
    assert worst <= 1e-6
    moved = golden.differing(adapted.base, merged)
    assert len(moved) == 2 * 7 * adapted.depth
    assert {name for name in moved if relative(unloaded[name], adapted.base[name]) == 0} == set()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pi0_lora as an adapter with its base, for stock transformers."""
    source, home = golden.golden("pi0_lora"), tmp_path_factory.mktemp("policy") / "adapter"
    bridge.convert(
        source.checkpoint,
        home,
        to="peft-adapter",
        layout="transformers",
        with_base=True,
        action_horizon=source.facts["action_horizon"],
        **source.options,
    )
    return home


def test_actions_are_openpis(policy: Path, record_property: Record) -> None:
    """Stock transformers with the base, and the adapter on it: ten denoising steps end where openpi's did."""
    recorded = golden.golden("pi0_lora").actions
    stock = transformers_pi0.load(policy / "base", torch.float32)

    def drift() -> float:
        actions = transformers_pi0.sample_actions(stock, recorded)
        return float(np.abs(actions.astype(np.float64) - recorded["actions"]).max())

    without = drift()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT still calls of transformers
        adapted = PeftModel.from_pretrained(stock, policy)
    assert adapted.get_base_model() is stock
    assert sorted(lora_modules(adapted)) == sorted(module_paths("transformers", 3))
    within = drift()
    for what, value in (("without the adapter", without), ("with it", within)):
        record_property(f"actions of stock transformers {what}: max_abs", value)
        print(f"actions {what}: off by {value:.2g}")
    assert within <= MAX_ABS
    assert without > 0.1


# Forms of LoRA and of attention that the golden checkpoints do not have.

BOTH = {"paligemma": 5, "expert": 3}
ALPHA = {"paligemma": 8.0, "expert": 4.5}
SCALES = {"paligemma": 8 / 5, "expert": 1.5}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = {
    # name: (the checkpoint, how it is converted, alpha / rank as openpi's LoRAConfig has it)
    "paligemma alone": ({"lora": {"paligemma": 5}}, {"lora_alpha": 8.0}, {"paligemma": 8 / 5}),
    "expert alone": ({"lora": {"expert": 3}}, {"lora_alpha": {"expert": 4.5}}, {"expert": 1.5}),
    "a rank for each": ({"lora": BOTH}, {"lora_alpha": ALPHA}, SCALES),
    "one rank for both": (
        {"lora": {"paligemma": 4, "expert": 4}},
        {"lora_alpha": {"paligemma": 4.0, "expert": 2.5}},
        {"paligemma": 1.0, "expert": 2.5 / 4},
    ),
    "stock ranks": ({"lora": {"paligemma": 16, "expert": 32}}, {}, {"paligemma": 1.0, "expert": 1.0}),
    "rslora": (
        {"lora": BOTH},
        {"lora_alpha": ALPHA, "rslora": True},
        {"paligemma": 8 / 5**0.5, "expert": 4.5 / 3**0.5},
    ),
    "fused qkv": ({"lora": BOTH, "fused_qkv": True}, {"lora_alpha": ALPHA}, SCALES),
    "three kv heads": ({"lora": BOTH, "heads": 6, "kv_heads": 3}, {"lora_alpha": ALPHA}, SCALES),
    "pi05, fused qkv": ({"lora": BOTH, "model": "pi05", "fused_qkv": True}, {"lora_alpha": ALPHA}, SCALES),
    "rank one": (
        {"lora": {"paligemma": 1, "expert": 1}},
        {"lora_alpha": ALPHA},
        {"paligemma": 8.0, "expert": 4.5},
    ),
    "twelve layers": ({"lora": BOTH, "layers": 12}, {"lora_alpha": ALPHA}, SCALES),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_openpi_computes(form: str, tmp_path: Path, record_property: Record) -> None:
    """Against openpi's einsums in float64; the adapter's function in float64 too, from its own numbers."""
    make, options, scales = FORMS[form]
    tree = checkpoints.pi0_tree(**make)
    source = checkpoints.save(tree, tmp_path / "100", quick=True)
    base = golden.convert(source, tmp_path / "base", to="torch-base")
    recorded = golden.simulate(tree, scales)
    depth, heads, groups = make.get("layers", 4), make.get("heads", 7), make.get("kv_heads", 1)
    groups = heads if make.get("fused_qkv") else groups
    for keep_alpha in (False, True):
        adapter = tmp_path / f"adapter-{keep_alpha}"
        bridge.convert(source, adapter, to="peft-adapter", keep_alpha=keep_alpha, **options)
        model = load_adapter(base, adapter).to(torch.float64)
        modules = lora_modules(model)
        assert len(modules) == 7 * depth * len(make["lora"])
        errors = module_errors(recorded, model, "openpi", torch.float64)
        worst = max(errors, key=errors.__getitem__)
        what = f"{form}, keep_alpha={keep_alpha}: relative error of {len(errors)} modules"
        record_property(what, errors[worst])
        print(f"{what} {errors[worst]:.2g} ({worst})")
        assert errors[worst] <= TOLERANCE
        for (part, rank), gemma in zip(make["lora"].items(), _gemmas(make["lora"]), strict=True):
            for i in range(depth):
                layers = [modules[f"{gemma}.{i}.{module}"] for module in (*ATTENTION, *MLP)]
                ranks = [layer.r["default"] for layer in layers]
                assert ranks == [heads * rank, groups * rank, groups * rank, rank, rank, rank, rank]
                runtime = [layer.scaling["default"] for layer in layers]
                scale = scales[part] if keep_alpha else 1.0
                assert runtime == pytest.approx([scale] * 4 + [1.0] * 3, rel=1e-12)


def _gemmas(lora: Mapping[str, int]) -> list[str]:
    return [f"{prefix}.layers" for part, _, prefix in golden.EXPERTS if part in lora]


# The config.


@pytest.mark.parametrize("alpha", ["folded", "kept"])
def test_config_says_what_every_consumer_understands(adapted: Adapted, alpha: str) -> None:
    config = config_of(adapted.home / alpha)
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert config["bias"] == "none"
    assert config["inference_mode"] is True
    for off in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_dropout", "modules_to_save"):
        assert not config.get(off), off
    assert isinstance(config["r"], int)


@pytest.mark.parametrize("alpha", ["folded", "kept"])
def test_targets_are_exactly_the_modules(adapted: Adapted, alpha: str) -> None:
    """One anchored expression: it finds the seven projections of both Gemmas, and nothing of SigLIP."""
    pattern = config_of(adapted.home / alpha)["target_modules"]
    assert isinstance(pattern, str)
    modules = {name for name, _ in tree_of(adapted.base).named_modules()}
    hit = {path for path in modules if targeted(pattern, path)}
    assert hit == set(module_paths(adapted.layout, adapted.depth))
    siglip = [path for path in modules if path.endswith(("q_proj", "k_proj", "v_proj")) and "vision" in path]
    assert len(siglip) == 3 * adapted.golden.facts["dims"]["siglip"]["depth"]
    # a path that only ends like a module is none
    some = min(hit)
    assert not targeted(pattern, f"draft.{some}") and not targeted(pattern, f"{some}.base_layer")


@pytest.mark.parametrize("alpha", ["folded", "kept"])
def test_patterns_are_disjoint_and_anchored(adapted: Adapted, alpha: str) -> None:
    """At most one pattern for any module, so that the order in which PEFT sorts them means nothing."""
    config = config_of(adapted.home / alpha)
    modules = [name for name, _ in tree_of(adapted.base).named_modules() if name]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config[field]
        assert patterns and list(patterns) == sorted(patterns)
        assert all(pattern.startswith("^") for pattern in patterns)
        for path in modules:
            hits = matching(patterns, path)
            assert len(hits) <= 1, (field, path)
            assert not hits or targeted(config["target_modules"], path)


def test_alpha_is_rank_everywhere_by_default(adapted: Adapted) -> None:
    """The scale is in `lora_B`, so that those who read `r` and `lora_alpha` alone are right as well."""
    config = config_of(adapted.home / "folded")
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"]
    model = load_adapter(adapted.base, adapted.home / "folded")
    assert {layer.scaling["default"] for layer in lora_modules(model).values()} == {1.0}


def test_kept_alpha_is_openpis_scale(adapted: Adapted) -> None:
    """Attention has alpha / rank, the feed-forward 1, as in openpi's runtime."""
    model = load_adapter(adapted.base, adapted.home / "kept")
    for path, layer in lora_modules(model).items():
        part = ("paligemma", "expert")[path.startswith(GEMMAS[adapted.layout][1])]
        expected = adapted.golden.scales[part] if ".self_attn." in path else 1.0
        assert layer.scaling["default"] == expected, path


def test_base_name_is_that_of_the_base(tmp_path: Path) -> None:
    """The base written beside the adapter, or what was given; else nothing."""
    source = golden.golden("pi0_lora")
    for options, expected in (
        ({"with_base": True}, "base"),
        # LeRobot looks for it from wherever it runs
        ({"with_base": True, "layout": "lerobot"}, str(tmp_path / "with_base_layout" / "base")),
        ({"base_name": "lab/pi0_base"}, "lab/pi0_base"),
        ({"with_base": True, "base_name": "lab/other"}, "lab/other"),
        ({}, ""),
    ):
        out = tmp_path / ("_".join(options) or "nothing")
        bridge.convert(source.checkpoint, out, to="peft-adapter", **options, **source.options)
        assert config_of(out)["base_model_name_or_path"] == expected


# The tensors.


@pytest.mark.parametrize("alpha", ["folded", "kept"])
def test_keys_and_shapes(adapted: Adapted, alpha: str) -> None:
    dims, lora = adapted.golden.facts["dims"], adapted.golden.facts["lora"]
    expected = {}
    for part, gemma in zip(("paligemma", "expert"), GEMMAS[adapted.layout], strict=True):
        d, r = dims[part], lora[part]["rank"]
        heads, groups, dim = d["num_heads"], d["num_kv_heads"], d["head_dim"]
        width, hidden = d["width"], d["mlp_dim"]
        shapes = {
            "self_attn.q_proj": (heads * r, width, heads * dim),
            "self_attn.k_proj": (groups * r, width, groups * dim),
            "self_attn.v_proj": (groups * r, width, groups * dim),
            "self_attn.o_proj": (r, heads * dim, width),
            "mlp.gate_proj": (r, width, hidden),
            "mlp.up_proj": (r, width, hidden),
            "mlp.down_proj": (r, hidden, width),
        }
        for i in range(adapted.depth):
            for module, (rank, into, out) in shapes.items():
                expected[f"{PREFIX}{gemma}.{i}.{module}.lora_A.weight"] = (rank, into)
                expected[f"{PREFIX}{gemma}.{i}.{module}.lora_B.weight"] = (out, rank)
    tensors = tensors_of(adapted.home / alpha)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with safetensors.safe_open(adapted.home / alpha / WEIGHTS, "pt") as file:
        # and which base it is for
        assert file.metadata().keys() == {"format", "base_identity"} and file.metadata()["format"] == "pt"


def by_hand(leaves: Mapping[str, Array], gemmas: tuple[str, ...]) -> dict[str, Array]:
    """Every tensor of an adapter from the leaves, moved one by one; scales aside."""
    found: dict[str, Array] = {}
    for (_, suffix, _), gemma in zip(golden.EXPERTS, gemmas, strict=True):
        if f"{BLOCK}/mlp{suffix}/linear_lora_a" not in leaves:
            continue
        for i in range(len(leaves[f"{BLOCK}/mlp{suffix}/linear"])):

            def put(module: str, a: Array, b: Array, layer: str = f"{PREFIX}{gemma}.{i}") -> None:
                found[f"{layer}.{module}.lora_A.weight"] = a
                found[f"{layer}.{module}.lora_B.weight"] = b

            def factors(leaf: str, i: int = i) -> tuple[Array, Array]:
                return leaves[f"{leaf}lora_a"][i], leaves[f"{leaf}lora_b"][i]

            def projection(module: str, a: Array, b: Array, put: Callable[..., None] = put) -> None:
                # head by head: rows of lora_A one below the other, blocks of lora_B along the diagonal
                (heads, _, rank), dim = a.shape, b.shape[2]
                block = np.zeros((heads * dim, heads * rank), b.dtype)
                for n in range(heads):
                    block[n * dim : (n + 1) * dim, n * rank : (n + 1) * rank] = b[n].T
                put(module, np.concatenate([a[n].T for n in range(heads)]), block)

            a, b = factors(f"{BLOCK}/attn/q_einsum{suffix}/")
            projection("self_attn.q_proj", a, b)
            a, b = factors(f"{BLOCK}/attn/kv_einsum{suffix}/")
            for kv, module in enumerate(("self_attn.k_proj", "self_attn.v_proj")):
                projection(module, a[kv], b[kv])
            a, b = factors(f"{BLOCK}/attn/attn_vec_einsum{suffix}/")
            put("self_attn.o_proj", np.concatenate(list(a)).T, b.sum(axis=0).T)
            a, b = factors(f"{BLOCK}/mlp{suffix}/gating_einsum_")
            for branch, module in enumerate(("mlp.gate_proj", "mlp.up_proj")):
                put(module, a[branch].T, b[branch].T)
            a, b = factors(f"{BLOCK}/mlp{suffix}/linear_")
            put("mlp.down_proj", a.T, b.T)
    return found


def test_kept_factors_are_the_leaves_own_bits(adapted: Adapted) -> None:
    """`--keep-alpha` moves numbers and changes none; only o_proj's `lora_B` is a sum, over heads."""
    expected = by_hand(adapted.golden.leaves, GEMMAS[adapted.layout])
    moved = {name: golden.tensor(array) for name, array in expected.items()}
    assert golden.differing(moved, tensors_of(adapted.home / "kept")) == set()


def test_folding_changes_the_scaled_lora_b_alone(adapted: Adapted) -> None:
    kept, folded = tensors_of(adapted.home / "kept"), tensors_of(adapted.home / "folded")
    for name, tensor in kept.items():
        part = ("paligemma", "expert")[name.startswith(PREFIX + GEMMAS[adapted.layout][1])]
        scaled = ".self_attn." in name and name.endswith("lora_B.weight")
        expected = tensor * adapted.golden.scales[part] if scaled else tensor
        assert golden.bits(expected) == golden.bits(folded[name]), name


@pytest.mark.parametrize("frozen", ["bfloat16", "float16"])
def test_factors_keep_the_sources_dtype(frozen: str, tmp_path: Path) -> None:
    """Factors stored narrow are written narrow and bit for bit, unless the sum or the scale rounds them."""
    tree = checkpoints.pi0_tree(lora={"paligemma": 2, "expert": 3}, dtype=frozen)
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(
        source,
        tmp_path / "out",
        to="peft-adapter",
        keep_alpha=True,
        lora_alpha={"paligemma": 3.0, "expert": 5.0},
    )
    tensors = tensors_of(tmp_path / "out")
    expected = {name: golden.tensor(array) for name, array in by_hand(tree, GEMMAS["openpi"]).items()}
    summed = {name for name in tensors if name.endswith("o_proj.lora_B.weight")}
    differs = golden.differing(expected, tensors)
    assert differs <= summed
    wide = {name: array.astype(np.float32) for name, array in tree.items()}
    for name in summed:
        once = golden.tensor(np.ascontiguousarray(by_hand(wide, GEMMAS["openpi"])[name]))
        assert golden.bits(once.to(expected[name].dtype)) == golden.bits(tensors[name]), name


# What lies beside them.


def test_what_lies_beside_the_tensors(adapted: Adapted) -> None:
    """A card that says how to load it, the assets, and a record with the source's scales and checksums."""
    home, source = adapted.home / "folded", adapted.golden
    written = golden.files(home)
    assert {CONFIG, WEIGHTS, "README.md", "bridge.json"} <= written.keys()
    assert golden.files(home / "assets") == golden.files(source.checkpoint / "assets")

    card = written["README.md"].decode()
    assert card.startswith("---\n") and "library_name: peft" in card.split("---")[1]
    for word in ("PeftModel.from_pretrained", source.facts["model"], adapted.layout, "base"):
        assert word in card, word
    for part, scale in source.scales.items():
        lora = source.facts["lora"][part]
        assert f"| {part} | {lora['rank']} | {lora['alpha']:g} | {scale:g} |" in card
    count = 2 * 7 * adapted.depth
    assert f"{count} modules, {sum(t.numel() for t in tensors_of(home).values())} parameters" in card

    record = json.loads(written["bridge.json"])
    assert record["state"] == "peft-adapter[lora]" and record["loss"] == "equivalent"
    assert record["route"] == ["split"]
    assert {part: scale["scale"] for part, scale in record["scales"].items()} == source.scales
    assert record["layout"] == adapted.layout
    sums = {
        name: xxhash.xxh3_128(golden.bits(tensor)).hexdigest() for name, tensor in tensors_of(home).items()
    }
    assert {name: entry["checksum"] for name, entry in record["tensors"].items()} == sums
    assert record["files"] == {
        name: xxhash.xxh3_128(data).hexdigest()
        for name, data in written.items()
        if name not in ("bridge.json", WEIGHTS)
    }


def test_lerobot_gets_its_config(adapted: Adapted) -> None:
    """LeRobot reads `use_peft` from a config.json; PEFT and transformers want none beside an adapter."""
    path = adapted.home / "folded" / "config.json"
    assert path.is_file() == (adapted.layout == "lerobot")
    if path.is_file():
        config = json.loads(path.read_text())
        assert config["use_peft"] is True and config["type"] == adapted.golden.facts["model"]
        assert (adapted.home / "folded" / "policy_preprocessor.json").is_file()


def test_two_runs_write_the_same_bytes(adapted: Adapted, tmp_path: Path) -> None:
    """However many workers there are; and the source is as it was."""
    source = adapted.golden
    before = golden.files(source.home)
    for workers in (1, 4):
        bridge.convert(
            source.checkpoint,
            tmp_path / str(workers),
            to="peft-adapter",
            layout=adapted.layout,
            workers=workers,
            **source.options,
        )
        assert golden.files(tmp_path / str(workers)) == golden.files(adapted.home / "folded")
    assert golden.files(source.home) == before


def test_plan_says_what_is_written(adapted: Adapted, tmp_path: Path) -> None:
    """Names, shapes and dtypes of the dry run are those of the file, and nothing is written by it."""
    source = adapted.golden
    plan = bridge.plan(
        source.checkpoint, tmp_path / "out", to="peft-adapter", layout=adapted.layout, **source.options
    )
    assert not (tmp_path / "out").exists()
    specs = {name: (spec.shape, spec.dtype.name) for name, spec in plan.specs.items()}
    tensors = tensors_of(adapted.home / "folded")
    assert specs == {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


def test_warning_of_ranks_names_the_largest_and_the_flag(tmp_path: Path) -> None:
    """vLLM takes ranks up to 16 unless told: the plan says what to tell it, and says nothing otherwise."""
    source = golden.golden("pi0_lora")
    plan = bridge.plan(source.checkpoint, None, to="peft-adapter", **source.options)
    largest = max(spec.shape[0] for name, spec in plan.specs.items() if name.endswith("lora_A.weight"))
    assert largest == 8 * 8
    assert [note for note in plan.notes if f"--max-lora-rank {largest}" in note and "16" in note]
    small = bridge.plan(source.checkpoint, None, to="peft-adapter", rank=16, **source.options)
    assert not [note for note in small.notes if "--max-lora-rank" in note]


# A round through PEFT.


@pytest.mark.parametrize("alpha", ["folded", "kept"])
def test_saved_again_by_peft_it_is_the_same_policy(
    adapted: Adapted, alpha: str, tmp_path: Path, record_property: Record
) -> None:
    """PEFT sorts the patterns when it saves, and bridge reads the same function from what it saved."""
    model = load_adapter(adapted.base, adapted.home / alpha)
    model.save_pretrained(tmp_path / "again")
    assert golden.differing(tensors_of(adapted.home / alpha), tensors_of(tmp_path / "again")) == set()
    again = config_of(tmp_path / "again")
    for field in ("rank_pattern", "alpha_pattern"):
        assert list(again[field]) == sorted(again[field])
        assert again[field] == config_of(adapted.home / alpha)[field]
    merged = [
        golden.convert(adapter, tmp_path / f"merged{i}", base=adapted.home / "base", layout=adapted.layout)
        for i, adapter in enumerate((adapted.home / alpha, tmp_path / "again"))
    ]
    assert golden.differing(*merged) == set()
    source = adapted.golden
    direct = golden.convert(
        source.checkpoint, tmp_path / "direct", dtype="float32", layout=adapted.layout, **source.options
    )
    worst = max(relative(merged[1][name], direct[name]) for name in direct)
    record_property(f"{source.name}, {adapted.layout}, {alpha}: saved again by PEFT, merged by bridge", worst)
    assert worst <= 1e-6


# --rank: compression.


def products(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """lora_B @ lora_A of every module, in float64."""
    modules = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        module.removeprefix(PREFIX): (
            tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        ).numpy()
        for module in modules
    }


def reported(plan: bridge.Plan) -> dict[str, float]:
    """Module -> error, as the plan says it."""
    lines = [note.removeprefix("compressed: ") for note in plan.notes if note.startswith("compressed: ")]
    return {module: float(error) for module, error in (line.rsplit(maxsplit=1) for line in lines)}


RANK = 5


@pytest.mark.parametrize("keep_alpha", [False, True], ids=["folded", "kept"])
@pytest.mark.parametrize("name", golden.WITH_LORA)
def test_compression_is_the_best_there_is(
    name: str, keep_alpha: bool, tmp_path: Path, record_property: Record
) -> None:
    """Every module of a larger rank becomes the nearest of rank R (Eckart-Young, numpy's SVD of the product).

    The error that the plan reports is the true one, and modules of smaller rank keep every bit.
    """
    source = golden.golden(name)
    options: dict[str, Any] = {"to": "peft-adapter", "keep_alpha": keep_alpha, **source.options}
    bridge.convert(source.checkpoint, tmp_path / "full", **options)
    plan = bridge.plan(source.checkpoint, tmp_path / "small", rank=RANK, **options)
    assert plan.loss.name == "ROUNDED"
    plan.run()
    assert json.loads((tmp_path / "small" / "bridge.json").read_text())["loss"] == "rounded"
    full, small = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "small")
    before, after = products(full), products(small)
    errors = reported(plan)
    excess = gap = 0.0
    for module, product in before.items():
        a, b = f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
        if len(full[a]) <= RANK:
            assert module not in errors
            assert golden.bits(full[a]) == golden.bits(small[a]), module
            assert golden.bits(full[b]) == golden.bits(small[b]), module
            continue
        assert len(small[a]) == RANK and small[b].shape[1] == RANK
        singular = np.linalg.svd(product, compute_uv=False)
        norm = np.linalg.norm(singular)
        best = np.linalg.norm(singular[RANK:]) / norm
        true = np.linalg.norm(after[module] - product) / norm
        excess = max(excess, float(true / best - 1))
        # the plan prints three digits
        gap = max(gap, abs(errors[module] - float(true)) / float(true))
    large = {module for module in before if len(full[f"{PREFIX}{module}.lora_A.weight"]) > RANK}
    assert errors.keys() == large and large
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    record_property(f"{name}: compression to {RANK}, worst error", max(errors.values()))
    record_property(f"{name}: compression to {RANK}, error above the optimum", excess)
    print(f"{name}: {len(errors)} modules, up to {max(errors.values())}, {excess:.1g} above the optimum")
    assert excess <= 1e-5
    assert gap <= 5.1e-3
    headline = [note for note in plan.notes if f"{len(errors)} modules are compressed" in note]
    assert len(headline) == 1 and f"{max(errors.values()):.2e}" in headline[0]


def test_reported_error_is_exact(tmp_path: Path) -> None:
    """Not only to the digits printed: the number behind them is the product's, formed in float64."""
    from bridge.lora.algebra import compress

    rng = np.random.default_rng(0)
    for out, into, rank, to in ((11, 13, 7, 3), (40, 9, 20, 5), (6, 6, 30, 2), (64, 48, 16, 15)):
        a = rng.standard_normal((rank, into)).astype(np.float32)
        b = rng.standard_normal((out, rank)).astype(np.float32)
        product = b.astype(np.float64) @ a.astype(np.float64)
        singular = np.linalg.svd(product, compute_uv=False)
        small_a, small_b, error = compress(a, b, to)
        best = np.linalg.norm(singular[to:]) / np.linalg.norm(singular)
        assert error == pytest.approx(best, rel=1e-9)
        true = np.linalg.norm(small_b.astype(np.float64) @ small_a - product) / np.linalg.norm(product)
        assert true == pytest.approx(best, rel=1e-5)


def test_a_rank_that_compresses_nothing(tmp_path: Path) -> None:
    """Every module is smaller: the same tensors as without it, and the plan says so."""
    source = golden.golden("pi05_lora")
    bridge.convert(source.checkpoint, tmp_path / "full", to="peft-adapter", **source.options)
    plan = bridge.plan(source.checkpoint, tmp_path / "same", to="peft-adapter", rank=4096, **source.options)
    assert not reported(plan)
    assert [note for note in plan.notes if "nothing is compressed" in note]
    plan.run()
    assert golden.differing(tensors_of(tmp_path / "full"), tensors_of(tmp_path / "same")) == set()


def test_a_product_of_low_rank_is_kept(tmp_path: Path) -> None:
    """Compressing to the rank that the product has costs nothing but float32's rounding."""
    tree = checkpoints.pi0_tree(lora={"expert": 6})
    for leaf in [leaf for leaf in tree if leaf.endswith("lora_b")]:
        tree[leaf][..., 2:, :] = 0
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    plan = bridge.plan(source, tmp_path / "out", to="peft-adapter", rank=7 * 2, lora_alpha={"expert": 6.0})
    assert max(reported(plan).values()) < 1e-6
    plan.run()


def test_zero_factors_compress_to_zeros(tmp_path: Path) -> None:
    """A run at its start has `lora_b` of zeros: no division by their norm."""
    tree: Tree = checkpoints.pi0_tree(lora={"paligemma": 5})
    for leaf in [leaf for leaf in tree if "lora_b" in leaf]:
        tree[leaf][...] = 0
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    plan = bridge.plan(source, tmp_path / "out", to="peft-adapter", rank=3, lora_alpha=5.0)
    assert set(reported(plan).values()) == {0.0}
    plan.run()
    assert not any(np.any(product) for product in products(tensors_of(tmp_path / "out")).values())
