"""LeRobot's policies from before it had processors: names of an older transformers, norm stats among the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import bridge
from bridge import Refusal
from bridge.checkpoint.open import open_checkpoint
from tests.kit import trainers
from tests.kit.trainers import Tensors

#: how lerobot 0.3 renames a file of before (policies/pi0/modeling_pi0.py, _transform_state_dict_keys), backwards
BEFORE = (
    (
        "model.paligemma_with_expert.paligemma.lm_head",
        "model.paligemma_with_expert.paligemma.language_model.lm_head",
    ),
    (
        "model.paligemma_with_expert.paligemma.model.language_model",
        "model.paligemma_with_expert.paligemma.language_model.model",
    ),
    (
        "model.paligemma_with_expert.paligemma.model.vision_tower",
        "model.paligemma_with_expert.paligemma.vision_tower",
    ),
    (
        "model.paligemma_with_expert.paligemma.model.multi_modal_projector",
        "model.paligemma_with_expert.paligemma.multi_modal_projector",
    ),
)
STATS = {
    f"{where}.buffer_{feature}.{name}": np.linspace(-value, 2 * value, width, dtype=np.float32)
    for where, feature, width in (
        ("normalize_inputs", "observation_state", 8),
        ("normalize_targets", "action", 7),
        ("unnormalize_outputs", "action", 7),
    )
    for name, value in (("mean", 0.25), ("std", 1.5))
}


def old_name(name: str) -> str:
    for now, then in BEFORE:
        if name.startswith(now):
            return then + name.removeprefix(now)
    return name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("old")


@pytest.fixture(scope="module")
def plain(home: Path) -> Tensors:
    tensors = trainers.policy(home, "lerobot")
    # safetensors' save_model kept one of two tied tensors
    return {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}


@pytest.fixture(scope="module")
def expected(home: Path, plain: Tensors) -> Tensors:
    return trainers.leaves(trainers.save(plain, home / "plain"), home / "expected")


@pytest.mark.parametrize("names", ["of before", "of today"])
def test_an_old_policy_is_read(tmp_path: Path, plain: Tensors, expected: Tensors, names: str) -> None:
    tensors = trainers.renamed(plain, old_name) if names == "of before" else plain
    source = trainers.save(tensors | STATS, tmp_path / "src")
    described = bridge.describe(source)
    assert (described.model, described.problems) == ("pi0", ())
    assert described.layout == ("lerobot-0.3" if names == "of before" else "lerobot")
    assert trainers.same(trainers.leaves(source, tmp_path / "out"), expected)


def test_the_statistics_are_read_with_their_names(tmp_path: Path, plain: Tensors) -> None:
    source = trainers.save(trainers.renamed(plain, old_name) | STATS, tmp_path / "src")
    assert trainers.same(open_checkpoint(source).facts_inside(), STATS)
    of_a_data_set = {name.replace(".buffer_", ".so100_buffer_"): array for name, array in STATS.items()}
    other = trainers.save(trainers.renamed(plain, old_name) | of_a_data_set, tmp_path / "other")
    assert trainers.same(open_checkpoint(other).facts_inside(), of_a_data_set)


def test_statistics_are_never_left_out(tmp_path: Path, plain: Tensors) -> None:
    source = trainers.save(trainers.renamed(plain, old_name) | STATS, tmp_path / "src")
    with pytest.raises(Refusal, match=r"which is a fact that the model needs to run"):
        bridge.convert(source, tmp_path / "out", to="orbax", size=trainers.SIZES, leave_out=["*buffer*"])
    assert not (tmp_path / "out").exists()


def test_names_of_before_are_not_written(tmp_path: Path, plain: Tensors) -> None:
    source = trainers.save(plain, tmp_path / "src")
    bridge.convert(source, tmp_path / "jax", to="orbax", size=trainers.SIZES)
    with pytest.raises(Refusal, match=r"pi0 has no layout lerobot-0\.3") as refused:
        bridge.convert(tmp_path / "jax", tmp_path / "out", to="torch-merged", layout="lerobot-0.3")
    assert refused.value.problems[0].fix == "use one of openpi, lerobot, transformers"


# The statistics reach the output.


def norm_stats(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("assets/*/norm_stats.json")
    stats: dict[str, Any] = json.loads(path.read_text())["norm_stats"]
    return stats


def old_policy(directory: Path, plain: Tensors, stats: Tensors) -> Path:
    config = {"type": "pi0", "chunk_size": 10, "n_action_steps": 10, "proj_width": 1024, "max_action_dim": 31}
    return trainers.save(trainers.renamed(plain, old_name) | stats, directory, config)


def same_statistics(found: dict[str, Any]) -> bool:
    wanted = {
        "state": "normalize_inputs.buffer_observation_state",
        "actions": "unnormalize_outputs.buffer_action",
    }
    return all(
        np.float32(found[feature][name]).tobytes() == STATS[f"{buffer}.{name}"].tobytes()
        for feature, buffer in wanted.items()
        for name in ("mean", "std")
    )


def test_the_statistics_become_assets_and_the_horizon_is_kept(tmp_path: Path, plain: Tensors) -> None:
    source = old_policy(tmp_path / "src", plain, STATS)
    plan = bridge.plan(source, tmp_path / "out", to="orbax", size=trainers.SIZES)
    assert plan.facts["norm_stats"].origin == "unnormalize_outputs of the weights"
    assert (plan.facts["action_horizon"].value, plan.facts["norm_method"].value) == (10, "mean and std")
    plan.run()
    assert same_statistics(norm_stats(tmp_path / "out"))
    assert bridge.describe(tmp_path / "out").facts["action_horizon"]["value"] == 10


def test_the_statistics_become_processors(tmp_path: Path, plain: Tensors) -> None:
    source = old_policy(tmp_path / "src", plain, STATS)
    bridge.convert(source, tmp_path / "out", to="torch-merged", layout="lerobot", dtype="float32")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert plain.keys() <= out.keys() and all(out[name].tobytes() == plain[name].tobytes() for name in plain)
    (state,) = (tmp_path / "out").glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    tensors = load_file(state)
    for feature, buffer in (
        ("observation.state", "normalize_inputs.buffer_observation_state"),
        ("action", "unnormalize_outputs.buffer_action"),
    ):
        for name in ("mean", "std"):
            assert tensors[f"{feature}.{name}"].tobytes() == STATS[f"{buffer}.{name}"].tobytes()
    # of a config of that time, LeRobot of today refuses the fields
    assert "proj_width" not in (tmp_path / "out" / "policy_preprocessor.json").read_text()
    assert not (tmp_path / "out" / "config.json").exists()


def changed(where: str, number: float) -> Tensors:
    return {
        name: array + np.float32(number) if name.startswith(where) else array for name, array in STATS.items()
    }


CASES: dict[str, tuple[Tensors, str]] = {
    "two data sets": (
        {
            name.replace(".buffer_", f".{data_set}_buffer_"): array + np.float32(number)
            for number, data_set in enumerate(("so100", "so100-red"))
            for name, array in STATS.items()
        },
        "the norm stats is .* in unnormalize_outputs of so100-red, but .* in unnormalize_outputs of so100",
    ),
    "trained by others": (
        changed("normalize_targets", 1),
        "the norm stats is .* in unnormalize_outputs of the weights, but .* in normalize_targets of the weights",
    ),
    "min and max": (
        {name.replace(".mean", ".min").replace(".std", ".max"): array for name, array in STATS.items()},
        "state are normalised by min and max",
    ),
    "half infinite": (changed("unnormalize_outputs", np.inf), "numbers that are not finite"),
    "no actions": (
        {name: array for name, array in STATS.items() if "action" not in name},
        "actions have no mean",
    ),
    "images": (
        STATS | {"normalize_inputs.buffer_observation_images_top.mean": np.ones((3, 1, 1), np.float32)},
        "normalises observation_images_top by buffers among its weights",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_statistics_that_cannot_be_taken_over(tmp_path: Path, plain: Tensors, case: str) -> None:
    stats, cause = CASES[case]
    source = old_policy(tmp_path / "src", plain, stats)
    with pytest.raises(Refusal, match=cause):
        bridge.convert(source, tmp_path / "out", to="orbax", size=trainers.SIZES)
    assert not (tmp_path / "out").exists()
    if case == "images":
        return
    # the way out of the others: statistics that the user gives
    given = tmp_path / "norm_stats.json"
    bridge.convert(
        old_policy(tmp_path / "good", plain, STATS), tmp_path / "jax", to="orbax", size=trainers.SIZES
    )
    given.write_text(json.dumps({"norm_stats": norm_stats(tmp_path / "jax")}))
    settings = {"norm_stats": given}
    bridge.convert(source, tmp_path / "out", to="orbax", size=trainers.SIZES, settings=settings)
    assert same_statistics(norm_stats(tmp_path / "out"))


def test_a_policy_that_was_never_given_statistics(tmp_path: Path, plain: Tensors) -> None:
    stats = {name: np.full_like(array, np.inf) for name, array in STATS.items()}
    source = old_policy(tmp_path / "src", plain, stats)
    plan = bridge.plan(source, None, to="orbax", size=trainers.SIZES)
    assert "norm_stats" not in plan.facts
    assert "the statistics among the weights are infinity: the policy was never given any" in plan.notes
