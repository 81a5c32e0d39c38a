"""PyTorch checkpoints of policies, written without bridge: names of each layout, files, shards."""

import json
from pathlib import Path

import safetensors.torch

from tests.kit.golden import EMBED_TOKENS, LM_HEAD, TRANSFORMERS, State

STATS = {"mean": [0.5], "std": [2.0], "q01": [-1.0], "q99": [1.0]}


def named(state: State, layout: str) -> State:
    """The same tensors as a layout's own library saves them."""
    if layout == "lerobot":  # ties nothing
        return {f"model.{name}": weight for name, weight in {**state, EMBED_TOKENS: state[LM_HEAD]}.items()}
    if layout == "transformers":
        return {
            theirs + name.removeprefix(ours): weight
            for name, weight in state.items()
            for ours, theirs in TRANSFORMERS.items()
            if name.startswith(ours)
        }
    return state


def write(state: State, directory: Path, *, shards: int = 1, assets: bool = True) -> Path:
    """One file, or shards with their index, as Hugging Face's libraries write them."""
    directory.mkdir(parents=True)
    state = {name: weight.clone().contiguous() for name, weight in state.items()}
    if shards == 1:
        safetensors.torch.save_file(state, directory / "model.safetensors", {"format": "pt"})
    else:
        files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
        weight_map = {name: files[n % shards] for n, name in enumerate(sorted(state))}
        for file in files:
            part = {name: weight for name, weight in state.items() if weight_map[name] == file}
            safetensors.torch.save_file(part, directory / file, {"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if assets:
        stats = directory / "assets" / "my_robot" / "norm_stats.json"
        stats.parent.mkdir(parents=True)
        stats.write_text(json.dumps({"norm_stats": dict.fromkeys(("state", "actions"), STATS)}))
    return directory
