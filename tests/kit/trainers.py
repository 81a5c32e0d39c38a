"""What trainers leave of a small policy: its tensors by hand-written names, in the directories of their programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import bridge
from tests.kit import checkpoints
from tests.kit.checkpoints import Array

#: what shapes do not determine of `checkpoints.DIMS`
SIZES = {"paligemma.head": 7, "siglip.head": 3}

Tensors = dict[str, Array]


def policy(home: Path, layout: str = "openpi", **tree: Any) -> Tensors:
    """The tensors of a small policy without LoRA, in a layout's names."""
    source = checkpoints.save(checkpoints.pi0_tree(lora={}, layers=2, **tree), home / "jax", quick=True)
    bridge.convert(source, home / layout, to="torch-merged", dtype="float32", layout=layout)
    return load_file(home / layout / "model.safetensors")


def save(tensors: Mapping[str, Array], directory: Path, config: Mapping[str, Any] | None = None) -> Path:
    """A directory with the tensors alone, as a trainer saves them: no record of bridge."""
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def renamed(tensors: Mapping[str, Array], name: Callable[[str], str]) -> Tensors:
    return {name(old): tensor for old, tensor in tensors.items()}


def leaves(path: Path, out: Path, **options: Any) -> Tensors:
    """The leaves of a checkpoint, converted to Orbax."""
    bridge.convert(path, out, to="orbax", **{"size": SIZES, **options})
    with bridge.open(out) as opened:
        return {name: opened.read(name) for name in opened.specs}


def same(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> bool:
    """Whether two sets of arrays are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes()
        for name in ours
    )


def factors(tensors: Mapping[str, Array], module: str, rank: int, seed: int = 0) -> tuple[Array, Array]:
    """PEFT's A (rank, in) and B (out, rank) of a module."""
    out, into = tensors[f"{module}.weight"].shape
    random = np.random.default_rng([seed, len(module), *module.encode()])
    a, b = random.standard_normal((rank, into)), random.standard_normal((out, rank))
    return a.astype(np.float32), b.astype(np.float32)
