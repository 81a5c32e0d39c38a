"""`bridge verify --full-model`: the whole policy in stock transformers, against actions that were recorded."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from bridge.cli.main import cli
from bridge.errors import Refusal
from tests.kit import golden, transformers_pi0
from tests.kit.checkpoints import Array
from tests.kit.forms import Form, Forms

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = golden.DATA / "pi0_lora" / "sample_actions.npz"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(golden.golden("pi0_lora"), tmp_path_factory.mktemp("forms"))


def verify(source: Form, form: Form, reference: Path = REFERENCE) -> Result:
    base = [f"--base={form.base}"] if form.base else []
    alphas = "--lora-alpha=paligemma=8,expert=4"
    arguments = ["verify", "--json", alphas, *base, "--full-model", f"--reference={reference}"]
    run = CliRunner().invoke(cli, [*arguments, str(source.path), str(form.path)])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run


@pytest.mark.parametrize(
    ("form", "off"),
    [("merged", 5e-5), ("transformers", 5e-5), ("adapter-transformers", 5e-5), ("merged-bfloat16", 5e-2)],
)
def test_acts_as_recorded(form: str, off: float, forms: Forms) -> None:
    """Merged or with the adapter beside its base; rounded weights are allowed what rounding costs."""
    run = verify(forms["orbax"], forms[form])
    said = json.loads(run.stdout)
    assert (run.exit_code, said["holds"]) == (0, True)
    assert said["actions"]["allowed"] == off
    assert off / 1000 < said["actions"]["max_abs"] <= off


def test_other_actions_are_seen(forms: Forms, tmp_path: Path) -> None:
    """Every weight holds, and the recorded actions are of another policy."""
    arrays = dict(np.load(REFERENCE))
    arrays["actions"] = arrays["actions"] + np.float32(1e-3)
    np.savez(tmp_path / "other.npz", **arrays)
    run = verify(forms["orbax"], forms["merged"], tmp_path / "other.npz")
    said = json.loads(run.stdout)
    assert (run.exit_code, said["holds"]) == (1, False)
    (problem,) = said["problems"]
    assert "its actions differ from the recorded ones by 1.0e-03" in problem["cause"]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("joined", "from PyTorch weights: pi0 in transformers"),
        ("adapter", "modules of openpi, but transformers"),
    ],
)
def test_what_transformers_cannot_run_is_refused(form: str, said: str, forms: Forms) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        verify(forms["orbax"], forms[form])
    assert "--full-model" in refused.value.problems[0].fix


def test_pi05_is_refused(tmp_path: Path) -> None:
    other = Forms(golden.golden("pi05_lora"), tmp_path)
    with pytest.raises(Refusal, match="is pi05 as torch-merged"):
        verify(other["base"], other["base"])


def test_reference_without_noise_is_refused(forms: Forms, tmp_path: Path) -> None:
    arrays = dict(np.load(REFERENCE))
    del arrays["noise"]
    np.savez(tmp_path / "bare.npz", **arrays)
    with pytest.raises(Refusal, match="lacks noise"):
        verify(forms["orbax"], forms["merged"], tmp_path / "bare.npz")


@pytest.mark.parametrize("given", [["--full-model"], [f"--reference={REFERENCE}"]])
def test_the_two_options_go_together(given: list[str], forms: Forms) -> None:
    run = CliRunner().invoke(cli, ["verify", *given, str(forms["merged"].path)])
    assert run.exit_code == 2 and "go together" in run.output


# The example that records, on a stand-in for openpi with the API of its own.


@dataclasses.dataclass(frozen=True)
class Observation:
    """openpi.models.model.Observation."""

    images: dict[str, Array]
    image_masks: dict[str, Array]
    state: Array
    tokenized_prompt: Array
    tokenized_prompt_mask: Array

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Observation:
        assert all(image.dtype == np.uint8 and image.ndim == 4 for image in data["image"].values())
        images = {k: image.astype(np.float32) / 255.0 * 2.0 - 1.0 for k, image in data["image"].items()}
        prompt = data["tokenized_prompt"], data["tokenized_prompt_mask"]
        return cls(images, data["image_mask"], data["state"], *prompt)


class Model:
    """Its Pi0, with transformers to compute what it computes."""

    action_horizon, action_dim = 10, 14

    def __init__(self, directory: Path) -> None:
        self.pi0 = transformers_pi0.load(directory, torch.float32)
        # converted without --action-horizon: no weight tells it
        self.pi0.config.chunk_size = self.action_horizon

    def sample_actions(
        self, rng: Array, observation: Observation, *, num_steps: int, noise: Array
    ) -> jax.Array:
        assert num_steps == 10 and noise.shape == (1, 10, 14) and noise.dtype == np.float32
        recorded = {
            "state": observation.state,
            "noise": noise,
            "tokenized_prompt": observation.tokenized_prompt,
            "tokenized_prompt_mask": observation.tokenized_prompt_mask,
            **{f"image/{k}": v for k, v in observation.images.items()},
            **{f"image_mask/{k}": v for k, v in observation.image_masks.items()},
        }
        arrays = {name: np.array(array) for name, array in recorded.items()}
        return jnp.asarray(transformers_pi0.sample_actions(self.pi0, arrays))


def openpi(checkpoint: Path, runtime: Path, sent: Mapping[str, Any]) -> dict[str, types.ModuleType]:
    """The modules of openpi that the example imports."""

    @dataclasses.dataclass(frozen=True)
    class Pi0Config:
        dtype: str = "bfloat16"

        def load(self, params: object) -> Model:
            assert (self.dtype, params) == ("float32", "params in float32")
            return Model(runtime)

    def restore_params(path: Path, *, dtype: object = None) -> str:
        assert path == checkpoint / "params" and dtype == jnp.float32
        return "params in float32"

    def preprocess_observation(rng: None, observation: Observation, *, train: bool = False) -> Observation:
        assert rng is None and not train
        return observation

    def transform(data: dict[str, Any]) -> dict[str, Any]:
        assert data.keys() == sent.keys() and data["prompt"] == sent["prompt"]
        recorded = golden.golden("pi0_lora").actions
        masks = {name: recorded[f"image_mask/{name}"][0] for name in data["images"]}
        prompt = {name: recorded[name][0] for name in ("tokenized_prompt", "tokenized_prompt_mask")}
        return {"state": data["state"], "image": data["images"], "image_mask": masks, **prompt}

    def create_trained_policy(config: object, path: Path) -> object:
        assert path == checkpoint
        return types.SimpleNamespace(_input_transform=transform)

    found = {
        "openpi.models.model": {
            "Observation": Observation,
            "preprocess_observation": preprocess_observation,
            "restore_params": restore_params,
        },
        "openpi.policies.policy_config": {"create_trained_policy": create_trained_policy},
        "openpi.shared.download": {"maybe_download": Path},
        "openpi.shared.nnx_utils": {"module_jit": lambda method: method},
        "openpi.training.config": {"get_config": {"my_config": types.SimpleNamespace(model=Pi0Config())}.get},
    }
    modules: dict[str, types.ModuleType] = {}
    for path, members in found.items():
        package, name = path.rsplit(".", 1)
        modules.setdefault("openpi", types.ModuleType("openpi"))
        modules.setdefault(package, types.ModuleType(package))
        modules[path] = types.ModuleType(path)
        setattr(modules[package], name, modules[path])
        for member, value in members.items():
            setattr(modules[path], member, value)
    return modules


def test_example_records_what_verify_reads(
    forms: Forms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step as openpi's PolicyRecorder saves it, through the example, to a verdict."""
    recorded = forms.golden.actions
    cameras = [name.removeprefix("image/") for name in recorded if name.startswith("image/")]
    images = {name: np.round((recorded[f"image/{name}"][0] + 1) * 127.5).astype(np.uint8) for name in cameras}
    sent = {"state": recorded["state"][0], "images": images, "prompt": "fold the shirt"}
    # PolicyRecorder: np.save of a flattened dict
    step = {"inputs/state": sent["state"], "inputs/prompt": sent["prompt"], "outputs/actions": np.zeros(3)}
    step |= {f"inputs/images/{name}": image for name, image in images.items()}
    np.save(tmp_path / "step_0", np.asarray(step))

    checkpoint = forms["orbax"].path
    for name, module in openpi(checkpoint, forms["transformers"].path, sent).items():
        monkeypatch.setitem(sys.modules, name, module)
    reference = tmp_path / "reference.npz"
    arguments = ["my_config", str(checkpoint), str(tmp_path / "step_0.npy"), str(reference)]
    monkeypatch.setattr(sys, "argv", ["record_actions.py", *arguments])
    precision = jax.config.jax_default_matmul_precision
    try:
        runpy.run_path(str(ROOT / "examples" / "record_actions.py"), run_name="__main__")
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    assert "10 actions of 14 numbers" in capsys.readouterr().out
    found = np.load(reference)
    assert {name: (found[name].shape, found[name].dtype) for name in found.files} == {
        name: (array.shape, array.dtype) for name, array in recorded.items()
    }
    run = verify(forms["orbax"], forms["merged"], reference)
    assert (run.exit_code, json.loads(run.stdout)["holds"]) == (0, True)
