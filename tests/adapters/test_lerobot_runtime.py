"""Policies between openpi and LeRobot, run by LeRobot itself: loaded, acting, trained for a step and saved.

LeRobot's own interpreter runs tests/kit/lerobot_runtime.py once, on everything that bridge made for it. What
it must reproduce was recorded with openpi (tests/data/golden/openpi_policy, pi0_fast_lora); what it saves must act
alike as openpi's policy.
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
FAST = golden.DATA / "pi0_fast_lora"
LEROBOT = golden.DATA / "lerobot"
#: what lerobot-train saved, with the base of each
SAVED = {"full_pi0": None, "peft_pi0": LEROBOT / "base_pi0", "qv_pi0": LEROBOT / "base_pi0"}
#: what no file of openpi's checkpoints tells
OPENPI_OPTIONS: dict[str, Any] = {"lora_alpha": {"paligemma": 8, "expert": 4}, "action_horizon": 10}

#: actions of openpi's runtime, unnormalised: 1.2e-5 and 1.0e-4 were measured
ALLOWED = {"pi0": 5e-5, "pi05": 2e-4}
LOGITS = 5e-5
#: actions of what LeRobot saved, in stock transformers
ACTIONS = 5e-5
#: what feeds no action of pi0 and pi0.5: heads of words, and the prompt's last layer behind its keys and values
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
def fast(made: Callable[..., Path]) -> Path:
    options = {"to": "torch-merged", "dtype": "float32", "lora_alpha": 8, "action_horizon": 10}
    return made("fast", FAST / "checkpoint" / "3", **options)


@pytest.fixture(scope="module")
def returned(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A policy of LeRobot's, to JAX and back: an adapter is joined to its base, and split from it again."""
    home = tmp_path_factory.mktemp("jax")

    def make(name: str) -> Path:
        base = SAVED[name]
        if not (home / name).exists():
            bridge.convert(LEROBOT / name, home / name, to="orbax", **({"base": base} if base else {}))
        form = (
            {"to": "peft-adapter", "with_base": True} if base else {"to": "torch-merged", "dtype": "float32"}
        )
        return made(f"{name} returned", home / name, **form)

    return make


@pytest.fixture(scope="module")
def ran(
    lerobot_python: str,
    full: Callable[[str], Path],
    adapted: Callable[[str], Path],
    fast: Path,
    returned: Callable[[str], Path],
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
    runtime.add("train pi05", "train", full("pi05"), None, rate)
    runtime.add("fast", "logits", fast, FAST / "logits.npz")
    runtime.add("train fast", "train", fast, None, rate)
    for name in SAVED:
        runtime.add(f"{name} returned", "act", returned(name), LEROBOT / name / "reference.npz")
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


def test_fast_has_openpis_logits(ran: Runtime) -> None:
    """Every key is loaded; masks and positions are LeRobot's; padding, which nothing attends to, is left out."""
    recorded = np.load(FAST / "logits.npz")
    kept = recorded["prefix_mask"]
    assert np.abs(ran["fast"]["logits"] - recorded["logits"])[kept].max() <= LOGITS


# LeRobot trains on.


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*model.safetensors")
    state: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
    return state


def distances(before: Path, after: Path) -> dict[str, float]:
    """How far a training step moved each tensor."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {
        name: float((new[name] - old[name]).abs().max())
        for name in old
        # what is added to every key changes no attention: its gradient is rounding
        if not name.endswith("k_proj.bias")
    }


@pytest.mark.parametrize("form", ["full", "adapter", "pi05", "fast"])
def test_a_training_step_starts_from_the_policy(
    ran: Runtime, form: str, full: Callable[[str], Path], adapted: Callable[[str], Path], fast: Path
) -> None:
    """Every weight that can have a gradient has moved, and none further than Adam's first step goes.

    Of an adapter these are both factors of every module.
    """
    start = {"full": full("pi0"), "adapter": adapted("pi0"), "pi05": full("pi05"), "fast": fast}[form]
    moved = distances(start, ran.trained(f"train {form}") / lerobot.LAST)
    dead = {name for name in moved if DEAD.search(name)} if form != "fast" else set()
    # without a gradient a weight decays only, by 1e-5 of itself
    assert all((moved[name] < STEP / 10) is (name in dead) for name in moved)
    assert max(moved.values()) < 2 * STEP


def test_a_new_adapter_is_trained(ran: Runtime) -> None:
    """`--peft` on bridge's policy: LeRobot's default targets, and `lora_B` has left zero."""
    factors = tensors(ran.trained("train peft") / lerobot.LAST)
    assert len(factors) == 2 * (2 * 3 + 5)
    assert all(float(factor.abs().max()) > 0 for factor in factors.values())


# LeRobot -> openpi.


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("full", {}),
        ("peft", {}),
        # PEFT trains q's factor outside the blocks of its heads too, which is more than openpi's LoRA can be
        ("adapter", {"fold": True}),
    ],
)
def test_what_it_saves_acts_alike_in_openpis_form(
    ran: Runtime, form: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The run as LeRobot left it, weights and statistics, to JAX."""
    trained, recorded = ran[f"train {form}"], dict(np.load(OPENPI / "pi0" / "infer.npz"))
    recorded["token_mask"] = trained["token_mask"]
    got = lerobot.openpi_actions(ran.trained(f"train {form}"), tmp_path, recorded, **options)
    assert np.abs(got - trained["actions"]).max() <= ACTIONS


@pytest.mark.parametrize("name", SAVED)
def test_a_policy_returns_as_it_was(ran: Runtime, name: str) -> None:
    """LeRobot's actions before and after the way through JAX, statistics and horizon included."""
    recorded = np.load(LEROBOT / name / "reference.npz")
    assert np.abs(ran[f"{name} returned"]["actions"] - recorded["actions"]).max() <= ACTIONS
