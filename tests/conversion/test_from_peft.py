"""Adapters that real PEFT trained, joined to their base as openpi's LoRA leaves: the same function.

The oracle for what they compute is PEFT's own forward; jax runs the equations of openpi's models/lora.py.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import bridge
from bridge.errors import CheckpointRefused, Refusal
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Array, Tree
from tests.kit.golden import BLOCK, TOLERANCE, State
from tests.kit.openpi_lora import dead_ranks, online, untrained_after_a_step
from tests.kit.peft import ATTENTION, CONFIG, MLP, PREFIX, WEIGHTS
from tests.kit.record import Record

ALL = r".*(language_model|gemma_expert\.model)\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
GEMMA = {part: f"{prefix}.layers" for part, _, prefix in golden.EXPERTS}

LAYERS = 2
#: the tree's ranks and alphas, where a test names them: no scale is a power of two
RANK = {"paligemma": 5, "expert": 3}
ALPHA = {"paligemma": 8.0, "expert": 4.5}
NAMED: dict[str, Any] = {"rank": RANK, "lora_alpha": ALPHA}


# Adapters, trained in PyTorch.


def skeleton(state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The projections of both Gemmas and the dense layers at the end, with a policy's paths and shapes."""
    root = torch.nn.Module()
    for name, weight in state.items():
        path, _, kind = name.rpartition(".")
        if not (re.fullmatch(ALL, path) or path.startswith("action_")) or kind != "weight":
            continue
        *parents, last = path.split(".")
        node = root
        for part in parents:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node.get_submodule(part)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=f"{path}.bias" in state)
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        if f"{path}.bias" in state:
            linear.bias = torch.nn.Parameter(state[f"{path}.bias"].clone(), requires_grad=False)
        node.add_module(last, linear)
    return root


