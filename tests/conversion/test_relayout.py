"""One hop from a state to the same state: other names, dtypes, suffixes, and every bit that none of them changes.

Files are written by hand and read by safetensors and Orbax.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge import Refusal
from bridge.conversion.converters import converters
from bridge.formats.contract import states
from bridge.graph import route
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Array, Tree
from tests.kit.golden import DEAD_HEAD, EMBED_TOKENS, LM_HEAD, State
from tests.kit.layouts import named, write

LAYOUTS = ("openpi", "lerobot", "transformers")
EMBEDDING = "PaliGemma/llm/embedder/input_embedding"


@pytest.fixture(scope="module")
def tree() -> Tree:
    """Sizes that no config tells: heads of 11 in a width of 13."""
    return checkpoints.pi0_tree(lora={}, layers=2, image_layers=1)


@pytest.fixture(scope="module")
def mixed(tree: Tree) -> State:
    """Tensors of one leaf in three dtypes, and a head that nothing uses and that is not even finite."""
    state = golden.by_hand(tree)
    state[DEAD_HEAD] = torch.arange(state[DEAD_HEAD].numel()).reshape(state[DEAD_HEAD].shape).half()
    state[DEAD_HEAD][2, 3] = torch.nan
    for number, name in enumerate(sorted(name for name in state if "language_model.layers" in name)):
        state[name] = state[name].to(
            (torch.float32, torch.bfloat16, torch.float16)[(number + number // 9) % 3]
        )
    leaf = [state[f"{golden.PALIGEMMA}.model.language_model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1)]
    assert leaf[0].dtype != leaf[1].dtype
    return state


# PyTorch names.


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LAYOUTS, 2)))
def test_every_tensor_keeps_dtype_and_bits(first: str, second: str, mixed: State, tmp_path: Path) -> None:
    source = write(named(mixed, first), tmp_path / "source", assets=False)
    plan = bridge.plan(source, tmp_path / "there", to="torch-merged", layout=second)
    assert [edge.name for edge in plan.route] == ["relayout"]
    assert plan.loss.name == "EXACT"
    reads = [name for step in plan.steps for _, name in step.reads]
    assert len(reads) == len(set(reads)) == len(mixed)
    plan.run()
    assert not golden.differing(named(mixed, second), golden.read(tmp_path / "there"))
    bridge.convert(tmp_path / "there", tmp_path / "back", to="torch-merged", layout=first)
    assert not golden.differing(named(mixed, first), golden.read(tmp_path / "back"))


def test_merged_float32_stays_float32_and_a_dtype_can_be_asked_for(tree: Tree, tmp_path: Path) -> None:
    source = write(golden.by_hand(tree), tmp_path / "source", assets=False)
    bridge.convert(source, tmp_path / "kept", to="torch-merged", layout="lerobot")
    assert {weight.dtype for weight in golden.read(tmp_path / "kept").values()} == {torch.float32}
    narrow = bridge.plan(source, tmp_path / "narrow", to="torch-merged", dtype="bfloat16")
    assert narrow.loss.name == "ROUNDED"
    narrow.run()
    found = golden.read(tmp_path / "narrow")
    assert {name for name in found if found[name].dtype == torch.float32} == {
        name for name in found if golden.held_in_float32(name)
    }


def test_a_base_stays_a_base(tree: Tree, tmp_path: Path) -> None:
    """Sharded and without a dead head, as others save it."""
    state = {name: weight for name, weight in golden.by_hand(tree).items() if name != DEAD_HEAD}
    source = write(state, tmp_path / "source", shards=3)
    plan = bridge.plan(source, tmp_path / "base", to="torch-base")
    assert [str(edge.target) for edge in plan.route] == ["torch-base[base]"]
    plan.run()
    assert not golden.differing(golden.by_hand(tree), golden.read(tmp_path / "base"))
    stats = "assets/my_robot/norm_stats.json"
    assert (tmp_path / "base" / stats).read_bytes() == (source / stats).read_bytes()
    record = json.loads((tmp_path / "base" / "bridge.json").read_text())
    assert (record["route"], record["loss"]) == (["relayout"], "exact")
    assert record["tensors"][DEAD_HEAD]["checksum"] == "zeros"


def test_values_that_are_used_must_be_finite(mixed: State, tmp_path: Path) -> None:
    state = {**mixed, "state_proj.bias": mixed["state_proj.bias"].clone()}
    state["state_proj.bias"][1] = torch.inf
    source = write(state, tmp_path / "source", assets=False)
    with pytest.raises(Refusal, match="state_proj/bias contains NaN or infinite values"):
        bridge.convert(source, tmp_path / "out", to="torch-merged", layout="lerobot")
    assert not (tmp_path / "out").exists()


# An embedding that training untied from its head.


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    """As LeRobot saves it: `embed_tokens` was trained, and `lm_head` never. The heads are stock."""
    tree = checkpoints.pi0_tree(lora={}, layers=1, image_layers=1, head_dim=256, image_heads=16)
    state = named(golden.by_hand(tree), "lerobot")
    state[f"model.{EMBED_TOKENS}"] = state[f"model.{EMBED_TOKENS}"] * 1.0625
    return state, write(state, tmp_path_factory.mktemp("untied") / "source", assets=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_embedding_that_is_used_is_taken(layout: str, untied: tuple[State, Path], tmp_path: Path) -> None:
    state, source = untied
    plan = bridge.plan(source, tmp_path / "out", to="torch-merged", layout=layout)
    (note,) = [note for note in plan.notes if "is taken" in note]
    assert note == (
        f"model.{EMBED_TOKENS} is taken: openpi uses it alone; model.{LM_HEAD} differs from it, and is not read"
    )
    assert not any(name.endswith("paligemma.lm_head.weight") for step in plan.steps for _, name in step.reads)
    plan.run()
    ours = {name.removeprefix("model."): weight for name, weight in state.items()}
    used = {name: weight for name, weight in ours.items() if name != EMBED_TOKENS}
    used[LM_HEAD] = ours[EMBED_TOKENS]
    # LeRobot's own names: both, and both what is used
    assert not golden.differing(named(used, layout), golden.read(tmp_path / "out"))
    assert bridge.verify(source, tmp_path / "out").holds
    assert not bridge.diff(source, tmp_path / "out").changed


def test_the_embedding_that_is_used_becomes_the_leaf(untied: tuple[State, Path], tmp_path: Path) -> None:
    state, source = untied
    bridge.convert(source, tmp_path / "orbax", to="orbax")
    found = checkpoints.restore(tmp_path / "orbax")[EMBEDDING]
    assert np.array_equal(found, state[f"model.{EMBED_TOKENS}"].numpy())


#: what `lerobot-train` saved after three steps: `embed_tokens` moved by 6.0e-3, `lm_head` by nothing
FULL = golden.DATA / "lerobot" / "full_pi0" / "checkpoints" / "000003" / "pretrained_model"


@pytest.mark.parametrize("layout", ["orbax", *LAYOUTS])
def test_a_fine_tune_of_lerobot(layout: str, tmp_path: Path) -> None:
    """Its head counts are not stock, and only a pytree needs them."""
    state = golden.read(FULL)
    embedding, head = state[f"model.{EMBED_TOKENS}"], state[f"model.{LM_HEAD}"]
    assert float((embedding - head).abs().max()) == pytest.approx(6.0e-3, rel=1e-2)
    if layout == "orbax":
        bridge.convert(FULL, tmp_path / "out", to="orbax", size={"paligemma.head": 8, "siglip.head": 4})
        leaf = checkpoints.restore(tmp_path / "out")[EMBEDDING]
        assert np.array_equal(leaf, embedding.numpy())
        return
    bridge.convert(FULL, tmp_path / "out", to="torch-merged", layout=layout)
    ours = {name.removeprefix("model."): weight for name, weight in state.items()}
    used = {name: weight for name, weight in ours.items() if name != EMBED_TOKENS}
    assert not golden.differing(named({**used, LM_HEAD: embedding}, layout), golden.read(tmp_path / "out"))


def test_what_a_fine_tune_trained_is_seen(tmp_path: Path) -> None:
    base = golden.DATA / "lerobot" / "base_pi0"
    changed = {each.name: each for each in bridge.diff(base, FULL).changed}
    before, after = (golden.read(path)[f"model.{EMBED_TOKENS}"] for path in (base, FULL))
    assert changed[LM_HEAD].max_abs == float((after - before).abs().max()) > 0


def test_two_that_are_equal_are_not_said_to_differ(mixed: State, tmp_path: Path) -> None:
    source = write(named(mixed, "lerobot"), tmp_path / "source", assets=False)
    (note,) = [n for n in bridge.plan(source, None, to="torch-merged").notes if "is taken" in n]
    assert note.endswith(f"model.{LM_HEAD} is not read")


# Trees.


def equal(found: Mapping[str, Array], expected: Mapping[str, Array]) -> bool:
    def same(a: Array, b: Array) -> bool:
        return a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))

    return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [False, True])
def test_a_tree_keeps_every_leaf(suffix: bool, tree: Tree, tmp_path: Path) -> None:
    saved = {name: leaf.astype("bfloat16") if "llm" in name else leaf for name, leaf in tree.items()}
    source = checkpoints.save(saved, tmp_path / "7", quick=True, value_suffix=not suffix)
    plan = bridge.plan(source, tmp_path / "out", to="orbax", value_suffix=suffix)
    assert [edge.name for edge in plan.route] == ["relayout"] and plan.loss.name == "EXACT"
    plan.run()
    with bridge.open(tmp_path / "out") as opened:
        assert {name.endswith("/value") for name in opened.specs} == {suffix}
    assert equal(checkpoints.restore(tmp_path / "out"), saved)
    assert (tmp_path / "out" / "assets" / "my_robot" / "norm_stats.json").is_file()


# The graph.


def test_every_state_is_one_hop_from_itself() -> None:
    for state in states():
        for target in {each.name for each in states() if each.form is state.form}:
            (edge,) = route(converters(), state, target, contents=state.contents)
            assert (edge.name, edge.loss.name) == ("relayout", "EXACT"), (state, target)


def test_it_is_no_part_of_another_route() -> None:
    """Merging, and calling the result a base, would be a way to `torch-base` that keeps the adapter."""
    adapter = next(state for state in states() if state.contents == "lora")
    assert [edge.name for edge in route(converters(), adapter, "torch-base", {"base"})] == ["join", "strip"]
    folded = route(converters(), adapter, "orbax", {"base"}, contents="base")
    assert [edge.name for edge in folded] == ["merge", "import"]
    tree = next(state for state in states() if (state.name, state.contents) == ("orbax", "base"))
    with pytest.raises(Refusal, match="no route"):
        route(converters(), tree, "torch-base")


def test_factors_are_folded_in_one_hop_and_never_by_default() -> None:
    lora = next(state for state in states() if state.contents == "base+lora")
    assert [edge.name for edge in route(converters(), lora, "orbax", contents="base")] == ["fold"]
    assert [str(edge.target) for edge in route(converters(), lora, "orbax")] == ["orbax[base+lora]"]
