"""The base that an adapter applies to: written beside it, compared with another, or carried in it."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import bridge
from bridge.errors import Refusal
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Tree
from tests.kit.golden import DEAD_HEAD, EMBED_TOKENS, EXPERT, LM_HEAD, PALIGEMMA, TOLERANCE, State
from tests.kit.peft import CASES, PREFIX, config_of, load_adapter, module_errors, relative, tensors_of
from tests.kit.record import Record

ALPHA = {"paligemma": 8.0, "expert": 4.5}
SCALES = {"paligemma": 8 / 5, "expert": 1.5}
OPTIONS: dict[str, Any] = {"to": "peft-adapter", "lora_alpha": ALPHA}
TOWER = f"{PALIGEMMA}.model.vision_tower.vision_model"
LANGUAGE = f"{PALIGEMMA}.model.language_model"
BLOCK = "PaliGemma/img/Transformer/encoderblock"


# --with-base.


@pytest.mark.parametrize(("name", "layout"), CASES, ids=["-".join(case) for case in CASES])
def test_base_is_that_of_torch_base(name: str, layout: str, tmp_path: Path) -> None:
    """`base/` is what `--to torch-base` writes alone: weights, config and assets, byte for byte."""
    source = golden.golden(name)
    horizon = source.facts["action_horizon"]
    bridge.convert(
        source.checkpoint,
        tmp_path / "adapter",
        to="peft-adapter",
        layout=layout,
        with_base=True,
        action_horizon=horizon,
        **source.options,
    )
    bridge.convert(
        source.checkpoint, tmp_path / "base", to="torch-base", layout=layout, action_horizon=horizon
    )
    written = golden.files(tmp_path / "adapter" / "base")
    alone = golden.files(tmp_path / "base")
    assert written.keys() == alone.keys()
    assert {"model.safetensors", "bridge.json"} <= written.keys()
    # LeRobot's config.json can only say the stock dimensions
    assert ("config.json" in written) == (layout != "lerobot")
    assert [path for path in written if path.startswith("assets/")]
    assert {path for path in alone if alone[path] != written[path]} <= {"bridge.json"}
    # and the adapter is the one that is written without it, but for the name of its base
    bridge.convert(
        source.checkpoint,
        tmp_path / "bare",
        to="peft-adapter",
        layout=layout,
        base_name="x",
        **source.options,
    )
    assert golden.differing(tensors_of(tmp_path / "adapter"), tensors_of(tmp_path / "bare")) == set()
    configs = [config_of(tmp_path / out) for out in ("adapter", "bare")]
    for config in configs:
        del config["base_model_name_or_path"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", golden.WITH_LORA)
def test_base_has_the_sources_own_bits(name: str, tmp_path: Path) -> None:
    """Unfolded weights in the source's dtypes, complete: it loads as any merged checkpoint does."""
    source = golden.golden(name)
    bridge.convert(source.checkpoint, tmp_path / "out", to="peft-adapter", with_base=True, **source.options)
    state = golden.read(tmp_path / "out" / "base")
    by_hand = golden.by_hand(source.leaves)
    assert {state[name].dtype for name in by_hand} == {weight.dtype for weight in by_hand.values()}
    by_hand[DEAD_HEAD] = by_hand[DEAD_HEAD].to(state[DEAD_HEAD].dtype)
    assert golden.differing(by_hand, state) == set()
    model = golden.module_of(source.shapes)
    safetensors.torch.load_model(model, tmp_path / "out" / "base" / "model.safetensors", strict=True)
    opened = bridge.describe(tmp_path / "out" / "base")
    assert not opened.problems
    loaded = bridge.load_torch(tmp_path / "out" / "base")
    assert golden.differing({**by_hand, EMBED_TOKENS: by_hand[LM_HEAD]}, loaded) == set()