def train(model: Any, steps: int = 3) -> None:
    """A few steps of SGD towards random outputs, over everything that carries an adapter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modules = [module for module in model.modules() if hasattr(module, "lora_A") and module.lora_A]
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for module in modules:
            x = torch.randn(6, module.in_features, generator=generator)
            wanted = torch.randn(6, module.out_features, generator=generator)
            loss = loss + torch.nn.functional.mse_loss(module(x), wanted)
        loss.backward()
        optimizer.step()


def saved(model: Any, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base that is no transformers model
        model.save_pretrained(directory)
    return directory


def trained(base: State, directory: Path, **config: Any) -> tuple[Any, Path]:
    """A fresh adapter, random in both factors, trained for a few steps and saved by PEFT."""
    torch.manual_seed(0)
    wanted = {"target_modules": ALL, "r": 3, "lora_alpha": 4, "init_lora_weights": False, **config}
    model = get_peft_model(skeleton(base), LoraConfig(**wanted))
    train(model)
    return model, saved(model, directory)


def loaded(base: State, directory: Path, *, trainable: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(skeleton(base), directory, is_trainable=trainable)


def factors(adapter: Path) -> State:
    """Tensors of an adapter, `base_model.model.` left out."""
    state = safetensors.torch.load_file(adapter / WEIGHTS)
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def pair(adapter: Path, module: str) -> tuple[Array, Array]:
    state = factors(adapter)
    a, b = (state[f"{module}.lora_{which}.weight"].float().numpy() for which in "AB")
    return a, b


class Home:
    """A base in Orbax and in PyTorch, and a place for what is made of it."""

    def __init__(self, directory: Path, **make: Any) -> None:
        self.directory = directory
        self.tree = checkpoints.pi0_tree(lora={}, **{"layers": LAYERS, **make})
        self.base = checkpoints.save(
            self.tree, directory / "base", value_suffix=False, step_dir=False, quick=True
        )
        self.state = golden.by_hand(self.tree)
        self.heads = make.get("heads", checkpoints.DIMS["heads"])
        self.count = 0

    def adapter(self, **config: Any) -> tuple[Any, Path]:
        self.count += 1
        return trained(self.state, self.directory / f"adapter-{self.count}", **config)

    def join(self, adapter: Path, **options: Any) -> Tree:
        self.count += 1
        output = self.directory / f"joined-{self.count}"
        bridge.convert(adapter, output, to="orbax", base=self.base, **options)
        # the adapter's own norm stats, else those of its base
        owner = adapter if (adapter / "assets").is_dir() else self.base
        assert golden.files(output / "assets") == golden.files(owner / "assets") != {}
        return checkpoints.restore(output)

    def bridged(self, adapter: Path, **options: Any) -> Path:
        """joined, and out again: an adapter that bridge wrote."""
        self.count += 1
        joined, again = (self.directory / f"{name}-{self.count}" for name in ("orbax", "again"))
        bridge.convert(adapter, joined, to="orbax", base=self.base, **options)
        bridge.convert(
            joined, again, to="peft-adapter", keep_alpha=True, lora_alpha=options.get("lora_alpha")
        )
        return again


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def errors_against(model: Any, leaves: Mapping[str, Array], scales: Mapping[str, float]) -> dict[str, float]:
    """max |openpi - PEFT| / max |PEFT| of every projection."""
    found = {}
    with torch.no_grad():
        for path, x, out in online(leaves, scales):
            expected = model.get_submodule(PREFIX + path)(torch.from_numpy(x)).numpy()
            found[path] = float(np.abs(np.asarray(out) - expected).max() / np.abs(expected).max())
    assert len(found) == 14 * len(leaves[f"{BLOCK}/mlp/linear"])
    return found


def assert_same_function(
    model: Any, leaves: Mapping[str, Array], scales: Mapping[str, float], record: Record | None = None
) -> None:
    errors = errors_against(model, leaves, scales)
    worst = max(errors, key=errors.__getitem__)
    print(f"{len(errors)} modules, relative error {errors[worst]:.2g} ({worst})")
    if record is not None:
        record(f"relative error of {len(errors)} modules", errors[worst])
    assert errors[worst] <= TOLERANCE


def scales_of(rank: Mapping[str, int], alpha: Mapping[str, float], rslora: bool = False) -> dict[str, float]:
    return {part: alpha[part] / (rank[part] ** 0.5 if rslora else rank[part]) for part in rank}


def lora_leaves(leaves: Mapping[str, Array]) -> set[str]:
    return {leaf for leaf in leaves if "lora" in leaf}


# The same function.

SCALES = scales_of(RANK, ALPHA)
ROOTS = scales_of(RANK, ALPHA, rslora=True)
EXPERT_ONLY = r".*gemma_expert.*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, float]]] = {
    # name: (the base, PEFT's config, how it is joined, alpha / rank in openpi)
    "of the tree's rank": ({}, {"rank_pattern": {r".*language_model.*": 5}}, NAMED, SCALES),
    "of smaller rank": ({}, {"r": 2}, NAMED, SCALES),
    "a scale of its own": ({}, {"lora_alpha": 7.3}, NAMED, SCALES),
    "PEFT's rslora": ({}, {"use_rslora": True}, NAMED, SCALES),
    "openpi's rslora": ({}, {}, {**NAMED, "rslora": True}, ROOTS),
    "rslora in both": ({}, {"use_rslora": True}, {**NAMED, "rslora": True}, ROOTS),
    "ranks and alphas by pattern": (
        {},
        {"rank_pattern": {r".*q_proj": 1, r".*\.0\.mlp\.up_proj": 2}, "alpha_pattern": {r".*k_proj": 9.5}},
        NAMED,
        SCALES,
    ),
    "one rank, one alpha": (
        {},
        {},
        {"rank": 4, "lora_alpha": 6.0},
        {"paligemma": 1.5, "expert": 1.5},
    ),
    "stock ranks": ({}, {"r": 16}, {}, {"paligemma": 1.0, "expert": 1.0}),
    "some modules": (
        {},
        {"target_modules": r".*(language_model|gemma_expert).*\.layers\.1\.(self_attn\.(k|o)|mlp\.up)_proj"},
        NAMED,
        SCALES,
    ),
    "one layer of one expert": ({}, {"target_modules": r".*expert.*\.0\..*down_proj"}, NAMED, SCALES),
    "one expert": ({}, {"target_modules": EXPERT_ONLY}, {"rank": 3, "lora_alpha": 4.5}, {"expert": 1.5}),
    "fused qkv": ({"fused_qkv": True}, {}, NAMED, SCALES),
    "fused qkv, v alone": (
        {"fused_qkv": True},
        {"target_modules": r".*(language_model|gemma_expert).*\d\.self_attn\.v_proj"},
        NAMED,
        SCALES,
    ),
    "several kv heads": ({"heads": 6, "kv_heads": 3}, {}, NAMED, SCALES),
    "pi05": ({"model": "pi05"}, {}, NAMED, SCALES),
    "in training's form": ({}, {}, {**NAMED, "value_suffix": True}, SCALES),
}


@pytest.mark.parametrize("form", FORMS)
def test_openpi_computes_what_peft_does(form: str, tmp_path: Path, record_property: Record) -> None:
    """q, k, v, o, gate, up and down of every layer, from the leaves that Orbax restores."""
    make, config, options, scales = FORMS[form]
    home = Home(tmp_path, **make)
    model, adapter = home.adapter(**config)
    leaves = home.join(adapter, **options)
    assert_same_function(model, leaves, scales, record_property)
    base = {leaf: array for leaf, array in leaves.items() if "lora" not in leaf}
    assert differing(home.tree, base) == set()
    with model.disable_adapter():
        off = errors_against(model, leaves, scales)
    carried = {name.rpartition(".lora_A")[0] for name in factors(adapter) if ".lora_A." in name}
    # the comparison has teeth: each module with an adapter is far from its base, and no other moved
    assert {path for path, error in off.items() if error > 1e-3} == carried != set()


def differing(expected: Mapping[str, Array], found: Mapping[str, Array]) -> set[str]:
    return golden.differing(
        *({leaf: golden.tensor(array) for leaf, array in tree.items()} for tree in (expected, found))
    )


def test_bfloat16_adapters_keep_their_dtype(home: Home) -> None:
    """As saved, or as asked for; the numbers are those of the float32 adapter, rounded."""
    _, adapter = home.adapter(lora_alpha=3)
    state = safetensors.torch.load_file(adapter / WEIGHTS)
    narrow = {name: value.to(torch.bfloat16) for name, value in state.items()}
    safetensors.torch.save_file(narrow, adapter / WEIGHTS, {"format": "pt"})
    options = {"rank": 3, "lora_alpha": 3.0}  # the adapter's own scale: nothing is folded
    kept, wide = home.join(adapter, **options), home.join(adapter, dtype="float32", **options)
    for leaf in lora_leaves(kept):
        assert kept[leaf].dtype.name == "bfloat16" and wide[leaf].dtype == np.float32
        assert kept[leaf].astype(np.float32).tobytes() == wide[leaf].tobytes()
    model = loaded(home.state, adapter)
    assert_same_function(model, wide, {"paligemma": 1.0, "expert": 1.0})


def test_weights_that_were_trained_whole_replace_the_bases(home: Home) -> None:
    """`modules_to_save`: the leaf is the adapter's, bit for bit."""
    model, _ = home.adapter(modules_to_save=["action_out_proj"])
    module = model.get_submodule(f"{PREFIX}action_out_proj")
    weight = next(
        value for name, value in module.named_parameters() if "modules_to_save" in name and "weight" in name
    )
    with torch.no_grad():
        weight += 1
    leaves = home.join(saved(model, home.directory / "saved"), **NAMED)
    expected = weight.detach().numpy().T
    assert leaves["action_out_proj/kernel"].tobytes() == expected.tobytes()
    assert differing(home.tree, {k: v for k, v in leaves.items() if "lora" not in k}) == {
        "action_out_proj/kernel"
    }


