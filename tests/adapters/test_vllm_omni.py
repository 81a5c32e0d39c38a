"""What bridge writes for LeRobot against the loader of vLLM-Omni, which serves pi0.5 from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import bridge
from tests.kit import golden, lerobot, vllm_omni

POLICY = golden.DATA / "openpi_policy" / "pi05" / "checkpoint" / "3"
OPTIONS: dict[str, Any] = {
    "layout": "lerobot",
    "lora_alpha": {"paligemma": 8, "expert": 4},
    "action_horizon": 10,
}
SHAPES = golden.golden("pi05_lora").shapes


@pytest.fixture
def served(tmp_path: Path) -> Path:
    with lerobot.tiny():
        bridge.convert(POLICY, tmp_path / "served", to="torch-merged", **OPTIONS)
    return tmp_path / "served"


def test_it_serves_what_bridge_writes(served: Path) -> None:
    assert vllm_omni.problems(served, SHAPES) == []
    config = json.loads((served / "config.json").read_text())
    assert (config["chunk_size"], config["dtype"]) == (10, "float32")


def test_it_serves_no_adapter(tmp_path: Path) -> None:
    with lerobot.tiny():
        bridge.convert(POLICY, tmp_path / "adapter", to="peft-adapter", **OPTIONS)
    assert {"use_peft True", "weights in ['adapter_model.safetensors']"} <= {
        *vllm_omni.problems(tmp_path / "adapter", SHAPES)
    }


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda tree: tree.update(n_action_steps=5), "n_action_steps is not chunk_size"),
        ("config.json", lambda tree: tree["output_features"]["action"].update(shape=[99]), "action: "),
        ("model.safetensors", _without(f"model.{vllm_omni.EMBEDDING}"), vllm_omni.EMBEDDING),
    ],
)
def test_the_check_sees_what_it_would_not_serve(
    file: str, change: Callable[[Any], object], said: str, served: Path
) -> None:
    path = served / file
    if file.endswith(".json"):
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    assert any(problem.startswith(said) for problem in vllm_omni.problems(served, SHAPES))
