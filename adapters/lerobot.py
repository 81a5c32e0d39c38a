"""LeRobot's policy directory: what stands beside the weights. Read in lerobot 0.6.1: policies/, processor/.

``config.json`` names dimensions by variant and may hold no unknown field, so it can only describe
the stock ones; and LeRobot swallows shape errors on load, so a config that does not fit is worse
than none. The processor files hold openpi's norm stats in the form that LeRobot reads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import save

from bridge import Companions, Facts, Problem, Refusal

#: the only dimensions that lerobot's variants `gemma_2b`, `gemma_300m` and its vision tower stand for
STOCK = {
    "paligemma.width": 2048, "paligemma.hidden": 16384, "paligemma.layer": 18, "paligemma.head": 8,
    "paligemma.group": 1, "paligemma.dim": 256, "paligemma.vocab": 257152,
    "expert.width": 1024, "expert.hidden": 4096,
    "siglip.width": 1152, "siglip.layer": 27, "siglip.hidden": 4304, "siglip.head": 16, "siglip.rows": 14,
}  # fmt: skip

#: openpi's cameras, in the order in which their tokens stand (models/model.py)
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

#: openpi normalises every model but pi0 by quantiles (training/config.py)
MODES = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}
STATISTICS = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99")}

#: names in norm_stats.json -> LeRobot's
FEATURES = {"state": "observation.state", "actions": "action"}

#: where lerobot-train puts a policy in a step, and steps in a run (utils/constants.py)
DIRECTORIES = ("pretrained_model", "checkpoints")

#: LeRobot before its processors: statistics as buffers in the file, whose data set may be named
#: (policies/normalize.py; processor/migrate_policy_normalization.py)
STATISTICS_IN_WEIGHTS = (
    r"(?:normalize_inputs|normalize_targets|unnormalize_outputs)"
    r"\.(?:[^.]+_)?buffer_[^.]+\.(?:mean|std|min|max)"
)

NORM_STATS = re.compile(r"assets/(.+)/norm_stats\.json")
TOKENIZER = "google/paligemma-3b-pt-224"

#: tokens of a prompt (openpi, models/pi0_config.py; the defaults of LeRobot's configs too)
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}

#: what openpi adds to every divisor (transforms.py, Normalize and Unnormalize)
EPS = 1e-6

PREPROCESSOR = {
    "pi0": (
        "rename_observations_processor",
        "to_batch_processor",
        "pi0_new_line_processor",
        "tokenizer_processor",
        "device_processor",
        "relative_actions_processor",
        "normalizer_processor",
    ),
    "pi05": (  # the state is normalised first: it becomes words of the prompt
        "rename_observations_processor",
        "to_batch_processor",
        "relative_actions_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
    ),
}
POSTPROCESSOR = ("unnormalizer_processor", "absolute_actions_processor", "device_processor")
PROCESSORS = "policy_preprocessor.json and policy_postprocessor.json"

NOTES = (
    "transforms of the training config are in no checkpoint: for delta actions, set enabled in LeRobot's "
    "relative_actions_processor and absolute_actions_processor, and use_relative_actions in config.json",
    f"LeRobot fetches the tokenizer {TOKENIZER} from the Hugging Face hub, where its licence must be accepted; "
    "tokenizer_name in policy_preprocessor.json may be a local directory",
)
PI05_NOTE = (
    "LeRobot always writes the state into pi05's prompt: a policy trained with discrete_state_input=False, "
    "as openpi's pi05_libero is, acts differently there"
)

Stats: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]
"""LeRobot's feature -> statistic -> one number per dimension."""


