"""Policies between openpi and LeRobot, run by LeRobot itself: loaded, acting, trained for a step and saved.

LeRobot's own interpreter runs tests/kit/lerobot_runtime.py once, on everything that bridge made for it. What
it must reproduce was recorded with openpi (tests/data/golden/openpi_policy).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import bridge
from tests.kit import golden, lerobot
from tests.kit.lerobot import Runtime

OPENPI = golden.DATA / "openpi_policy"
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
def tiny() -> Iterator[None]:
    with lerobot.tiny():
        yield


# What bridge makes for LeRobot.


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
) -> Runtime:
    runtime = Runtime(tmp_path_factory.mktemp("ran"))
    for model in ("pi0", "pi05"):
        runtime.add(model, "act", full(model), OPENPI / model / "infer.npz")
        runtime.add(f"{model} adapter", "act", adapted(model), OPENPI / model / "infer.npz")
    observation, rate = OPENPI / "pi0" / "infer.npz", f"--policy.optimizer_lr={STEP}"
    lora = "--peft.method_type=LORA"
    runtime.add("train full", "train", full("pi0"), observation, rate)
    runtime.add("train peft", "train", full("pi0"), observation, rate, lora, "--peft.r=4")
    runtime.add("train adapter", "train", adapted("pi0"), observation, rate, lora)
    runtime.run(lerobot_python)
    return runtime


def test_it_is_lerobot(ran: Runtime) -> None:
    assert ran.report["versions"]["lerobot"] == "0.6.1"


# openpi -> LeRobot.


@pytest.mark.parametrize("form", ["", " adapter"])
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_acts_as_openpi(ran: Runtime, model: str, form: str) -> None:
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
    ran: Runtime, form: str, full: Callable[[str], Path], adapted: Callable[[str], Path]
) -> None:
    """Every weight that can have a gradient has moved, and none further than Adam's first step goes.

    Of an adapter these are both factors of every module.
    """
    start = adapted("pi0") if form == "adapter" else full("pi0")
    distances = moved(start, ran.trained(f"train {form}") / lerobot.LAST)
    assert min(distances.values()) > STEP / 10 and max(distances.values()) < 2 * STEP


def test_a_new_adapter_is_trained(ran: Runtime) -> None:
    """`--peft` on bridge's policy: LeRobot's default targets, and `lora_B` has left zero."""
    factors = tensors(ran.trained("train peft") / lerobot.LAST)
    assert len(factors) == 2 * (2 * 3 + 5)
    assert all(float(factor.abs().max()) > 0 for factor in factors.values())