def test_base_and_adapter_appear_together_or_not_at_all(tmp_path: Path) -> None:
    """A value that cannot be written fails both: nothing is left."""
    tree = checkpoints.pi0_tree(layers=2)
    tree["action_in_proj/kernel"][0, 0] = np.nan
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    with pytest.raises(Refusal, match=r"action_in_proj/kernel contains NaN or infinite values"):
        bridge.convert(source, tmp_path / "out", with_base=True, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = golden.golden("pi05_lora")
    options: dict[str, Any] = {"to": "peft-adapter", "with_base": True, "base_name": "b", **source.options}
    for workers in (1, 4):
        bridge.convert(source.checkpoint, tmp_path / str(workers), workers=workers, **options)
    assert golden.files(tmp_path / "1") == golden.files(tmp_path / "4")


# What the plan says of the base.


def test_plan_says_that_another_base_is_another_policy(tmp_path: Path) -> None:
    source = golden.golden("pi0_lora")
    options: dict[str, Any] = {"to": "peft-adapter", **source.options}

    def said(**more: Any) -> bool:
        plan = bridge.plan(source.checkpoint, tmp_path / "out", **options, **more)
        return any("another policy" in note and "--with-base" in note for note in plan.notes)

    assert said()
    assert not said(with_base=True)
    assert not said(base=source.checkpoint)


@pytest.mark.parametrize("name", golden.WITH_LORA)
def test_lerobot_is_warned_of_an_empty_base_name(name: str, tmp_path: Path) -> None:
    source = golden.golden(name)

    def warned(**more: Any) -> bool:
        options: dict[str, Any] = {"to": "peft-adapter", "layout": "lerobot", **source.options, **more}
        plan = bridge.plan(source.checkpoint, tmp_path / "out", **options)
        return any("lerobot needs base_model_name_or_path, which is empty" in note for note in plan.notes)

    assert warned()
    assert not warned(layout="openpi")
    assert not warned(with_base=True)
    assert not warned(base_name="lerobot/pi0_base")


# --base REF: which weights differ.

#: leaf -> (index of what is changed there, the weights in PyTorch that it makes differ)
EDITS: dict[str, tuple[Any, list[str]]] = {
    "action_in_proj/kernel": ((3, 2), ["action_in_proj.weight"]),
    "action_in_proj/bias": ((0,), ["action_in_proj.bias"]),
    "state_proj/bias": ((5,), ["state_proj.bias"]),
    "PaliGemma/img/head/kernel": ((1, 1), [f"{PALIGEMMA}.model.multi_modal_projector.linear.weight"]),
    f"{BLOCK}/MlpBlock_0/Dense_0/kernel": ((1, 4, 4), [f"{TOWER}.encoder.layers.1.mlp.fc1.weight"]),
    f"{BLOCK}/MultiHeadDotProductAttention_0/out/kernel": (
        (0, 1, 2, 3),
        [f"{TOWER}.encoder.layers.0.self_attn.out_proj.weight"],
    ),
    "PaliGemma/img/pos_embedding": ((0, 7, 2), [f"{TOWER}.embeddings.position_embedding.weight"]),
    "PaliGemma/img/embedding/kernel": ((1, 0, 2, 3), [f"{TOWER}.embeddings.patch_embedding.weight"]),
    "PaliGemma/llm/final_norm_1/scale": ((4,), [f"{EXPERT}.model.norm.weight"]),
    "PaliGemma/llm/layers/pre_ffw_norm/scale": (
        (slice(1, 3), 0),
        [f"{LANGUAGE}.layers.{i}.post_attention_layernorm.weight" for i in (1, 2)],
    ),
}


def base_tree(**made: Any) -> Tree:
    """The tree without its factors."""
    return {leaf: array for leaf, array in checkpoints.pi0_tree(**made).items() if "lora" not in leaf}


def edited(tree: Tree, *leaves: str) -> Tree:
    """A copy with some numbers of these leaves changed."""
    found = dict(tree)
    for leaf in leaves:
        found[leaf] = tree[leaf].copy()
        found[leaf][EDITS[leaf][0]] += 0.25
    return found


def changed(*leaves: str) -> set[str]:
    return {weight for leaf in leaves for weight in EDITS[leaf][1]}


def expand(line: str) -> list[str]:
    """Undo the grouping of a note: `layers.{1..2}.x` is two names."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([\d,]+)\}", line)
    if match is None:
        return [line]
    first, last, listed = match.groups()
    numbers = listed.split(",") if listed else map(str, range(int(first), int(last) + 1))
    return [name for n in numbers for name in expand(line[: match.start()] + n + line[match.end() :])]


def said_to_differ(plan: bridge.Plan) -> set[str]:
    lines = [note.removeprefix("differs: ") for note in plan.notes if note.startswith("differs: ")]
    return {name for line in lines for name in expand(line)}


@dataclass(frozen=True)
class Pair:
    """A LoRA checkpoint, and one base in every form bridge reads."""

    home: Path
    tree: Tree
    reference: Tree

    @property
    def source(self) -> Path:
        return self.home / "1"


REFERENCES = ("orbax", "lora", "openpi", "lerobot", "transformers", "file")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The source's trained parts differ from the reference in all of `EDITS`."""
    home = tmp_path_factory.mktemp("pair")
    tree = checkpoints.pi0_tree()
    checkpoints.save(tree, home / "1", quick=True)
    reference = edited(base_tree(), *EDITS)
    checkpoints.save(reference, home / "orbax", quick=True)
    # another run's factors: they are not compared
    checkpoints.save(
        {**checkpoints.pi0_tree(lora={"expert": 2}, seed=9), **reference}, home / "lora", quick=True
    )
    for layout in ("openpi", "lerobot", "transformers"):
        bridge.convert(home / "orbax", home / layout, to="torch-merged", dtype="float32", layout=layout)
    shutil.copytree(home / "openpi", home / "shards")
    (home / "file").mkdir()
    shutil.copy(home / "openpi" / "model.safetensors", home / "file" / "policy.safetensors")
    return Pair(home, tree, reference)


@pytest.mark.parametrize("form", REFERENCES)
def test_exactly_the_weights_that_differ_are_listed(pair: Pair, form: str) -> None:
    plan = bridge.plan(pair.source, None, base=pair.home / form, **OPTIONS)
    assert said_to_differ(plan) == changed(*EDITS)
    ours, theirs = (golden.by_hand(tree) for tree in (pair.tree, pair.reference))
    sizes = {name: relative(ours[name], theirs[name]) for name in changed(*EDITS)}
    largest = max(sizes, key=sizes.__getitem__)
    headline = [note for note in plan.notes if f"{len(sizes)} weights differ" in note]
    assert len(headline) == 1
    assert f"{largest}, relative {sizes[largest]:.1e}" in headline[0]
    assert str(pair.home / form) in headline[0]


@pytest.mark.parametrize("form", REFERENCES)
def test_sizes_of_differences(pair: Pair, form: str, record_property: Record) -> None:
    """The norm of what differs over the norm of the reference, weight by weight, in float64."""
    from bridge.checkpoint.open import open_source, understand
    from bridge.compare.base import differences

    source, reference = (understand(open_source(path)) for path in (pair.source, pair.home / form))
    found = differences(source, reference)
    ours, theirs = (golden.by_hand(tree) for tree in (pair.tree, pair.reference))
    assert found == pytest.approx({name: relative(ours[name], theirs[name]) for name in found}, rel=1e-6)
    assert found.keys() == changed(*EDITS)


@pytest.mark.parametrize("leaf", EDITS)
def test_one_number_that_differs_is_found(pair: Pair, leaf: str, tmp_path: Path) -> None:
    """One leaf at a time: nothing else is named."""
    checkpoints.save(edited(base_tree(), leaf), tmp_path / "ref", quick=True)
    plan = bridge.plan(pair.source, None, base=tmp_path / "ref", **OPTIONS)
    assert said_to_differ(plan) == changed(leaf)


def test_an_equal_base_is_said_to_be_equal(pair: Pair, tmp_path: Path) -> None:
    bridge.convert(pair.source, tmp_path / "base", to="torch-base")
    for base in (pair.source, tmp_path / "base"):
        plan = bridge.plan(pair.source, None, base=base, **OPTIONS)
        assert not said_to_differ(plan)
        assert [note for note in plan.notes if "equal those of" in note and str(base) in note]
        assert not [note for note in plan.notes if "another policy" in note]


def test_difference_of_dtype_alone_is_none(tmp_path: Path) -> None:
    """Frozen weights in bfloat16 equal a float32 base that holds the same numbers."""
    tree = checkpoints.pi0_tree(frozen_dtype="bfloat16")
    checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(tmp_path / "1", tmp_path / "wide", to="torch-base", dtype="float32")
    plan = bridge.plan(tmp_path / "1", None, base=tmp_path / "wide", **OPTIONS)
    assert not said_to_differ(plan)


def test_a_bfloat16_base_differs_where_weights_were_trained(tmp_path: Path, record_property: Record) -> None:
    """Frozen weights are bfloat16 already; trained ones are float32, and a narrow base has them rounded."""
    tree = checkpoints.pi0_tree(frozen_dtype="bfloat16")
    checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(tmp_path / "1", tmp_path / "narrow", to="torch-base", dtype="bfloat16")
    narrow = golden.read(tmp_path / "narrow")
    by_hand = golden.by_hand(tree)
    rounded = {
        name
        for name, weight in by_hand.items()
        if not torch.equal(weight.to(torch.float32), narrow[name].to(torch.float32))
    }
    assert rounded and all(narrow[name].dtype == torch.bfloat16 for name in rounded)
    plan = bridge.plan(tmp_path / "1", None, base=tmp_path / "narrow", **OPTIONS)
    assert said_to_differ(plan) == rounded
    headline = next(note for note in plan.notes if "weights differ" in note)
    size = float(re.findall(r"relative ([\d.e+-]+)", headline)[0])
    record_property("largest relative difference of a bfloat16 base", size)
    assert 5e-4 < size < 8e-3


def test_comparing_reports_progress(pair: Pair) -> None:
    seen: list[tuple[int, int]] = []
    bridge.plan(pair.source, None, base=pair.home / "orbax", progress=lambda *at: seen.append(at), **OPTIONS)
    assert [count for count, _ in seen] == sorted(count for count, _ in seen)
    # both are read
    total = 2 * sum(array.nbytes for array in base_tree().values())
    assert seen[-1] == (total, total)


# --modules-to-save.


def modules_of(weights: set[str]) -> set[str]:
    return {weight.rpartition(".")[0] for weight in weights}


def all_of(modules: set[str], state: Mapping[str, torch.Tensor]) -> set[str]:
    """Every tensor of these modules: PEFT saves and loads modules whole."""
    return {name for name in state if name.rpartition(".")[0] in modules}


@pytest.mark.parametrize("form", ["orbax", "openpi"])
def test_exactly_the_modules_that_differ_travel(
    pair: Pair, form: str, tmp_path: Path, record_property: Record
) -> None:
    """On the reference, real PEFT makes of it the function that the source's own base and adapter have."""
    adapter = tmp_path / "adapter"
    bridge.convert(pair.source, adapter, base=pair.home / form, modules_to_save=True, **OPTIONS)
    own = golden.by_hand(pair.tree)
    modules = modules_of(changed(*EDITS))
    assert set(config_of(adapter)["modules_to_save"]) == modules
    tensors = tensors_of(adapter)
    saved = {name.removeprefix(PREFIX): t for name, t in tensors.items() if ".lora_" not in name}
    assert saved.keys() == all_of(modules, own)
    assert golden.differing(saved, {name: own[name] for name in saved}) == set()

    reference = golden.read(pair.home / "openpi")
    model = load_adapter(reference, adapter)
    errors = module_errors(
        golden.simulate(pair.tree, SCALES), model.to(torch.float64), "openpi", torch.float64
    )
    assert max(errors.values()) <= TOLERANCE
    merged = model.to(torch.float32).merge_and_unload().state_dict()
    expected = golden.convert(pair.source, tmp_path / "merged", dtype="float32", lora_alpha=ALPHA)
    assert merged.keys() == expected.keys()
    worst = max(relative(merged[name], expected[name]) for name in expected)
    record_property(f"{form}: modules_to_save on REF, merged by PEFT, against the source merged", worst)
    assert worst <= 1e-6
    # and bridge reads back what it wrote
    again = golden.convert(adapter, tmp_path / "again", base=pair.home / form, dtype="float32")
    assert max(relative(again[name], expected[name]) for name in expected) <= 1e-6


@pytest.mark.parametrize("leaf", EDITS)
def test_each_module_alone(pair: Pair, leaf: str, tmp_path: Path) -> None:
    """A weight without its bias, a bias without its weight, a norm, an embedding of positions."""
    reference = edited(base_tree(), leaf)
    checkpoints.save(reference, tmp_path / "ref", quick=True)
    bridge.convert(pair.source, tmp_path / "adapter", base=tmp_path / "ref", modules_to_save=True, **OPTIONS)
    base = {name: weight.to(torch.float32) for name, weight in golden.by_hand(reference).items()}
    merged = load_adapter(base, tmp_path / "adapter").merge_and_unload().state_dict()
    own = golden.by_hand(pair.tree)
    untouched = own.keys() - golden.merged_names(pair.tree)
    assert golden.differing({n: own[n] for n in untouched}, {n: merged[n] for n in untouched}) == set()


@pytest.mark.parametrize("layout", ["lerobot", "transformers"])
def test_modules_to_save_in_other_layouts(pair: Pair, layout: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    bridge.convert(
        pair.source, adapter, base=pair.home / "orbax", modules_to_save=True, layout=layout, **OPTIONS
    )
    merged = load_adapter(golden.read(pair.home / layout), adapter).merge_and_unload().state_dict()
    expected = golden.convert(
        pair.source, tmp_path / "merged", dtype="float32", layout=layout, lora_alpha=ALPHA
    )
    assert max(relative(merged[name], expected[name]) for name in expected) <= 1e-6


def test_modules_to_save_of_twelve_layers(tmp_path: Path) -> None:
    """PEFT matches names by their ends: `layers.1` must not be taken for `layers.11`."""
    made: dict[str, Any] = {"lora": {"expert": 2}, "layers": 2, "image_layers": 12}
    tree = checkpoints.pi0_tree(**made)
    checkpoints.save(tree, tmp_path / "1", quick=True)
    leaf = f"{BLOCK}/MlpBlock_0/Dense_0/kernel"
    checkpoints.save(edited(base_tree(**made), leaf), tmp_path / "ref", quick=True)
    bridge.convert(
        tmp_path / "1",
        tmp_path / "adapter",
        to="peft-adapter",
        base=tmp_path / "ref",
        modules_to_save=True,
        lora_alpha=2.0,
    )
    model = load_adapter(
        golden.convert(tmp_path / "ref", tmp_path / "t", dtype="float32"), tmp_path / "adapter"
    )
    wrapped = [name for name, _ in model.named_modules() if name.endswith(".original_module")]
    assert wrapped == [f"{PREFIX}{TOWER}.encoder.layers.1.mlp.fc1.original_module"]


def test_nothing_differs_so_nothing_is_saved(pair: Pair, tmp_path: Path) -> None:
    bridge.convert(pair.source, tmp_path / "a", base=pair.source, modules_to_save=True, **OPTIONS)
    bridge.convert(pair.source, tmp_path / "b", **OPTIONS)
    assert not config_of(tmp_path / "a")["modules_to_save"]
    assert golden.differing(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")) == set()


def test_modules_to_save_on_a_bfloat16_base(tmp_path: Path) -> None:
    """PEFT loads a saved module in the dtype of the base's own: a narrow base would round it in silence.

    So either the function is the source's own, or the conversion says so (a refusal, or a note).
    """
    tree = checkpoints.pi0_tree(frozen_dtype="bfloat16", layers=2)
    checkpoints.save(tree, tmp_path / "1", quick=True)
    narrow = golden.convert(tmp_path / "1", tmp_path / "narrow", to="torch-base", dtype="bfloat16")
    try:
        plan = bridge.plan(
            tmp_path / "1", tmp_path / "adapter", base=tmp_path / "narrow", modules_to_save=True, **OPTIONS
        )
    except Refusal as refused:
        assert "bfloat16" in str(refused)
        return
    if any("bfloat16" in note and "round" in note for note in plan.notes):
        return
    plan.run()
    model = load_adapter(narrow, tmp_path / "adapter")
    own = golden.by_hand(tree)
    saved = [name for name in tensors_of(tmp_path / "adapter") if ".lora_" not in name]
    assert saved
    state = model.merge_and_unload().state_dict()
    rounded = [
        name
        for name in (each.removeprefix(PREFIX) for each in saved)
        if not torch.equal(state[name].to(torch.float64), own[name].to(torch.float64))
    ]
    assert not rounded, f"{len(rounded)} of {len(saved)} are rounded by PEFT"


def test_record_and_card_of_an_adapter_with_saved_modules(pair: Pair, tmp_path: Path) -> None:
    bridge.convert(pair.source, tmp_path / "out", base=pair.home / "orbax", modules_to_save=True, **OPTIONS)
    record = json.loads((tmp_path / "out" / "bridge.json").read_text())
    assert record["tensors"].keys() == tensors_of(tmp_path / "out").keys()
    lora = [name for name in record["tensors"] if name.endswith(".lora_A.weight")]
    assert f"{len(lora)} modules" in (tmp_path / "out" / "README.md").read_text()


# Refusals.


def refused(match: str, tmp_path: Path, source: Path, **options: Any) -> Refusal:
    """Refused for this cause, with a fix, and nothing made."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Refusal) as found:
        bridge.convert(source, tmp_path / "out", **options)
    assert any(re.search(match, problem.cause) for problem in found.value.problems), str(found.value)
    for problem in found.value.problems:
        assert problem.fix and "\n" not in problem.cause and len(problem.cause) < 700
    assert len(set(found.value.problems)) == len(found.value.problems)
    assert sorted(tmp_path.iterdir()) == before
    return found.value


Q = "PaliGemma/llm/layers/attn/q_einsum/w"
EMBEDDING = "PaliGemma/llm/embedder/input_embedding"


@pytest.mark.parametrize("form", ["orbax", "torch"])
def test_another_base_under_the_factors_is_refused(pair: Pair, form: str, tmp_path: Path) -> None:
    """A weight that carries LoRA differs: the factors were trained on another one."""
    reference = dict(pair.reference)
    reference[Q] = reference[Q].copy()
    reference[Q][2, 0, 0, 0] += 1
    checkpoints.save(reference, tmp_path / "orbax", quick=True)
    bridge.convert(tmp_path / "orbax", tmp_path / "torch", to="torch-merged", dtype="float32")
    error = refused(
        rf"{re.escape(LANGUAGE)}\.layers\.2\.self_attn\.q_proj\.weight differs .* carries LoRA",
        tmp_path,
        pair.source,
        base=tmp_path / form,
        modules_to_save=True,
        **OPTIONS,
    )
    assert len(error.problems) == 1
    # without --modules-to-save it is a report, and nothing is refused
    plan = bridge.plan(pair.source, None, base=tmp_path / form, **OPTIONS)
    assert f"{LANGUAGE}.layers.2.self_attn.q_proj.weight" in said_to_differ(plan)


def test_another_embedding_is_refused(pair: Pair, tmp_path: Path) -> None:
    """It is tied to the head, and modules_to_save would untie it."""
    reference = dict(pair.reference)
    reference[EMBEDDING] = reference[EMBEDDING] + 1
    checkpoints.save(reference, tmp_path / "ref", quick=True)
    refused(
        r"lm_head\.weight differs .* is tied to another weight",
        tmp_path,
        pair.source,
        base=tmp_path / "ref",
        modules_to_save=True,
        **OPTIONS,
    )


def test_a_base_that_differs_everywhere_is_refused_in_few_lines(tmp_path: Path) -> None:
    """Another base altogether: grouped by layers, not a line for each of hundreds of weights."""
    checkpoints.save(checkpoints.pi0_tree(), tmp_path / "1", quick=True)
    checkpoints.save(base_tree(seed=5), tmp_path / "ref", quick=True)
    error = refused(
        r"carries LoRA", tmp_path, tmp_path / "1", base=tmp_path / "ref", modules_to_save=True, **OPTIONS
    )
    assert len(error.problems) <= 20, len(error.problems)


BAD_REFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "other widths": ({"width": 11}, r"width|\[.*\]"),
    "other hidden sizes": ({"expert_mlp": 29}, r"mlp|hidden|\[.*\]"),
    "other actions": ({"action_dim": 7}, r"action|\[.*\]"),
    "fewer layers": ({"layers": 3}, r"layer"),
    "more layers": ({"layers": 5}, r"layer"),
    "fewer layers in the tower": ({"image_layers": 1}, r"layer"),
    "another model": ({"model": "pi05"}, r"is pi0 but .* is pi05"),
    "other attention": ({"fused_qkv": True}, r"."),
}


@pytest.mark.parametrize("form", ["orbax", "torch"])
@pytest.mark.parametrize("name", BAD_REFERENCES)
def test_a_base_of_another_model_or_size_is_refused(pair: Pair, name: str, form: str, tmp_path: Path) -> None:
    """Such a base cannot carry the adapter: nothing but a refusal is of use, modules saved or not."""
    made, says = BAD_REFERENCES[name]
    checkpoints.save(base_tree(**made), tmp_path / "orbax", quick=True)
    bridge.convert(tmp_path / "orbax", tmp_path / "torch", to="torch-merged", dtype="float32")
    for save in (False, True):
        refused(says, tmp_path, pair.source, base=tmp_path / form, modules_to_save=save, **OPTIONS)


def test_bases_that_are_none(pair: Pair, tmp_path: Path) -> None:
    bridge.convert(pair.source, tmp_path / "adapter", **OPTIONS)
    refused("is an adapter, not a base", tmp_path, pair.source, base=tmp_path / "adapter", **OPTIONS)
    refused("does not exist", tmp_path, pair.source, base=tmp_path / "nowhere", **OPTIONS)
    (tmp_path / "empty").mkdir()
    refused(
        "empty is not a checkpoint bridge recognizes",
        tmp_path,
        pair.source,
        base=tmp_path / "empty",
        **OPTIONS,
    )
    broken = {leaf: array for leaf, array in base_tree().items() if leaf != "state_proj/kernel"}
    checkpoints.save(broken, tmp_path / "broken", quick=True)
    refused("state_proj/kernel", tmp_path, pair.source, base=tmp_path / "broken", **OPTIONS)


def test_an_output_inside_the_base_is_refused(pair: Pair, tmp_path: Path) -> None:
    base = shutil.copytree(pair.home / "orbax", tmp_path / "ref")
    before = golden.files(base)
    with pytest.raises(Refusal, match="inside"):
        bridge.convert(pair.source, base / "out", base=base, **OPTIONS)
    assert golden.files(base) == before


MEANINGLESS: dict[str, tuple[dict[str, Any], str]] = {
    "keep_alpha": ({"keep_alpha": True}, "--keep-alpha"),
    "rank": ({"rank": 4}, "--rank"),
    "with_base": ({"with_base": True}, "--with-base"),
    "base_name": ({"base_name": "lab/base"}, "--base-name"),
    "modules_to_save": ({"modules_to_save": True}, "--modules-to-save"),
}


@pytest.mark.parametrize("to", ["torch-merged", "torch-base"])
@pytest.mark.parametrize("name", MEANINGLESS)
def test_options_about_adapters_alone(pair: Pair, name: str, to: str, tmp_path: Path) -> None:
    """They would be ignored in silence elsewhere."""
    options, flag = MEANINGLESS[name]
    alpha = {"lora_alpha": ALPHA} if to == "torch-merged" else {}
    refused(rf"{flag} .*{to}", tmp_path, pair.source, to=to, **options, **alpha)


def test_options_that_need_others(pair: Pair, tmp_path: Path) -> None:
    refused("--modules-to-save needs the base", tmp_path, pair.source, modules_to_save=True, **OPTIONS)
    for rank in (0, -3):
        refused(rf"--rank is {rank}", tmp_path, pair.source, rank=rank, **OPTIONS)
    # a base compares with the weights beside factors: where nothing is compared it would be ignored
    refused("--base", tmp_path, pair.source, to="torch-base", base=pair.home / "orbax")
    refused("--base", tmp_path, pair.source, to="torch-merged", base=pair.home / "orbax", lora_alpha=ALPHA)


def test_a_checkpoint_without_lora_has_no_adapter(pair: Pair, tmp_path: Path) -> None:
    refused("no route", tmp_path, pair.home / "orbax", to="peft-adapter")
    refused("no route", tmp_path, pair.home / "orbax", to="torch-base")


def test_state_of_the_reference_is_not_needed_to_merge(pair: Pair, tmp_path: Path) -> None:
    """The adapter with its base, as bridge itself would merge them: the function of the source."""
    bridge.convert(pair.source, tmp_path / "out", with_base=True, **OPTIONS)
    base: State = golden.read(tmp_path / "out" / "base")
    merged = golden.convert(tmp_path / "out", tmp_path / "merged", base=tmp_path / "out" / "base")
    expected = golden.convert(pair.source, tmp_path / "direct", dtype="float32", lora_alpha=ALPHA)
    assert max(relative(merged[name], expected[name]) for name in expected) <= 1e-6
    assert len(golden.differing(base, merged)) == 2 * 7 * checkpoints.DIMS["layers"]
