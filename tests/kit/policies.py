"""Whole policies that real programs saved: LeRobot's, and openpi's with what its `infer` returned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.kit.golden import DATA

LEROBOT = DATA / "lerobot"
OPENPI = DATA / "openpi_policy"
BASE = LEROBOT / "base_pi0"
TRAINED = ("full_pi0", "peft_pi0", "qv_pi0")
PRE, POST = "policy_preprocessor", "policy_postprocessor"
#: LeRobot's feature -> openpi's
FEATURES = {"observation.state": "state", "action": "actions"}
#: head counts of LeRobot's policies, which no shape tells
SIZES: dict[str, Any] = {"size": {"paligemma.head": 8, "siglip.head": 4}}
#: alphas of the policies in `openpi_policy`
ALPHAS = {"paligemma": 8.0, "expert": 4.0}


def trained(name: str) -> Path:
    """What `lerobot-train` saved."""
    return LEROBOT / name / "checkpoints" / "000003" / "pretrained_model"


def statistics(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The statistics that LeRobot used, under openpi's names: feature -> statistic."""
    recorded = np.load(LEROBOT / name / "reference.npz")
    return {
        feature: {each: recorded[f"stat/{stored}/{each}"] for each in ("mean", "std", "q01", "q99")}
        for stored, feature in FEATURES.items()
    }


def copied(source: Path, to: Path) -> Path:
    """A copy that can be changed."""
    shutil.copytree(source, to)
    return to


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file in place."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree, indent=4))


def restate(policy: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the statistics of both processors in place."""
    for path in policy.glob("policy_*processor_step_*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def norm_stats(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    """The one `norm_stats.json` below `assets/`, as numpy reads it."""
    (path,) = directory.glob("assets/**/norm_stats.json")
    tree = json.loads(path.read_text())["norm_stats"]
    return {
        feature: {name: np.array(values) for name, values in vectors.items() if values is not None}
        for feature, vectors in tree.items()
    }


def equal_in_float32(a: dict[str, dict[str, np.ndarray]], b: dict[str, dict[str, np.ndarray]]) -> bool:
    """Whether two sets of statistics are the same numbers to a runtime."""
    return a.keys() == b.keys() and all(
        a[feature].keys() == b[feature].keys()
        and all(
            np.array_equal(np.float32(a[feature][name]), np.float32(b[feature][name])) for name in a[feature]
        )
        for feature in a
    )
