"""Whole models as real PEFT and torch leave them: a base and its adapter in one file, against PEFT's own merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

import bridge
from tests.kit import trainers
from tests.kit.peft import tree_of

RANK, ALPHA = 3, 8


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_peft_wrapped(tmp_path: Path, compiled: bool) -> None:
    plain = trainers.policy(tmp_path)
    state = {name: torch.from_numpy(tensor) for name, tensor in plain.items()}
    torch.manual_seed(3)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["action_out_proj"],
        init_lora_weights=False,
    )
    model = get_peft_model(tree_of(state), config)
    with torch.no_grad():
        model.get_parameter("base_model.model.action_out_proj.modules_to_save.default.weight").add_(1)
    saved = torch.compile(model).state_dict() if compiled else model.state_dict()
    (tmp_path / "src").mkdir()
    safetensors.torch.save_file(dict(saved), tmp_path / "src" / "model.safetensors")
    plan = bridge.plan(
        tmp_path / "src",
        tmp_path / "out",
        to="torch-merged",
        lora_alpha=ALPHA,
        dtype="float32",
        layout="openpi",
    )
    assert any("_orig_mod" in note for note in plan.notes) == compiled
    plan.run()
    merged = model.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == merged.keys()
    worst = max(float((torch.from_numpy(ours[name]) - tensor).abs().max()) for name, tensor in merged.items())
    # PEFT multiplies in float32, in another order
    assert worst < 2e-6
    changed = sum(bool((torch.from_numpy(ours[name]) != state[name]).any()) for name in ours)
    assert (
        changed == 2 * 2 * 2 + 2 * 1 + 1
    )  # q_proj and down_proj of both Gemmas, SigLIP's q_proj, the saved one
