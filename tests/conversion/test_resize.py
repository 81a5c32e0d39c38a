"""--action-dim: the projections of actions and states, cut or padded, in every container; all else as it was."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import bridge
from bridge.errors import CheckpointRefused, Refusal
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Array, Tree

WIDTH = checkpoints.DIMS["action_dim"]
STATE, ACTIONS = 5, 7
#: of a state_dict, whose heads no shape tells
STOCK = {"head_dim": 256, "image_heads": 16, "layers": 1}


def stats(directory: Path, *, padded: int = 0) -> None:
    """Norm stats of a robot, with zeros behind them as openpi's released checkpoints may have."""
    values = {
        name: {key: [0.5] * width + [0.0] * padded for key in ("mean", "std", "q01", "q99")}
        for name, width in (("state", STATE), ("actions", ACTIONS))
    }
    file = directory / "assets" / "my_robot" / "norm_stats.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"norm_stats": values}))


def save(tree: Tree, directory: Path, *, known: bool = True) -> Path:
    source = checkpoints.save(tree, directory, quick=True, assets=False)
    if known:
        stats(source)
    return source


@pytest.fixture(scope="module")
def pi0(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path]:
    tree = checkpoints.pi0_tree(lora={}, **STOCK)
    return tree, save(tree, tmp_path_factory.mktemp("pi0") / "1")


def unlike(a: Mapping[str, Array], b: Mapping[str, Array]) -> set[str]:
    return golden.differing(
        *({leaf: golden.tensor(np.asarray(array)) for leaf, array in tree.items()} for tree in (a, b))
    )


def cut(tree: Tree, width: int) -> Tree:
    """By hand."""
    made = dict(tree)
    for name in ("action_in_proj", "state_proj"):
        if f"{name}/kernel" in tree:
            made[f"{name}/kernel"] = tree[f"{name}/kernel"][:width]
    made["action_out_proj/kernel"] = tree["action_out_proj/kernel"][:, :width]
    made["action_out_proj/bias"] = tree["action_out_proj/bias"][:width]
    return made


MODELS = {"pi0": {}, "pi05": {"model": "pi05"}}


@pytest.mark.parametrize("model", MODELS)
def test_cut_and_padded_in_every_container(model: str, tmp_path: Path) -> None:
    """To Orbax and to PyTorch, from either, the same numbers; padding that is cut off again leaves no trace."""
    tree = checkpoints.pi0_tree(lora={}, **MODELS[model], **STOCK)  # type: ignore[arg-type]
    source = save(tree, tmp_path / "1")
    bridge.convert(source, tmp_path / "torch", to="torch-merged", dtype="keep", layout="lerobot")
    made: dict[tuple[str, int], Tree] = {}
    for width in (13, 47):
        for start in (source, tmp_path / "torch"):
            for to in ("orbax", "torch-merged"):
                output = tmp_path / f"{start.name}-{to}-{width}"
                bridge.convert(start, output, to=to, action_dim=width, dtype="keep")
                if to == "torch-merged":
                    state = golden.read(output)
                    bridge.convert(output, tmp_path / f"{output.name}-back", to="orbax")
                    leaves = checkpoints.restore(tmp_path / f"{output.name}-back")
                    expected = golden.by_hand(leaves)
                    live = expected.keys() - {golden.DEAD_HEAD}
                    assert (
                        golden.differing({n: expected[n] for n in live}, {n: state[n] for n in live}) == set()
                    )
                else:
                    leaves = checkpoints.restore(output)
                known = made.setdefault(("", width), leaves)
                assert unlike(known, leaves) == set(), output.name
    assert unlike(made["", 13], cut(tree, 13)) == set()

    wide = made["", 47]
    assert unlike(cut(wide, WIDTH), tree) == set()
    bridge.convert(tmp_path / "1-orbax-47", tmp_path / "again", to="orbax", action_dim=WIDTH)
    assert unlike(checkpoints.restore(tmp_path / "again"), tree) == set()
    names = [name for name in ("action_in_proj", "state_proj") if f"{name}/kernel" in tree]
    for name in names:
        new = wide[f"{name}/kernel"][WIDTH:]
        # lecun_normal: 47 inputs, cut off at two deviations
        assert new.all() and 0.7 < new.std() * 47**0.5 < 1.3
        assert np.abs(new).max() < 2.28 * 47**-0.5
    new = wide["action_out_proj/kernel"][:, WIDTH:]
    assert 0.7 < new.std() * checkpoints.DIMS["expert_width"] ** 0.5 < 1.3
    assert not wide["action_out_proj/bias"][WIDTH:].any()
    if "state_proj" in names:
        assert not np.array_equal(wide["state_proj/kernel"][WIDTH:], wide["action_in_proj/kernel"][WIDTH:])