# Which numbers.


def test_dense_factors_are_repeated_and_cut(home: Home) -> None:
    """q: A for every head, B cut by head. k, v, gate, up, down: as they are. Where scales agree, bit for bit."""
    _, adapter = home.adapter(r=5, lora_alpha=5)
    leaves = home.join(adapter, rank=5, lora_alpha=5.0)
    heads, dim = home.heads, checkpoints.DIMS["head_dim"]
    for part, suffix, _ in golden.EXPERTS:
        for i in range(LAYERS):
            layer = f"{GEMMA[part]}.{i}"

            def at(leaf: str, i: int = i) -> tuple[Array, Array]:
                return leaves[f"{leaf}a"][i], leaves[f"{leaf}b"][i]

            a, b = pair(adapter, f"{layer}.self_attn.q_proj")
            leaf_a, leaf_b = at(f"{BLOCK}/attn/q_einsum{suffix}/lora_")
            for head in range(heads):
                assert np.array_equal(leaf_a[head], a.T)
                assert np.array_equal(leaf_b[head], b[head * dim : (head + 1) * dim].T)
            leaf_a, leaf_b = at(f"{BLOCK}/attn/kv_einsum{suffix}/lora_")
            for j, name in enumerate("kv"):
                a, b = pair(adapter, f"{layer}.self_attn.{name}_proj")
                assert np.array_equal(leaf_a[j, 0], a.T) and np.array_equal(leaf_b[j, 0], b.T)
            a, b = pair(adapter, f"{layer}.self_attn.o_proj")
            leaf_a, leaf_b = at(f"{BLOCK}/attn/attn_vec_einsum{suffix}/lora_")
            assert np.array_equal(leaf_a.reshape(heads * dim, -1), a.T)
            assert np.array_equal(leaf_b[0], b.T) and not leaf_b[1:].any()
            leaf_a, leaf_b = at(f"{BLOCK}/mlp{suffix}/gating_einsum_lora_")
            for j, name in enumerate(("gate", "up")):
                a, b = pair(adapter, f"{layer}.mlp.{name}_proj")
                assert np.array_equal(leaf_a[j], a.T) and np.array_equal(leaf_b[j], b.T)
            a, b = pair(adapter, f"{layer}.mlp.down_proj")
            leaf_a, leaf_b = at(f"{BLOCK}/mlp{suffix}/linear_lora_")
            assert np.array_equal(leaf_a, a.T) and np.array_equal(leaf_b, b.T)


def test_scales_are_folded_into_b_alone(home: Home) -> None:
    """Attention by PEFT's scale over openpi's, the feed-forward by PEFT's, which openpi does not apply."""
    _, adapter = home.adapter(r=3, lora_alpha=6)  # scale 2
    leaves = home.join(adapter, rank=3, lora_alpha=12.0)  # openpi's is 4
    for module, leaf, at, factor in (
        ("self_attn.v_proj", f"{BLOCK}/attn/kv_einsum/lora_", (1, 1, 0), 0.5),
        ("mlp.up_proj", f"{BLOCK}/mlp/gating_einsum_lora_", (1, 1), 2.0),
        ("mlp.down_proj", f"{BLOCK}/mlp/linear_lora_", (1,), 2.0),
    ):
        a, b = pair(adapter, f"{GEMMA['paligemma']}.1.{module}")
        assert np.array_equal(leaves[f"{leaf}a"][at], a.T)
        assert np.array_equal(leaves[f"{leaf}b"][at], b.T * np.float32(factor))


def test_smaller_ranks_and_missing_modules_start(home: Home) -> None:
    """As openpi starts a first factor, at a deviation of 0.01; the second is zero there."""
    targets = rf"{GEMMA['paligemma']}\.1\.(self_attn\.(q|v)|mlp\.gate)_proj"
    _, adapter = home.adapter(r=2, target_modules=targets)
    leaves = home.join(adapter, rank=5, lora_alpha=8.0)
    assert len(lora_leaves(leaves)) == 10 and not any(
        "_1/lora" in leaf or "mlp_1" in leaf for leaf in lora_leaves(leaves)
    )
    filled = {
        f"{BLOCK}/attn/q_einsum/lora_": (1, slice(None)),
        f"{BLOCK}/attn/kv_einsum/lora_": (1, 1),
        f"{BLOCK}/mlp/gating_einsum_lora_": (1, 0),
    }
    drawn = []
    for stem in {leaf[:-1] for leaf in lora_leaves(leaves)}:
        a, b = leaves[f"{stem}a"].copy(), np.swapaxes(leaves[f"{stem}b"], -1, -2).copy()
        assert a.shape[-1] == b.shape[-1] == 5
        own = np.zeros(a.shape, bool)
        if stem in filled:
            own[filled[stem]][..., :2] = True
            assert b[filled[stem]][..., :2].all()
            b[filled[stem]][..., :2] = 0
        assert not b.any(), stem
        assert a.all(), stem
        drawn.append(a[~own])
    values = np.concatenate(drawn)
    assert values.std() == pytest.approx(0.01, rel=0.03) and abs(values.mean()) < 5e-4
    assert len(np.unique(values)) > 0.999 * values.size
    assert np.abs(values).max() < 0.06


