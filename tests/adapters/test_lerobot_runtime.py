"""Policies between openpi and LeRobot, run by LeRobot itself: loaded, acting, trained for a step and saved.

LeRobot's own interpreter runs tests/kit/lerobot_runtime.py once, on everything that bridge made for it. What
it must reproduce was recorded with openpi (tests/data/golden/openpi_policy).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import bridge
from bridge.adapters import lerobot as adapter
from tests.kit import golden
from tests.kit.checkpoints import Array

SCRIPT = golden.ROOT / "tests" / "kit" / "lerobot_runtime.py"
TOKENIZER = golden.DATA / "tokenizer" / "paligemma_tiny.model"
OPENPI = golden.DATA / "openpi_policy"
LAST = Path("checkpoints", "last", "pretrained_model")

#: in the place of what LeRobot's code has built in
SIZES = {
    "paligemma": {"width": 64, "depth": 3, "mlp_dim": 160, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16},
    "expert": {"width": 48, "depth": 3, "mlp_dim": 112, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16},
    "siglip": {"hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vocabulary": 512,
}
#: the same, as the axes that bridge compares with stock ones before it writes a config
STOCK = {
    "paligemma.width": 64, "paligemma.hidden": 160, "paligemma.layer": 3, "paligemma.head": 8,
    "paligemma.group": 1, "paligemma.dim": 16, "paligemma.vocab": 512,
    "expert.width": 48, "expert.hidden": 112,
    "siglip.width": 72, "siglip.layer": 2, "siglip.hidden": 104, "siglip.head": 4, "siglip.rows": 14,
}  # fmt: skip
#: what no file of openpi's checkpoints tells
OPENPI_OPTIONS: dict[str, Any] = {"lora_alpha": {"paligemma": 8, "expert": 4}, "action_horizon": 10}

#: actions of openpi's runtime, unnormalised: 1.2e-5 and 1.0e-4 were measured
ALLOWED = {"pi0": 5e-5, "pi05": 2e-4}
#: what feeds no action: heads of words, and the prompt's last layer behind its keys and values
DEAD = re.compile(
    r"lm_head|paligemma\.model\.language_model\.(norm|layers\.2\.(self_attn\.[qo]_proj|mlp|post_attention))"
)
#: the learning rate of a training step
STEP = 1e-3


pytestmark = [pytest.mark.lerobot, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Any:
    """LeRobot's stock sizes are these here, on both sides: bridge writes a config for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "STOCK", STOCK)
        yield


# What bridge makes for LeRobot.


@dataclass
class Ran:
    """What LeRobot did: of each job its arrays, or why it failed."""

    home: Path
    jobs: list[dict[str, Any]] = field(default_factory=list, repr=False)
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def add(self, name: str, do: str, policy: Path, recorded: Path, *arguments: str) -> Path:
        """Plan a job; returns the directory in which it trains, if it does."""
        output = self.home / "trained" / name
        job = {
            "name": name,
            "do": do,
            "policy": str(policy),
            "recorded": str(recorded),
            "output": str(output),
        }
        self.jobs.append({**job, "arguments": list(arguments)})
        return output

    def __getitem__(self, name: str) -> Mapping[str, Array]:
        assert self.report[name] is None, self.report[name]
        return dict(np.load(self.home / f"{name}.npz"))

    def saved(self, name: str) -> Path:
        """The run that LeRobot saved, named as its users name it."""
        assert self.report[name] is None, self.report[name]
        return self.home / "trained" / name


