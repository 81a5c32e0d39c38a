"""LeRobot at tiny sizes, run in its own interpreter (tests/kit/lerobot_runtime.py), and bridge told of these."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bridge
from tests.kit import golden, transformers_pi0
from tests.kit.checkpoints import Array

SCRIPT = Path(__file__).with_name("lerobot_runtime.py")
TOKENIZER = golden.DATA / "tokenizer" / "paligemma_tiny.model"
#: where lerobot-train leaves its newest policy
LAST = Path("checkpoints", "last", "pretrained_model")

#: in the place of what LeRobot's code has built in; the sizes of every recorded policy
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

#: what openpi adds to every divisor
EPS = 1e-6


@contextlib.contextmanager
def tiny() -> Iterator[None]:
    """These sizes are LeRobot's stock ones: bridge writes a config for them, and reads them from one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.adapters.lerobot.STOCK", STOCK)
        yield


@dataclass
class Runtime:
    """Jobs for LeRobot, and what it did."""

    home: Path
    jobs: list[dict[str, Any]] = field(default_factory=list, repr=False)
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def add(self, name: str, do: str, policy: Path, recorded: Path | None, *arguments: str) -> None:
        """Plan a job: "act" and "logits" on a recorded input, "train" one step with arguments of lerobot-train."""
        job = {"policy": str(policy), "output": str(self.home / "trained" / name), "arguments": arguments}
        self.jobs.append({"name": name, "do": do, "recorded": str(recorded) if recorded else None, **job})

    def run(self, python: str) -> None:
        told = {"sizes": SIZES, "tokenizer": str(TOKENIZER), "jobs": self.jobs}
        (self.home / "jobs.json").write_text(json.dumps(told))
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))
        }
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.home / "hub"), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            # -P: this folder has modules named as packages are
            [python, "-P", str(SCRIPT), str(self.home / "jobs.json"), str(self.home)],
            env=environment | offline,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        self.report = json.loads((self.home / "report.json").read_text())

    def __getitem__(self, name: str) -> Mapping[str, Array]:
        """The arrays of a job; of "train", how the policy that it saved acts."""
        assert self.report[name] is None, self.report[name]
        return dict(np.load(self.home / f"{name}.npz"))

    def trained(self, name: str) -> Path:
        """The directory of a training run, named as its users name it."""
        assert self.report[name] is None, self.report[name]
        return self.home / "trained" / name


def openpi_actions(source: Path, home: Path, recorded: Mapping[str, Array], **options: Any) -> Array:
    """What openpi makes of a policy that LeRobot saved: its leaves and its norm stats, in stock transformers.

    Args:
        source: the policy.
        home: a directory for what is converted.
        recorded: LeRobot's input: the raw observation, the prompt's tokens and the noise.
        options: of the conversion to JAX.

    Returns:
        Unnormalised actions (horizon, dimensions of the robot).
    """
    bridge.convert(source, home / "orbax", to="orbax", **options)
    bridge.convert(home / "orbax", home / "torch", to="torch-merged", layout="transformers", dtype="float32")
    (stored,) = (home / "orbax").glob("assets/**/norm_stats.json")
    state, actions = (
        {name: np.array(json.loads(stored.read_text())["norm_stats"][key][name]) for name in ("mean", "std")}
        for key in ("state", "actions")
    )
    # openpi, transforms.py: Normalize, PadStatesAndActions, Unnormalize
    normalised = (recorded["ex/observation/state"] - state["mean"]) / (state["std"] + EPS)
    width = recorded["noise"].shape[1]
    observation = {
        "state": np.pad(normalised, (0, width - len(normalised)))[None].astype(np.float32),
        "noise": recorded["noise"][None],
        "tokenized_prompt": recorded["tokens"][None],
        "tokenized_prompt_mask": recorded["token_mask"][None],
    }
    for camera, key in (("base_0_rgb", "image"), ("left_wrist_0_rgb", "wrist_image")):
        observation[f"image/{camera}"] = recorded[f"ex/observation/{key}"][None] / np.float32(255) * 2 - 1
        observation[f"image_mask/{camera}"] = np.array([True])
    sampled = transformers_pi0.sample_actions(
        transformers_pi0.load(home / "torch", torch.float32), observation
    )
    robot = len(actions["mean"])
    unnormalised: Array = sampled[0, :, :robot] * (actions["std"] + EPS) + actions["mean"]
    return unnormalised