def test_the_record_and_the_plan_say_what_is_lost_and_new(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    plan = bridge.plan(pi0[1], tmp_path / "cut", to="torch-merged", action_dim=7, dtype="float32")
    assert plan.loss.name == "LOSSY" and "projections.action cut from 31 to 7" in str(plan)
    assert (
        "--action-dim: entries 7 to 30 of projections.action are lost, beyond the 5 of state in "
        "assets/my_robot/norm_stats.json and the 7 of actions in assets/my_robot/norm_stats.json"
    ) in plan.notes
    lost = {note.removeprefix("cut: ") for note in plan.notes if note.startswith("cut: ")}
    assert lost == {
        "action_in_proj.weight", "state_proj.weight", "action_out_proj.weight", "action_out_proj.bias",
    }  # fmt: skip
    plan.run()
    record = json.loads((tmp_path / "cut" / "bridge.json").read_text())
    assert record["resized"] == {"projections.action": {"from": 31, "to": 7}}
    assert record["sizes"]["projections.action"] == 7 and "initialised" not in record
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["max_action_dim"] == 7

    plan = bridge.plan(pi0[1], tmp_path / "wide", to="orbax", action_dim=32, seed=11)
    assert plan.loss.name == "EXACT"
    assert (
        "--action-dim: entries 31 to 31 of projections.action are new and untrained (--seed 11): train before use"
    ) in plan.notes
    assert "padded with zeros: action_out_proj.bias" in plan.notes
    plan.run()
    record = json.loads((tmp_path / "wide" / "bridge.json").read_text())
    assert record["initialised"] == {
        "seed": 11,
        "leaves": {
            "action_in_proj/kernel": {"values": 17, "initialiser": "lecun_normal"},
            "action_out_proj/bias": {"values": 1, "initialiser": "zeros"},
            "action_out_proj/kernel": {"values": 17, "initialiser": "lecun_normal"},
            "state_proj/kernel": {"values": 17, "initialiser": "lecun_normal"},
        },
    }
    unchanged = bridge.plan(pi0[1], None, to="orbax", action_dim=31)
    assert unchanged.loss.name == "EXACT" and not any("action-dim" in note for note in unchanged.notes)


def test_bytes_depend_on_the_seed_alone(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    for name, more in (("a", {"workers": 1}), ("b", {"workers": 3}), ("c", {"seed": 1})):
        bridge.convert(pi0[1], tmp_path / name, to="orbax", action_dim=37, **more)
    assert golden.files(tmp_path / "a") == golden.files(tmp_path / "b")
    first, other = (checkpoints.restore(tmp_path / name) for name in "ac")
    assert unlike(first, other) == {
        f"{n}/kernel" for n in ("action_in_proj", "action_out_proj", "state_proj")
    }


def lerobot_config(source: Path) -> None:
    config = {
        "type": "pi0",
        "input_features": {"observation.state": {"type": "STATE", "shape": [STATE]}},
        "output_features": {"action": {"type": "ACTION", "shape": [ACTIONS]}},
    }
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("told_by", ["norm stats", "padded norm stats", "config.json"])
def test_the_robots_own_dimensions_are_never_cut(
    told_by: str, pi0: tuple[Tree, Path], tmp_path: Path
) -> None:
    bridge.convert(pi0[1], tmp_path / "source", to="torch-merged")
    source = tmp_path / "source"
    (source / "config.json").unlink()
    (source / "bridge.json").unlink()
    shutil.rmtree(source / "assets")
    if told_by == "config.json":
        lerobot_config(source)
    else:
        stats(source, padded=WIDTH - ACTIONS if told_by.startswith("padded") else 0)
    before = golden.files(tmp_path)
    with pytest.raises(
        Refusal, match=r"--action-dim 6 would cut projections\.action below the 7 entries"
    ) as caught:
        bridge.convert(source, tmp_path / "new" / "out", to="orbax", action_dim=6)
    assert [problem.fix for problem in caught.value.problems] == ["give --action-dim at least 7"]
    assert golden.files(tmp_path) == before and not (tmp_path / "new").exists()
    assert bridge.plan(source, None, to="orbax", action_dim=7).loss.name == "LOSSY"


def test_unknown_widths_are_reported(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    plan = bridge.plan(save(pi0[0], tmp_path / "1", known=False), None, to="orbax", action_dim=2)
    assert any("nothing says how many of them are used" in note for note in plan.notes)


def test_factors_on_resized_weights_follow(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    """An adapter with LoRA on the projections, merged and joined, to a narrower and to a wider model."""
    rng = np.random.default_rng(3)
    width = checkpoints.DIMS["expert_width"]
    shapes = {
        "action_in_proj": (width, WIDTH),
        "action_out_proj": (WIDTH, width),
        "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.v_proj": (256, width),
    }
    pairs = {
        name: (
            rng.standard_normal((3, into), dtype=np.float32),
            rng.standard_normal((out, 3), dtype=np.float32),
        )
        for name, (out, into) in shapes.items()
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    safetensors.torch.save_file(
        {
            f"base_model.model.{name}.lora_{which}.weight": torch.from_numpy(array)
            for name, pair in pairs.items()
            for which, array in zip("AB", pair, strict=True)
        },
        adapter / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [*shapes],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for target in (9, 43):
        both = min(target, WIDTH)
        results = {}
        for to, more in (("torch-merged", {}), ("orbax", {"rank": 4, "lora_alpha": 4.0})):
            output = tmp_path / f"{to}-{target}"
            bridge.convert(adapter, output, to=to, base=pi0[1], action_dim=target, **more)
            results[to] = (
                {name: tensor.numpy() for name, tensor in golden.read(output).items()}
                if to == "torch-merged"
                else {
                    name: array.numpy() for name, array in golden.by_hand(checkpoints.restore(output)).items()
                }
            )
            assert bridge.verify(adapter, output, base=pi0[1]).holds
        base = golden.by_hand(pi0[0])
        for name, pick in (("action_in_proj", np.s_[:, :both]), ("action_out_proj", np.s_[:both])):
            a, b = (factor.astype(np.float64) for factor in pairs[name])
            expected = (base[f"{name}.weight"].numpy() + 2 * b @ a)[pick]
            for state in results.values():
                assert np.abs(state[f"{name}.weight"][pick] - expected).max() < 1e-6 * np.abs(expected).max()
        for name in ("action_in_proj", "action_out_proj", "state_proj"):
            first, second = (state[f"{name}.weight"] for state in results.values())
            assert first.shape == second.shape and np.array_equal(first, second)


def test_verify_compares_what_both_have(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    for width, to in ((9, "torch-merged"), (40, "orbax")):
        output = tmp_path / to
        bridge.convert(pi0[1], output, to=to, action_dim=width, dtype="keep")
        verdict = bridge.verify(pi0[1], output)
        assert verdict.holds, verdict.problems
        assert dict(verdict.shared) == {"projections.action": (min(width, WIDTH), max(width, WIDTH))}
        assert verdict.as_json()["shared"]["projections.action"]["compared"] == min(width, WIDTH)
        assert bridge.verify(output, pi0[1]).holds
        assert not bridge.diff(pi0[1], output).changed
    file = tmp_path / "torch-merged" / "model.safetensors"
    state = golden.read(tmp_path / "torch-merged")
    state["action_in_proj.weight"][3, 8] += 1
    safetensors.torch.save_file(state, file, golden.header(tmp_path / "torch-merged"))
    verdict = bridge.verify(pi0[1], tmp_path / "torch-merged")
    assert any("action_in_proj.weight" in problem.cause for problem in verdict.problems)


def test_widths_that_differ_for_no_recorded_reason_are_refused(
    pi0: tuple[Tree, Path], tmp_path: Path
) -> None:
    bridge.convert(pi0[1], tmp_path / "out", to="torch-merged", action_dim=9)
    (tmp_path / "out" / "bridge.json").unlink()
    with pytest.raises(CheckpointRefused, match=r"projections\.action is 31 in"):
        bridge.verify(pi0[1], tmp_path / "out")


def test_a_model_without_the_projections_has_no_such_option(tmp_path: Path) -> None:
    source = golden.DATA / "pi0_fast_lora" / "checkpoint" / "3"
    with pytest.raises(Refusal, match="--action-dim is an option of openpi"):
        bridge.plan(source, None, to="torch-base", action_dim=9)


@pytest.mark.parametrize("options", [{"seed": 3}, {"seed": 3, "action_horizon": 9}])
def test_a_seed_of_nothing_is_refused(pi0: tuple[Tree, Path], options: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match="--seed has no effect: nothing is drawn"):
        bridge.plan(pi0[1], None, to="torch-merged", **options)