def policy(model: str) -> Path:
    return OPENPI / model / "checkpoint" / "3"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Convert for LeRobot, once."""
    home = tmp_path_factory.mktemp("made")

    def make(name: str, source: Path, **options: Any) -> Path:
        if not (home / name).exists():
            bridge.convert(source, home / name, layout="lerobot", **options)
        return home / name

    return make


@pytest.fixture(scope="module")
def full(made: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda model: made(model, policy(model), to="torch-merged", dtype="float32", **OPENPI_OPTIONS)


@pytest.fixture(scope="module")
def adapted(made: Callable[..., Path]) -> Callable[[str], Path]:
    """An adapter beside its base."""

    def make(model: str) -> Path:
        return made(f"{model}-adapter", policy(model), to="peft-adapter", with_base=True, **OPENPI_OPTIONS)

    return make


@pytest.fixture(scope="module")
def ran(
    lerobot_python: str,
    full: Callable[[str], Path],
    adapted: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    ran = Ran(tmp_path_factory.mktemp("ran"))
    for model in ("pi0", "pi05"):
        ran.add(model, "act", full(model), OPENPI / model / "infer.npz")
        ran.add(f"{model} adapter", "act", adapted(model), OPENPI / model / "infer.npz")
    observation, rate = OPENPI / "pi0" / "infer.npz", f"--policy.optimizer_lr={STEP}"
    ran.add("train full", "train", full("pi0"), observation, rate)
    ran.add("train peft", "train", full("pi0"), observation, rate, "--peft.method_type=LORA", "--peft.r=4")
    ran.add("train adapter", "train", adapted("pi0"), observation, rate, "--peft.method_type=LORA")
    told = {"sizes": SIZES, "tokenizer": str(TOKENIZER), "jobs": ran.jobs}
    (ran.home / "jobs.json").write_text(json.dumps(told))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    run = subprocess.run(
        [lerobot_python, "-P", str(SCRIPT), str(ran.home / "jobs.json"), str(ran.home)],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(ran.home / "hub"), "OMP_NUM_THREADS": "1"},
        cwd=ran.home,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    ran.report = json.loads((ran.home / "report.json").read_text())
    return ran


def test_it_is_lerobot(ran: Ran) -> None:
    assert ran.report["versions"]["lerobot"] == "0.6.1"


# openpi -> LeRobot.


@pytest.mark.parametrize("form", ["", " adapter"])
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_acts_as_openpi(ran: Ran, model: str, form: str) -> None:
    """A raw observation becomes openpi's unnormalised actions, merged and as an adapter on its base."""
    got, recorded = ran[f"{model}{form}"], np.load(OPENPI / model / "infer.npz")
    np.testing.assert_array_equal(got["tokens"], recorded["tokens"])
    np.testing.assert_allclose(got["state"], recorded["state"][:8], rtol=0, atol=2e-6)
    assert got["actions"].shape == recorded["actions"].shape == (10, 7)
    assert np.abs(got["actions"] - recorded["actions"]).max() <= ALLOWED[model]


# LeRobot trains on.


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*model.safetensors")
    state: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
    return state


def moved(before: Path, after: Path) -> dict[str, float]:
    """How far a training step moved each tensor that has a gradient; the others only decay, by 1e-5 of it."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    distances = {
        name: float((new[name] - old[name]).abs().max())
        for name in old
        # what is added to every key changes no attention: its gradient is rounding
        if not name.endswith("k_proj.bias")
    }
    assert max(distances[name] for name in distances if DEAD.search(name)) < STEP / 10
    return {name: distance for name, distance in distances.items() if not DEAD.search(name)}


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_a_training_step_starts_from_the_policy(
    ran: Ran, form: str, full: Callable[[str], Path], adapted: Callable[[str], Path]
) -> None:
    """Every weight that can have a gradient has moved, and none further than Adam's first step goes.

    Of an adapter these are both factors of every module.
    """
    start = adapted("pi0") if form == "adapter" else full("pi0")
    distances = moved(start, ran.saved(f"train {form}") / LAST)
    assert min(distances.values()) > STEP / 10 and max(distances.values()) < 2 * STEP


def test_a_new_adapter_is_trained(ran: Ran) -> None:
    """`--peft` on bridge's policy: LeRobot's default targets, and `lora_B` has left zero."""
    factors = tensors(ran.saved("train peft") / LAST)
    assert len(factors) == 2 * (2 * 3 + 5)
    assert all(float(factor.abs().max()) > 0 for factor in factors.values())