def test_an_untouched_expert_gets_leaves_only_when_named(home: Home) -> None:
    _, adapter = home.adapter(target_modules=EXPERT_ONLY)
    without = home.join(adapter, rank={"expert": 3}, lora_alpha=4.5)
    assert len(lora_leaves(without)) == 10
    assert all("_1/" in leaf or "mlp_1/" in leaf for leaf in lora_leaves(without))
    named = home.join(adapter, **NAMED)
    assert lora_leaves(named) == {leaf for leaf in checkpoints.pi0_tree(lora=RANK) if "lora" in leaf}
    more = lora_leaves(named) - lora_leaves(without)
    assert len(more) == 10 and all(named[leaf].any() == leaf.endswith("a") for leaf in more)
    assert differing(without, {leaf: array for leaf, array in named.items() if leaf not in more}) == set()
    expected = checkpoints.shapes({**checkpoints.DIMS, "layers": LAYERS}, "pi0", RANK, 1, False)
    assert {leaf: array.shape for leaf, array in named.items()} == expected


def test_block_diagonal_adapters_return_bit_for_bit(tmp_path: Path) -> None:
    """What bridge wrote, loaded and saved again by PEFT: known by its zeros, not by a record."""
    tree = checkpoints.pi0_tree(lora=RANK, layers=LAYERS)
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(source, tmp_path / "adapter", to="peft-adapter", lora_alpha=ALPHA, keep_alpha=True)
    home = Home(tmp_path / "home")
    again = saved(loaded(home.state, tmp_path / "adapter"), tmp_path / "again")
    assert not (again / "bridge.json").exists()
    for options in (
        NAMED,
        {"rank": {"paligemma": 16, "expert": 7}, "lora_alpha": {"paligemma": 8 / 5 * 16, "expert": 10.5}},
    ):
        leaves = home.join(again, **options)
        for leaf in lora_leaves(tree):
            rank = RANK["expert" if "_1/" in leaf else "paligemma"]
            ranked = leaves[leaf] if leaf.endswith("a") else np.swapaxes(leaves[leaf], -1, -2)
            kept = ranked[..., :rank] if leaf.endswith("a") else np.swapaxes(ranked[..., :rank], -1, -2)
            assert ranked[..., rank:].all() if leaf.endswith("a") else not ranked[..., rank:].any(), leaf
            if "attn_vec_einsum" in leaf and leaf.endswith("b"):
                assert np.array_equal(kept[:, 0], tree[leaf].sum(axis=1)) and not kept[:, 1:].any()
            else:
                assert np.array_equal(kept, tree[leaf]), leaf


# Where ranks and alphas come from.


def test_ranks_and_alphas_come_from_the_record(tmp_path: Path) -> None:
    """What `bridge.json` beside an adapter says, rslora too; `--rank` and `--lora-alpha` outrank it."""
    tree = checkpoints.pi0_tree(lora=RANK, layers=LAYERS)
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(source, tmp_path / "adapter", to="peft-adapter", lora_alpha=ALPHA, rslora=True)
    home = Home(tmp_path / "home")
    model = loaded(home.state, tmp_path / "adapter")

    plan = bridge.plan(tmp_path / "adapter", None, to="orbax", base=home.base)
    assert {name: (s.rank, s.alpha, s.rslora) for name, s in plan.scales.items()} == {
        part: (RANK[part], ALPHA[part], True) for part in RANK
    }
    assert all("bridge.json" in scale.origin for scale in plan.scales.values())
    assert_same_function(model, home.join(tmp_path / "adapter"), ROOTS)

    given = home.join(tmp_path / "adapter", lora_alpha={"paligemma": 2.0, "expert": 7.0})
    assert_same_function(model, given, scales_of(RANK, {"paligemma": 2.0, "expert": 7.0}))
    larger = {"paligemma": 16, "expert": 32}
    assert_same_function(
        model, home.join(tmp_path / "adapter", rank=larger), {"paligemma": 1.0, "expert": 1.0}
    )


@pytest.mark.parametrize("record", [None, "{}", "[]", "not JSON", '{"scales": {"expert": {"rank": "3"}}}'])
def test_without_a_record_they_are_stock(home: Home, record: str | None) -> None:
    _, adapter = home.adapter()
    if record is not None:
        (adapter / "bridge.json").write_text(record)
    plan = bridge.plan(adapter, None, to="orbax", base=home.base)
    assert {name: (s.rank, s.alpha, s.rslora) for name, s in plan.scales.items()} == {
        "paligemma": (16, 16.0, False),
        "expert": (32, 32.0, False),
    }
    text = str(plan)
    assert "paligemma: rank 16, alpha 16" in text and "expert: rank 32, alpha 32" in text


def test_a_plan_says_what_it_will_do(home: Home) -> None:
    _, adapter = home.adapter()
    plan = bridge.plan(adapter, None, to="orbax", base=home.base, **NAMED)
    assert plan.loss.name == "EQUIVALENT" and [edge.name for edge in plan.route] == ["join"]
    text = str(plan)
    assert "paligemma: rank 5, alpha 8 (given), alpha/rank = 1.6" in text
    assert "feed-forward: 1, openpi applies no scale there" in text
    assert {f"params/{leaf}" for leaf in checkpoints.pi0_tree(lora=RANK)} == plan.specs.keys()


def test_an_adapters_own_norm_stats_outrank_its_bases(home: Home) -> None:
    _, adapter = home.adapter()
    stats = adapter / "assets" / "another_robot" / "norm_stats.json"
    stats.parent.mkdir(parents=True)
    base = json.loads(next(home.base.glob("assets/*/norm_stats.json")).read_text())
    base["norm_stats"]["state"]["mean"][0] += 1
    stats.write_text(json.dumps(base))
    home.join(adapter, **NAMED)


def test_two_runs_write_the_same_bytes(home: Home) -> None:
    _, adapter = home.adapter()
    for workers in (1, 4):
        output = home.directory / str(workers)
        bridge.convert(adapter, output, to="orbax", base=home.base, workers=workers, **NAMED)
    assert golden.files(home.directory / "1") == golden.files(home.directory / "4")


# What trains.