def companions(facts: Facts, horizon: int) -> Companions:
    """``config.json`` where it can say what the weights are, and the processors where there are stats."""
    files: dict[str, bytes] = {}
    notes: list[str] = []
    stats: Stats = {}
    found = {match[1]: path for path in sorted(facts.assets) if (match := NORM_STATS.fullmatch(path))}
    if len(found) == 1:
        path = next(iter(found.values()))
        stats = _read(path, facts.assets[path], STATISTICS[MODES[facts.model.name]])
        files |= _processors(facts, stats)
        notes += [*_wide(facts, stats), *NOTES, *([PI05_NOTE] if facts.model.name == "pi05" else [])]
    elif found:
        notes.append(
            f"no {PROCESSORS}: LeRobot holds one set of norm stats, and there are several, {', '.join(found)}; "
            "keep one of them under assets/ in a copy of the source and convert that"
        )
    else:
        notes.append(
            f"no {PROCESSORS}: they are made from assets/<asset_id>/norm_stats.json, and there is none"
        )

    odd = [f"{axis} {facts.sizes.get(axis)}" for axis, size in STOCK.items() if facts.sizes.get(axis) != size]
    adapter = {"use_peft": True} if facts.contents == "lora" else {}
    if not odd:
        files["config.json"] = _json(_config(facts, horizon, stats) | adapter)
    elif adapter:
        # LeRobot builds the model from the base's config; here it looks for these two
        files["config.json"] = _json({"type": facts.model.name, **adapter})
    if odd and not adapter:
        notes.append(
            f"no config.json: LeRobot knows only gemma_2b with gemma_300m, and this has {', '.join(odd)}"
        )
    return Companions(files, tuple(notes))


def _config(facts: Facts, horizon: int, stats: Stats) -> dict[str, Any]:
    """What LeRobot leaves to a default is left out: it refuses fields of other versions."""
    action = facts.sizes["projections.action"]
    inputs, outputs = _features(facts, stats)
    return {
        "type": facts.model.name,
        "chunk_size": horizon,
        "n_action_steps": horizon,
        "max_action_dim": action,
        # pi05 has no weight for the state; openpi gives both one width
        "max_state_dim": action,
        "dtype": facts.dtype if facts.dtype in ("float32", "bfloat16") else "float32",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "image_resolution": [_resolution(facts)] * 2,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": _norm_map(facts),
    }


def _features(facts: Facts, stats: Stats) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs. Without stats the robot's dimensions are unknown, and LeRobot takes the widest."""
    image = {"type": "VISUAL", "shape": [3, _resolution(facts), _resolution(facts)]}
    inputs: dict[str, Any] = {f"observation.images.{camera}": image for camera in CAMERAS}
    if not stats:
        return inputs, {}
    inputs["observation.state"] = {"type": "STATE", "shape": [_width(stats, "observation.state")]}
    return inputs, {"action": {"type": "ACTION", "shape": [_width(stats, "action")]}}


def _resolution(facts: Facts) -> int:
    return math.isqrt(facts.sizes["siglip.token"]) * facts.sizes["siglip.rows"]


def _width(stats: Stats, feature: str) -> int:
    return len(next(iter(stats[feature].values())))


def _norm_map(facts: Facts) -> dict[str, str]:
    mode = MODES[facts.model.name]
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


def _processors(facts: Facts, stats: Stats) -> dict[str, bytes]:
    inputs, outputs = _features(facts, stats)
    # LeRobot's own eps is 1e-8, which makes a dimension that never moved (std 0) a hundred times larger
    normalize = {"eps": EPS, "norm_map": _norm_map(facts)}
    configs: dict[str, dict[str, Any]] = {
        "rename_observations_processor": {"rename_map": {}},
        "tokenizer_processor": {
            "max_length": PROMPT_TOKENS[facts.model.name],
            "task_key": "task",
            "padding_side": "right",
            "padding": "max_length",
            "truncation": True,
            "tokenizer_name": TOKENIZER,
        },
        "device_processor": {"device": "cpu", "float_dtype": None},
        "relative_actions_processor": {"enabled": False, "exclude_joints": ["gripper"], "action_names": None},
        "absolute_actions_processor": {"enabled": False},
        "normalizer_processor": {**normalize, "features": {**inputs, **outputs}},
        "unnormalizer_processor": {**normalize, "features": outputs},
    }
    return {
        **_pipeline("policy_preprocessor", PREPROCESSOR[facts.model.name], configs, _tensors(stats)),
        **_pipeline("policy_postprocessor", POSTPROCESSOR, configs, _tensors(stats, inverse=True)),
    }


