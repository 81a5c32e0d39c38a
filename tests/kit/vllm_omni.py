"""What vLLM-Omni demands of a LeRobot directory of pi0.5, restated from its loader.

vllm_omni/diffusion/models/pi05: config.py (Pi05Config, load_lerobot_norm_stats) and modeling_pi05.py
(load_weights). It reads `model.safetensors`, `config.json`, `policy_preprocessor.json` and the normalizer's
state file; what it does not raise on but would get wrong is a problem here too.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import load_file

#: what makes it refuse a config
UNSERVED = {
    "use_peft": bool,
    "empty_cameras": bool,
    "use_visual_memory": bool,
    "use_proprioceptive_memory": bool,
    "rtc_config": lambda value: value is not None,
    "n_obs_steps": lambda value: value > 1,
}
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "IDENTITY": (),
}
FEATURES = {"observation.state": "STATE", "action": "ACTION"}
PALIGEMMA = "paligemma_with_expert.paligemma"
HEAD, EMBEDDING = f"{PALIGEMMA}.lm_head.weight", f"{PALIGEMMA}.model.language_model.embed_tokens.weight"
IMAGES = "observation.images."


def problems(directory: Path, shapes: Mapping[str, list[int]]) -> list[str]:
    """All that it would refuse or misread.

    Args:
        directory: what is to be served.
        shapes: of every parameter of openpi's PyTorch model of the same dimensions, by name.
    """
    config = json.loads((directory / "config.json").read_text())
    return [*_config(config), *_weights(directory, shapes), *_statistics(directory, config)]


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("type") != "pi05":
        yield f"type {config.get('type')}"
    yield from (
        f"{key} {config[key]}" for key, refused in UNSERVED.items() if key in config and refused(config[key])
    )
    if config.get("n_action_steps", 50) != config.get("chunk_size", 50):
        yield "n_action_steps is not chunk_size"
    if config.get("dtype", "float32") not in ("float32", "bfloat16"):
        yield f"dtype {config['dtype']}"
    resolution = config.get("image_resolution", [224, 224])
    if len(resolution) != 2 or resolution[0] != resolution[1]:
        yield f"image_resolution {resolution}"
    if config.get("use_relative_actions") and config.get("relative_exclude_joints", ["gripper"]):
        names = config.get("action_feature_names") or []
        yield from (
            f"{joint} is no action"
            for joint in config.get("relative_exclude_joints", ["gripper"])
            if not any(joint in name for name in names)
        )
    if [*config["output_features"]] != ["action"]:
        yield f"output_features {[*config['output_features']]}"
    if not any(name.startswith(IMAGES) for name in config["input_features"]):
        yield "no cameras"
    for name, kind in FEATURES.items():
        feature = {**config["input_features"], **config["output_features"]}.get(name, {})
        widest = config.get(f"max_{kind.lower()}_dim", 32)
        if feature.get("type") != kind or len(feature["shape"]) != 1 or not 0 < feature["shape"][0] <= widest:
            yield f"{name}: {feature}"


def _weights(directory: Path, shapes: Mapping[str, list[int]]) -> Iterator[str]:
    files = [path.name for path in directory.glob("*.safetensors*") if not path.name.startswith("policy_")]
    if files != ["model.safetensors"]:
        yield f"weights in {files}"
        return
    with safe_open(directory / "model.safetensors", "np") as file:
        # in the order of the file, in which load_file has them: of names that become one, the last counts
        names = [name.removeprefix("model.") for name in file.offset_keys()]
        found = {name: file.get_slice(f"model.{name}").get_shape() for name in names}
        tables = [file.get_tensor(f"model.{name}") for name in names if name in (HEAD, EMBEDDING)]
    if (
        len(tables) == 2
        and names.index(HEAD) > names.index(EMBEDDING)
        and tables[0].tobytes() != tables[1].tobytes()
    ):
        yield "lm_head is read as the embedding"
    expected = {EMBEDDING: shapes[HEAD], **shapes}
    for name in sorted(expected.keys() | found.keys()):
        if [*found.get(name, ())] != [*expected.get(name, ())]:
            yield f"{name}: {found.get(name)}, not {expected.get(name)}"


def _statistics(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    tree = json.loads((directory / "policy_preprocessor.json").read_text())
    (step,) = (step for step in tree["steps"] if step.get("registry_name") == "normalizer_processor")
    tensors = load_file(directory / step["state_file"])
    for name, kind in FEATURES.items():
        mode = step["config"]["norm_map"][kind]
        shape = {**config["input_features"], **config["output_features"]}[name]["shape"]
        if mode not in STATISTICS:
            yield f"{kind} by {mode}"
        for statistic in STATISTICS.get(mode, ()):
            if [*tensors[f"{name}.{statistic}"].shape] != shape:
                yield f"{name}.{statistic}: {tensors[f'{name}.{statistic}'].shape}"