TRAINS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (the base, PEFT's config, how it is joined)
    "smaller ranks": ({}, {"r": 2}, NAMED),
    "two modules of one layer": (
        {},
        {"target_modules": r".*gemma_expert.*\.1\.self_attn\.(q|v)_proj"},
        NAMED,
    ),
    "o and down alone": ({}, {"target_modules": r".*(o|down)_proj"}, NAMED),
    "fused qkv, v alone": (
        {"fused_qkv": True},
        {"target_modules": r".*(language_model|gemma_expert).*\d\.self_attn\.v_proj"},
        NAMED,
    ),
    "several kv heads": ({"heads": 6, "kv_heads": 3}, {"r": 1}, NAMED),
}


@pytest.mark.parametrize("form", TRAINS)
def test_every_rank_trains(form: str, tmp_path: Path, record_property: Record) -> None:
    """Through openpi's einsums: the first step reaches each rank, the second both of its factors."""
    make, config, options = TRAINS[form]
    home = Home(tmp_path, **make)
    model, adapter = home.adapter(**config)
    leaves = home.join(adapter, **options)
    assert_same_function(model, leaves, SCALES)
    assert dead_ranks(leaves) == dict.fromkeys({leaf[:-1] for leaf in lora_leaves(leaves)}, 0)
    assert untrained_after_a_step(leaves) == []
    # zeros in both, as they were written once, are seen
    stem = f"{BLOCK}/mlp_1/linear_lora_"
    spoiled = {leaf: array.copy() for leaf, array in leaves.items()}
    spoiled[f"{stem}a"][0, :, 2] = spoiled[f"{stem}b"][0, 2] = 0
    assert {leaf: count for leaf, count in dead_ranks(spoiled).items() if count} == {stem: 1}


def test_ranks_that_an_adapter_has_in_vain_start_anew(tmp_path: Path) -> None:
    """Zeros in both factors, as earlier versions padded them: the same function, and it trains."""
    tree = checkpoints.pi0_tree(lora=RANK, layers=LAYERS)
    for leaf in lora_leaves(tree):
        ranked = tree[leaf] if leaf.endswith("a") else np.swapaxes(tree[leaf], -1, -2)
        ranked[..., 1] = 0
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(source, tmp_path / "adapter", to="peft-adapter", lora_alpha=ALPHA)
    home = Home(tmp_path / "home")
    leaves = home.join(tmp_path / "adapter")
    assert sum(dead_ranks(tree).values()) > 0 and not any(dead_ranks(leaves).values())
    assert_same_function(loaded(home.state, tmp_path / "adapter"), leaves, SCALES)


def test_the_seed_decides_and_is_recorded(home: Home) -> None:
    """One seed, the same numbers; whatever the container spells paths like. Functions agree bit for bit."""
    _, adapter = home.adapter(r=2)
    first, again, other = (
        home.join(adapter, **NAMED, **more) for more in ({}, {"value_suffix": True}, {"seed": 7})
    )
    records = [
        json.loads((home.directory / f"joined-{number}" / "bridge.json").read_text())["initialised"]
        for number in (2, 4)
    ]
    assert differing(first, again) == set()
    assert differing(first, other) == {leaf for leaf in lora_leaves(first) if leaf.endswith("a")}
    assert [record["seed"] for record in records] == [0, 7]
    leaf = f"{BLOCK}/mlp/linear_lora_a"
    assert records[0]["leaves"][leaf] == {
        "values": first[leaf][..., 2:].size,
        "initialiser": "normal(stddev=0.01)",
    }
    for ours, theirs in zip(online(first, SCALES), online(other, SCALES), strict=True):
        assert np.asarray(ours[2]).tobytes() == np.asarray(theirs[2]).tobytes()


def test_a_plan_says_what_starts(home: Home) -> None:
    _, adapter = home.adapter(
        r=3, target_modules=r".*(language_model|gemma_expert).*\.layers\.\d+\.self_attn\.\w+_proj"
    )
    notes = bridge.plan(adapter, None, to="orbax", base=home.base, **NAMED).notes
    said = (
        "12 modules and the upper ranks of 8 modules have no factors in the source: the first is drawn from "
        "normal(stddev=0.01) (--seed 0), the second is zero, so that they train and change no output"
    )
    assert notes.count(said) == 1
    _, whole = home.adapter(r=3, lora_alpha=3)
    whole_notes = bridge.plan(whole, None, to="orbax", base=home.base, rank=3, lora_alpha=3.0).notes
    assert not any("no factors" in note for note in whole_notes)


# There and back.


def test_an_adapter_returns_as_one_of_the_same_function(home: Home, record_property: Record) -> None:
    """peft -> orbax -> peft: factors bit for bit where openpi has no heads in them."""
    model, adapter = home.adapter(r=3, lora_alpha=3)
    again = home.bridged(adapter, rank=3, lora_alpha=3.0)
    back = loaded(home.state, again)
    worst = 0.0
    with torch.no_grad():
        for path, x, _ in online(home.tree, {}):
            expected, got = (each.get_submodule(PREFIX + path)(torch.from_numpy(x)) for each in (model, back))
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    record_property("relative error of an adapter that went through openpi", worst)
    print(f"relative error {worst:.2g}")
    assert worst <= TOLERANCE
    first, last = factors(adapter), factors(again)
    assert first.keys() == last.keys()
    assert {name for name in golden.differing(first, last) if "q_proj" not in name} == set()
    # q has a block for every head, each with the whole of A
    for part in RANK:
        a, b = pair(adapter, f"{GEMMA[part]}.0.self_attn.q_proj")
        blocks_a, blocks_b = pair(again, f"{GEMMA[part]}.0.self_attn.q_proj")
        assert np.array_equal(blocks_a, np.tile(a, (home.heads, 1)))
        assert np.array_equal(sum(np.split(blocks_b, home.heads, axis=1)), b)
    # and from there on nothing changes any more
    third = home.bridged(again, rank=3, lora_alpha=3.0)
    assert golden.differing(last, factors(third)) == set()


