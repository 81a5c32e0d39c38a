"""Steps with several sets of weights: items of a checkpoint manager, raw and averaged weights of a training state."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import bridge
from bridge import SourceRefused
from bridge.checkpoint.open import open_source
from tests.kit import checkpoints
from tests.kit.checkpoints import Tree

TREE = checkpoints.pi0_tree(lora={}, layers=2)


def item(home: Path, name: str, leaves: Tree) -> Path:
    """An item of a step, in the form of `checkpoints.save`."""
    made = checkpoints.save(leaves, home.parent / f"{name}-made", quick=True, assets=False)
    home.mkdir(parents=True, exist_ok=True)
    shutil.move(made / "params", home / name)
    (home / "_CHECKPOINT_METADATA").write_text("{}")
    return home


def training_state(tops: tuple[str, ...]) -> Tree:
    """A training state: weights and their moving average, an optimizer's moments, a step.

    `checkpoints.save` puts `params/` before all names; here that is part of none.
    """
    state: Tree = {}
    for number, top in enumerate(tops):
        state |= {f"{top}/{leaf}": array + np.float32(number) for leaf, array in TREE.items()}
    moments = {f"opt_state/0/mu/{leaf}": np.zeros_like(array) for leaf, array in TREE.items()}
    return state | moments | {"step": np.zeros(1, np.int32)}


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoints.save` writes names as they are given, those of a training state."""
    original = checkpoints._save_tensorstore

    def bare(leaves: Tree, *rest: object) -> None:
        original(
            {name.removeprefix("params/").removesuffix("/value"): a for name, a in leaves.items()}, *rest
        )  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "_save_tensorstore", bare)


def bias(path: Path, **options: str) -> float:
    """What was added to the bias of the source that is read."""
    planned = bridge.plan(path, None, to="torch-merged", dtype="float32", **options)  # type: ignore[arg-type]
    checkpoint = planned.checkpoint
    read = checkpoint.source.read(checkpoint.stored["action_out_proj/bias"])
    return float(np.round((read - TREE["action_out_proj/bias"]).mean()))


@pytest.mark.parametrize("name", ["default", "model_params", "state"])
def test_the_only_item_of_a_step_is_taken_and_named(tmp_path: Path, name: str) -> None:
    step = item(tmp_path / "run" / "7", name, TREE)
    source = open_source(step)
    assert source.notes == (f"using item {name}, the only one of {step}",)
    assert (source.location, source.root) == (source.location, open_source(step / name).root)
    assert bias(step) == bias(tmp_path / "run") == bias(step / name) == 0
    assert open_source(tmp_path / "run").notes[0].startswith("using step 7, the latest complete step of")


def test_several_items_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    step = item(tmp_path / "run" / "7", "model_params", TREE)
    item(step, "ema", {leaf: array + np.float32(2) for leaf, array in TREE.items()})
    with pytest.raises(SourceRefused) as refused:
        bridge.convert(step, tmp_path / "out", to="torch-merged")
    (problem,) = refused.value.problems
    assert problem.cause == f"{step} has several items: ema, model_params"
    assert problem.fix == "choose one: --item ema or model_params"
    assert not (tmp_path / "out").exists()
    assert (bias(step, item="ema"), bias(step, item="model_params")) == (2, 0)
    notes = bridge.plan(step, None, to="torch-merged", item="ema").notes
    assert f"using item ema of {step}, as --item says" in notes
    run = bridge.plan(step.parent, None, to="torch-merged", item="ema").notes
    assert f"using item ema of {step}, as --item says" in run
    with pytest.raises(SourceRefused, match=r"has several items: ema, model_params"):
        bridge.plan(step, None, to="torch-merged", item="emma")


def test_params_go_before_other_items(tmp_path: Path, states: None) -> None:
    """openpi serves params/: the average where there is one. train_state has the weights as they are trained."""
    step = item(tmp_path / "7", "train_state", training_state(("params",)))
    with pytest.raises(SourceRefused, match="contains train_state but no params/") as refused:
        bridge.plan(step, None, to="torch-merged")
    assert refused.value.problems[0].fix.endswith("are read with --item train_state")
    item(step, "params", {f"params/{leaf}": array + np.float32(3) for leaf, array in TREE.items()})
    assert (bias(step), bias(step, item="train_state")) == (3, 0)
    notes = bridge.plan(step, None, to="torch-merged", item="train_state").notes
    assert (
        "using params of a training state: the weights as they are trained (not read: opt_state, step)"
        in notes
    )


def test_raw_and_averaged_weights_of_a_training_state(tmp_path: Path, states: None) -> None:
    step = item(tmp_path / "7", "train_state", training_state(("params", "ema_params")))
    with pytest.raises(SourceRefused) as refused:
        bridge.plan(step, None, to="torch-merged", item="train_state")
    (problem,) = refused.value.problems
    assert problem.cause.endswith(
        "has several sets of weights (params: the weights as they are trained; ema_params: the moving average of "
        "the weights)"
    )
    assert problem.fix == "choose: --item train_state/params or train_state/ema_params"
    assert (bias(step, item="train_state/params"), bias(step, item="train_state/ema_params")) == (0, 1)
    assert bias(step / "train_state", item="ema_params") == 1


def test_a_training_state_without_weights(tmp_path: Path, states: None) -> None:
    step = item(tmp_path / "7", "train_state", training_state(()))
    item(step, "params", {f"params/{leaf}": array for leaf, array in TREE.items()})
    with pytest.raises(SourceRefused, match=r"is a training state without weights") as refused:
        bridge.plan(step, None, to="torch-merged", item="train_state")
    assert refused.value.problems[0].fix == f"give the step that has them: {step}"


@pytest.mark.parametrize("name", ["../other", "/etc", "", "a//b"])
def test_an_item_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    step = item(tmp_path / "7", "default", TREE)
    with pytest.raises(SourceRefused, match="is no name of an item"):
        bridge.plan(step, None, to="torch-merged", item=name)


def test_an_item_where_there_is_none(tmp_path: Path) -> None:
    step = item(tmp_path / "7", "default", TREE)
    (step / "commit_success.txt").write_text("")
    with pytest.raises(SourceRefused, match="has no item ema") as refused:
        bridge.plan(step, None, to="torch-merged", item="ema")
    assert refused.value.problems[0].fix == "leave --item out, or name one of default"


def test_a_step_with_a_prefix(tmp_path: Path) -> None:
    step = item(tmp_path / "run" / "ckpt_7", "model_params", TREE)
    item(step, "ema", {leaf: array + np.float32(2) for leaf, array in TREE.items()})
    assert bias(tmp_path / "run", item="ema") == 2
