"""LeRobot's policies of before its processors: names of an older transformers, norm stats among the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
    f"{where}.{data_set}buffer_{feature}.{name}": np.full(width, value, np.float32)
    for data_set in ("",)
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