# What does not fit.


def filled(home: Home) -> tuple[Any, Path]:
    """An adapter that bridge wrote, trained on in PEFT: off the diagonal of q's lora_B nothing is zero now."""
    tree = checkpoints.pi0_tree(lora=RANK, layers=LAYERS)
    source = checkpoints.save(tree, home.directory / "1", quick=True)
    bridge.convert(source, home.directory / "made", to="peft-adapter", lora_alpha=ALPHA)
    model = loaded(home.state, home.directory / "made", trainable=True)
    train(model)
    adapter = saved(model, home.directory / "filled")
    # PEFT keeps no record, and the one of what was trained since would not match
    scales = json.loads((home.directory / "made" / "bridge.json").read_text())["scales"]
    (adapter / "bridge.json").write_text(json.dumps({"scales": scales}))
    return model, adapter


def off_diagonal(b: Array, heads: int) -> float:
    """Largest entry off the diagonal blocks over the largest of all."""
    blocks = np.abs(b.reshape(heads, b.shape[0] // heads, heads, -1))
    rest = max(blocks[m, :, n].max() for m in range(heads) for n in range(heads) if m != n)
    return float(rest / blocks.max())


def refusal(home: Home, adapter: Path, **options: Any) -> Refusal:
    """Refused in words, with nothing written and nothing changed."""
    before = golden.files(home.directory)
    with pytest.raises(CheckpointRefused) as caught:
        bridge.convert(adapter, home.directory / "new" / "orbax", to="orbax", base=home.base, **options)
    for problem in caught.value.problems:
        assert problem.cause and "\n" not in problem.cause and len(problem.cause) < 700, problem.cause
        assert problem.fix and "\n" not in problem.fix
    assert len(set(caught.value.problems)) == len(caught.value.problems)
    assert golden.files(home.directory) == before and not (home.directory / "new").exists()
    return caught.value


def test_blocks_that_training_filled_are_refused(home: Home) -> None:
    """With the number that shows it, for every module, and the ways out; the ways out are open."""
    model, adapter = filled(home)
    found = refusal(home, adapter)
    said = str(found)
    form = (
        r"([\w.]+\.layers)\.(\d+|\{0\.\.1\})\.self_attn\.q_proj has rank (\d+) and non-zero entries outside its "
        r"(\d+) diagonal blocks \(up to (\S+) of the largest entry\)"
    )
    numbers = {}
    for gemma, layer, rank, heads, number in re.findall(form, said):
        for i in range(LAYERS) if layer.startswith("{") else (int(layer),):
            numbers[f"{gemma.removeprefix(PREFIX)}.{i}.self_attn.q_proj"] = (int(rank), int(heads), number)
    expected = {}
    for part in RANK:
        for i in range(LAYERS):
            module = f"{GEMMA[part]}.{i}.self_attn.q_proj"
            number = off_diagonal(pair(adapter, module)[1], home.heads)
            assert number > 1e-4
            expected[module] = (home.heads * RANK[part], home.heads, f"{number:.1e}")
    assert numbers == expected
    assert "o_proj" not in said and "k_proj" not in said
    for fix in ("--fold", "--to torch-merged", "--lossy", "--rank"):
        assert all(fix in problem.fix for problem in found.problems)
    rank = {part: home.heads * RANK[part] for part in RANK}
    assert_same_function(
        model, home.join(adapter, rank=rank, lora_alpha=3.0), {p: 3.0 / rank[p] for p in rank}
    )
    merged = home.join(adapter, fold=True)
    assert not lora_leaves(merged)
    assert_same_function(model, merged, {})


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({"r": 6}, NAMED, r"layers\.\{0\.\.1\}\.mlp\.down_proj has rank 6; openpi's is 5"),
        ({"r": 6}, NAMED, r"gemma_expert\S+q_proj has rank 6; openpi's is 3"),
        (
            {"r": 14},
            {"rank": 3, "lora_alpha": 3.0},
            r"q_proj has rank 14 and non-zero entries outside its 7 diagonal blocks",
        ),
        ({"r": 17}, {}, r"paligemma\.model\S+ has rank 17; openpi's is 16"),
        (
            {"rank_pattern": {r".*\.1\.self_attn\.v_proj": 9}},
            NAMED,
            r"layers\.1\.self_attn\.v_proj has rank 9",
        ),
    ],
)
def test_ranks_that_are_too_large_are_refused(
    home: Home, config: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    _, adapter = home.adapter(**config)
    found = refusal(home, adapter, **options)
    assert re.search(says, str(found)), str(found)
    assert all("--rank" in problem.fix and "--lossy" in problem.fix for problem in found.problems)


def test_blocks_of_a_larger_rank_are_refused(home: Home) -> None:
    _, adapter = filled(home)
    shutil.rmtree(adapter)
    found = refusal(home, home.directory / "made", rank={"paligemma": 4, "expert": 3}, lora_alpha=3.0)
    assert re.search(r"q_proj has 7 blocks of rank 5; openpi's rank is 4", str(found))
    assert "gemma_expert" not in str(found)


def represented(leaves: Mapping[str, Array], scales: Mapping[str, float]) -> dict[str, Array]:
    """The change of every projection that the leaves stand for, (out, in), in float64."""
    found = {}
    for part, suffix, prefix in golden.EXPERTS:
        for i in range(LAYERS):
            layer = f"{prefix}.layers.{i}"

            def of(leaf: str, i: int = i) -> tuple[Array, Array]:
                return tuple(leaves[f"{leaf}{which}"][i].astype(np.float64) for which in "ab")  # type: ignore[return-value]

            scale = scales[part]
            a, b = of(f"{BLOCK}/attn/q_einsum{suffix}/lora_")
            found[f"{layer}.self_attn.q_proj"] = scale * np.concatenate(
                [(x @ y).T for x, y in zip(a, b, strict=True)]
            )
            a, b = of(f"{BLOCK}/attn/kv_einsum{suffix}/lora_")
            for j, name in enumerate("kv"):
                found[f"{layer}.self_attn.{name}_proj"] = scale * (a[j, 0] @ b[j, 0]).T
            a, b = of(f"{BLOCK}/attn/attn_vec_einsum{suffix}/lora_")
            total = b.sum(axis=0)
            found[f"{layer}.self_attn.o_proj"] = scale * np.concatenate([(x @ total).T for x in a], axis=1)
            a, b = of(f"{BLOCK}/mlp{suffix}/gating_einsum_lora_")
            for j, name in enumerate(("gate", "up")):
                found[f"{layer}.mlp.{name}_proj"] = (a[j] @ b[j]).T
            a, b = of(f"{BLOCK}/mlp{suffix}/linear_lora_")
            found[f"{layer}.mlp.down_proj"] = (a @ b).T
    return found


@pytest.mark.parametrize("kind", ["filled", "dense"])
def test_lossy_says_its_true_error(home: Home, kind: str, record_property: Record) -> None:
    """Frobenius norm of what the leaves leave out of each weight's change, over that of the change."""
    if kind == "filled":
        model, adapter = filled(home)
        options: dict[str, Any] = {"lora_alpha": ALPHA}
    else:
        model, adapter = home.adapter(r=10, lora_alpha=3)
        options = NAMED
    output = home.directory / "lossy"
    plan = bridge.plan(adapter, output, to="orbax", base=home.base, lossy=True, **options)
    assert plan.loss.name in ("ROUNDED", "LOSSY")  # not the same function: it must not say so
    stated = dict(
        re.fullmatch(r"approximated: (\S+) (\S+)", note).groups()  # type: ignore[union-attr]
        for note in plan.notes
        if note.startswith("approximated: ")
    )
    plan.run()
    leaves = checkpoints.restore(output)
    true = {}
    for module, got in represented(leaves, SCALES).items():
        layer = model.get_submodule(PREFIX + module)
        a, b = (
            getattr(layer, name)["default"].weight.detach().double().numpy() for name in ("lora_A", "lora_B")
        )
        expected = layer.scaling["default"] * (b @ a)
        true[module] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    lost = {module for module, error in true.items() if error > 1e-5}
    stated = {module.removeprefix(PREFIX): float(error) for module, error in stated.items()}
    assert lost == {module for module, error in stated.items() if error > 1e-5}
    assert {module.rpartition(".")[2] for module in lost} == (
        {"q_proj"} if kind == "filled" else {m.rpartition(".")[2] for m in (*ATTENTION, *MLP)}
    )
    for module in lost:
        assert stated[module] == pytest.approx(true[module], rel=6e-3), module
    worst = max(stated.values())
    assert any(f"{len(stated)} modules are approximated" in n and f"{worst:.2e}" in n for n in plan.notes)
    assert f"{worst:.2e}" in str(plan)
    record_property(f"{kind}: error stated and true", (worst, max(true.values())))
    print(f"{kind}: {len(lost)} modules lose up to {worst:.2e}")
    # no rank-r leaves lose less: what is lost is what the singular values behind r weigh
    for module in lost:
        part = "expert" if "gemma_expert" in module else "paligemma"
        layer = model.get_submodule(PREFIX + module)
        a, b = (
            getattr(layer, name)["default"].weight.detach().double().numpy() for name in ("lora_A", "lora_B")
        )
        products = [rows @ a for rows in np.split(b, home.heads)] if module.endswith("q_proj") else [b @ a]
        singular = [np.linalg.svd(product, compute_uv=False) for product in products]
        least = sum((values[RANK[part] :] ** 2).sum() for values in singular)
        total = sum((values**2).sum() for values in singular)
        assert true[module] == pytest.approx(np.sqrt(least / total), rel=1e-3)


def test_lossy_loses_nothing_that_fits(home: Home) -> None:
    _, adapter = home.adapter(r=3)
    plan = bridge.plan(adapter, None, to="orbax", base=home.base, lossy=True, **NAMED)
    assert not any("approximated" in note for note in plan.notes) and plan.loss.name == "EQUIVALENT"
    exact, lossy = home.join(adapter, **NAMED), home.join(adapter, lossy=True, **NAMED)
    assert differing(exact, lossy) == set()


# Refusals.

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (options, the cause, what to do)
    "alpha unknown": (
        {"rank": 5},
        r"paligemma gets LoRA of rank 5, but the alpha openpi will use",
        r"--lora-alpha paligemma=ALPHA",
    ),
    "alpha of one unknown": (
        {"rank": RANK, "lora_alpha": {"expert": 3.0}},
        r"paligemma gets LoRA of rank 5, but the alpha openpi will use is unknown",
        r"--lora-alpha paligemma=ALPHA",
    ),
    "no such expert": (
        {"rank": {"exprt": 3}},
        r"--rank names exprt, which cannot carry LoRA",
        "expert, paligemma",
    ),
    "rank of a tower": (
        {"rank": {"siglip": 3}},
        r"--rank names siglip, which cannot carry LoRA",
        "expert, paligemma",
    ),
    "alpha of nobody": (
        {**NAMED, "lora_alpha": {"exprt": 1.0}},
        r"--lora-alpha names exprt",
        "expert, paligemma",
    ),
    "rank 0": ({"rank": 0, "lora_alpha": 1.0}, r"--rank is 0", "positive"),
    "rank of one is 0": ({"rank": {"expert": 0}, "lora_alpha": 1.0}, r"--rank is 0", "positive"),
    "half a rank": ({"rank": {"expert": 3.5}, "lora_alpha": 1.0}, r"--rank is 3\.5", "positive"),
    "alpha 0": (
        {"rank": RANK, "lora_alpha": 0.0},
        r"--lora-alpha is 0\.0",
        "LoRAConfig",
    ),
    "alpha below 0": (
        {"rank": RANK, "lora_alpha": {"expert": -1.0}},
        r"--lora-alpha is -1\.0 for expert",
        "LoRAConfig",
    ),
    "alpha is no number": ({"rank": RANK, "lora_alpha": float("nan")}, r"--lora-alpha is nan", "LoRAConfig"),
    "fold and rank": (
        {"fold": True, "rank": 3},
        r"--rank has no effect from peft-adapter\[lora\] to orbax\[base\]",
        "leave --rank out",
    ),
    "fold and lossy": (
        {"fold": True, "lossy": True},
        r"--lossy has no effect from peft-adapter\[lora\] to orbax\[base\]",
        "leave --lossy",
    ),
    "fold and alpha": ({"fold": True, "lora_alpha": 3.0}, r"--lora-alpha is given", "leave --lora-alpha out"),
    "keep alpha": (
        {**NAMED, "keep_alpha": True},
        r"--keep-alpha has no effect with --to orbax",
        "leave",
    ),
    "layout": ({**NAMED, "layout": "lerobot"}, r"--layout has no effect with --to orbax", "leave"),
    "no base": ({"base": None}, r"no route from peft-adapter\[lora\] to orbax without a base", "--base PATH"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Path]:
    """An adapter of rank 3 that nothing is wrong with."""
    home = Home(tmp_path_factory.mktemp("plain"))
    return home, home.adapter()[1]


def refused(home: Home, adapter: Path, tmp_path: Path, says: str, fix: str, **options: Any) -> None:
    before = golden.files(home.directory)
    with pytest.raises(Refusal, match=says) as caught:
        bridge.convert(adapter, tmp_path / "new" / "orbax", **{"to": "orbax", "base": home.base, **options})
    for problem in caught.value.problems:
        assert problem.cause and "\n" not in problem.cause and problem.fix and "\n" not in problem.fix
    assert any(re.search(says, p.cause) and fix in p.fix for p in caught.value.problems), (
        caught.value.problems
    )
    assert not (tmp_path / "new").exists() and golden.files(home.directory) == before


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(plain: tuple[Home, Path], name: str, tmp_path: Path) -> None:
    options, says, fix = BAD[name]
    refused(*plain, tmp_path, says, fix, **options)


def test_an_alpha_for_an_expert_without_lora_is_refused(plain: tuple[Home, Path], tmp_path: Path) -> None:
    """It would be ignored in silence; with `--rank` it is not."""
    home, _ = plain
    _, adapter = trained(home.state, tmp_path / "adapter", target_modules=EXPERT_ONLY)
    says = r"--lora-alpha names paligemma, which the adapter does not touch"
    refused(home, adapter, tmp_path, says, "--rank paligemma=RANK", rank={"expert": 3}, lora_alpha=ALPHA)


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Change, or with None drop, the tensors whose names match."""

    def damage(adapter: Path) -> None:
        state = safetensors.torch.load_file(adapter / WEIGHTS)
        for key in [key for key in state if re.search(name, key)]:
            value = how(state.pop(key))
            if value is not None:
                state[key] = value.contiguous()
        safetensors.torch.save_file(state, adapter / WEIGHTS, {"format": "pt"})

    return damage


def config(**fields: Any) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        described = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(described | fields))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a twin lost": (change(r"expert.*\.0\.\S+up_proj\.lora_B", lambda _: None), r"lora_B\.weight is missing"),
    "a rank that the config does not have": (config(r=4), r"has rank 3 but the config gives it 4"),
    "not finite": (
        change(r"expert.*\.1\.\S+q_proj\.lora_A", lambda a: a * torch.nan),
        r"layers\.1\.self_attn\.q_proj\.lora_A\.weight contains NaN or infinite values",
    ),
    "another base": (change(r"gate_proj\.lora_B", lambda b: b[:-1]), r"does not fit"),
    "DoRA": (config(use_dora=True), r"use_dora is True"),
    "trained biases": (config(bias="all"), r"bias is 'all'"),
    "dtype": (change(r"\.0\.\S+q_proj\.lora_B", lambda b: b.double()), r"has dtype float64"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapters_are_refused(plain: tuple[Home, Path], name: str, tmp_path: Path) -> None:
    home, adapter = plain
    damage, says = DAMAGE[name]
    shutil.copytree(adapter, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    refused(home, tmp_path / "adapter", tmp_path, says, "", **NAMED)


def test_a_base_with_lora_of_its_own_is_refused(plain: tuple[Home, Path], tmp_path: Path) -> None:
    home, adapter = plain
    tree = checkpoints.pi0_tree(lora=RANK, layers=LAYERS)
    base = checkpoints.save(tree, tmp_path / "lora", quick=True)
    says = r"has LoRA factors of its own"
    refused(home, adapter, tmp_path, says, "--to torch-base", **{**NAMED, "base": base})


@pytest.mark.parametrize(
    "make", [{"layers": 3}, {"width": 14}, {"heads": 6}], ids=["layers", "width", "heads"]
)
def test_a_base_of_other_sizes_is_refused(
    plain: tuple[Home, Path], make: dict[str, int], tmp_path: Path
) -> None:
    home, adapter = plain
    other = Home(tmp_path / "other", **make)
    # its config gives LoRA to every layer of a base, and it has none for the third
    says = r"gives LoRA to \S+layers\.2\.\S+, but" if "layers" in make else r"does not fit"
    fix = "restore" if "layers" in make else "--base"
    refused(home, adapter, tmp_path, says, fix, **{**NAMED, "base": other.base})