def _pipeline(
    name: str, order: tuple[str, ...], configs: Mapping[str, dict[str, Any]], tensors: bytes
) -> dict[str, bytes]:
    """A pipeline, and the tensors of its one step that has any in a file of LeRobot's naming."""
    steps: list[dict[str, Any]] = [{"registry_name": step, "config": configs.get(step, {})} for step in order]
    index = next(index for index, step in enumerate(order) if step.endswith("normalizer_processor"))
    state_file = f"{name}_step_{index}_{order[index]}.safetensors"
    steps[index]["state_file"] = state_file
    return {f"{name}.json": _json({"name": name, "steps": steps}), state_file: tensors}


def _tensors(stats: Stats, *, inverse: bool = False) -> bytes:
    """The statistics, such that LeRobot's formulas with :data:`EPS` give what openpi's give."""
    tensors: dict[str, np.ndarray] = {}
    for feature, vectors in stats.items():
        for name, vector in vectors.items():
            if name == "std" and inverse:
                # LeRobot multiplies by std alone here, openpi by what it divided by
                vector = vector + EPS
            elif name == "q99":
                # LeRobot divides by q99 - q01 alone; but where they are equal as float32, by its eps
                equal = vector.astype(np.float32) == vectors["q01"].astype(np.float32)
                vector = np.where(equal, vector, vector + EPS)
            tensors[f"{feature}.{name}"] = vector.astype(np.float32)
    return save(tensors)


def _read(path: str, data: bytes, statistics: tuple[str, ...]) -> Stats:
    """What ``norm_stats.json`` says of the state and the actions, in float64.

    Raises:
        Refusal: it is not openpi's file, or lacks something, with everything that it lacks.
    """
    fix = "compute it again with openpi's compute_norm_stats.py, or move it away to convert without"
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(Problem(f"{path} is no JSON: {error}", fix)) from error
    stats: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for key, feature in FEATURES.items():
        vectors = {name: _at(tree, "norm_stats", key, name) for name in statistics}
        lacks = [name for name, values in vectors.items() if not _is_vector(values)]
        if lacks:
            cause = f"norm_stats.{key} of {path} has no list of finite numbers {' and '.join(lacks)}"
            problems.append(Problem(cause, fix))
            continue
        stats[feature] = {name: np.array(values, np.float64) for name, values in vectors.items()}
        lengths = [f"{len(vector)} {name}" for name, vector in stats[feature].items()]
        if len({vector.shape for vector in stats[feature].values()}) > 1:
            problems.append(Problem(f"norm_stats.{key} of {path} has {' and '.join(lengths)}", fix))
    if problems:
        raise Refusal(*problems)
    return stats


def _at(node: Any, *keys: str) -> Any:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _is_vector(values: object) -> bool:
    """Whether this is a list of numbers that float32 can hold; JSON as Python reads it has NaN too."""
    largest = float(np.finfo(np.float32).max)
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(type(value) in (int, float) and abs(value) <= largest for value in values)
    )


def _wide(facts: Facts, stats: Stats) -> list[str]:
    """Stats as wide as the model may be padded; openpi cuts them to the robot, LeRobot does not."""
    action = facts.sizes["projections.action"]
    wide = [key for key, feature in FEATURES.items() if _width(stats, feature) >= action]
    if not wide:
        return []
    return [
        f"norm stats of {' and '.join(wide)} are as wide as the model, {action}: if they are padded, cut them "
        "to the robot's dimensions and convert again, LeRobot would take the padding for joints"
    ]


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
