"""LeRobot's policy directory: what stands beside the weights. Read in lerobot 0.6.1: policies/, processor/.

``config.json`` names dimensions by variant and may hold no unknown field, so it can only describe
the stock ones; and LeRobot swallows shape errors on load, so a config that does not fit is worse
than none. The processor files hold openpi's norm stats in the form that LeRobot reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import load, save

from bridge import Companions, Facts, Problem, Refusal

from . import lerobot_read, norm_stats, policy_facts
from .kinds import CAMERAS, HORIZON, METHOD, NORM_STATS, PROMPT_LENGTH, RESOLUTION, TOKENIZER
from .lerobot_read import EPS, FEATURES, IMAGES
from .policy_facts import ASSETS, HUB_TOKENIZER

#: the only dimensions that lerobot's variants `gemma_2b`, `gemma_300m` and its vision tower stand for
STOCK = {
    "paligemma.width": 2048, "paligemma.hidden": 16384, "paligemma.layer": 18, "paligemma.head": 8,
    "paligemma.group": 1, "paligemma.dim": 256, "paligemma.vocab": 257152,
    "expert.width": 1024, "expert.hidden": 4096,
    "siglip.width": 1152, "siglip.layer": 27, "siglip.hidden": 4304, "siglip.head": 16, "siglip.rows": 14,
}  # fmt: skip

#: where lerobot-train puts a policy in a step, and steps in a run (utils/constants.py)
DIRECTORIES = ("pretrained_model", "checkpoints")

#: how values are normalised -> LeRobot's word
MODES = {method: mode for mode, method in lerobot_read.MODES.items()}

#: LeRobot's max_state_dim and max_action_dim
DEFAULT_WIDTH = 32
ACTION_TOKENIZER = "lerobot/fast-action-tokenizer"

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
    "pi0_fast": (
        "rename_observations_processor",
        "to_batch_processor",
        "relative_actions_processor",
        "normalizer_processor",
        "pi0_fast_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "action_tokenizer_processor",
        "device_processor",
    ),
}
POSTPROCESSOR = ("unnormalizer_processor", "absolute_actions_processor", "device_processor")
#: pixels a side, where nothing tells: the default of LeRobot's configs (image_resolution)
DEFAULT_RESOLUTION = 224
PROCESSORS = "policy_preprocessor.json and policy_postprocessor.json"

NOTES = (
    "transforms of the training config are in no checkpoint: for delta actions, set enabled in LeRobot's "
    "relative_actions_processor and absolute_actions_processor, and use_relative_actions in config.json",
    f"LeRobot fetches the tokenizer {HUB_TOKENIZER} from the Hugging Face hub, where its licence must be accepted; "
    "tokenizer_name in policy_preprocessor.json may be a local directory",
)
PI05_NOTE = (
    "LeRobot always writes the state into pi05's prompt: a policy trained with discrete_state_input=False, "
    "as openpi's pi05_libero is, acts differently there"
)

Stats: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]
"""LeRobot's feature -> statistic -> one number per dimension."""


def companions(facts: Facts) -> Companions:
    """``config.json`` where it can say what the weights are, and the processors where there are stats."""
    stats = _stats(facts)
    files: dict[str, bytes] = {}
    notes: list[str] = []
    if "processors" in facts.kept:
        files |= _carried_processors(facts.kept["processors"], facts, stats)
    elif stats:
        files |= _processors(facts, stats)
        notes += [*_wide(facts, stats), *NOTES, *([PI05_NOTE] if facts.model.name == "pi05" else [])]
    else:
        several = [match[1] for path in sorted(facts.assets) if (match := ASSETS.fullmatch(path))]
        notes.append(
            f"no {PROCESSORS}: LeRobot has one set of norm stats, and there are several, {', '.join(several)}: "
            "choose with --asset-id"
            if several
            else f"no {PROCESSORS}: they are made from norm stats, and there are none: give them with --norm-stats"
        )
    if "config" in facts.kept:
        files["config.json"] = _carried_config(facts.kept["config"]["config.json"], facts)
        return Companions(files, tuple(notes))

    odd = [
        f"{axis} {facts.sizes.get(axis)}"
        for axis, size in _stock(facts).items()
        if facts.sizes.get(axis) != size
    ]
    adapter = {"use_peft": True} if facts.contents == "lora" else {}
    if not odd:
        files["config.json"] = _json(_config(facts, stats) | adapter)
    elif adapter:
        # LeRobot builds the model from the base's config; here it looks for these two
        files["config.json"] = _json({"type": facts.model.name, **adapter})
    if odd and not adapter:
        notes.append(
            f"no config.json: LeRobot knows only the sizes of {_variants(facts)}, and this has {', '.join(odd)}"
        )
    return Companions(files, tuple(notes))


def _stock(facts: Facts) -> dict[str, int]:
    """The stock sizes of the parts that the model has."""
    parts = {part.name for part in facts.model.parts}
    return {axis: size for axis, size in STOCK.items() if axis.partition(".")[0] in parts}


def _variants(facts: Facts) -> str:
    return (
        "gemma_2b with gemma_300m" if any(part.name == "expert" for part in facts.model.parts) else "gemma_2b"
    )


def _stats(facts: Facts) -> Stats:
    """The norm stats under LeRobot's names; empty where there are none."""
    known = facts.known.get(NORM_STATS.key)
    if known is None:
        return {}
    lacking = [each for each in norm_stats.METHODS[_method(facts)] if each not in known.value["actions"]]
    if lacking:
        cause = f"{known.origin} has no {' and '.join(lacking)}, which normalising by {_method(facts)} takes"
        raise Refusal(Problem(cause, "give complete statistics with --norm-stats"))
    return {FEATURES[feature]: vectors for feature, vectors in known.value.items()}


def _method(facts: Facts) -> str:
    method: str = facts.known[METHOD.key].value
    return method


# What the source has, where it is LeRobot's own.


def _carried_config(data: bytes, facts: Facts) -> bytes:
    """The source's config with its fields, those that the conversion changes set anew."""
    config = json.loads(data)
    changed: dict[str, Any] = {}
    if bool(config.get("use_peft")) is not (facts.contents == "lora"):
        changed["use_peft"] = facts.contents == "lora"
    horizon = facts.known[HORIZON.key].value
    if config.get("chunk_size", horizon) != horizon:
        changed |= {
            "chunk_size": horizon,
            "n_action_steps": min(horizon, config.get("n_action_steps", horizon)),
        }
    return data if not changed else (json.dumps(config | changed, indent=4) + "\n").encode()


def _carried_processors(files: Mapping[str, bytes], facts: Facts, stats: Stats) -> dict[str, bytes]:
    """The source's processors with all their steps; their statistics anew where others were decided on."""
    known = facts.known.get(NORM_STATS.key)
    own = lerobot_read.read(files)
    theirs = [fact.value for fact in own.facts if fact.kind is NORM_STATS]
    if known is None or (theirs and lerobot_read.are_made_from(known.value, theirs[0])):
        return dict(files)
    made = dict(files)
    for name, data in files.items():
        if name.endswith(".safetensors"):
            rest = {
                key: tensor
                for key, tensor in load(data).items()
                if key.rpartition(".")[0] not in FEATURES.values()
            }
            made[name] = save({**rest, **_tensors(stats, inverse="postprocessor" in name)})
    return made


# What is made from openpi's.


def _config(facts: Facts, stats: Stats) -> dict[str, Any]:
    """What LeRobot leaves to a default is left out: it refuses fields of other versions."""
    horizon = facts.known[HORIZON.key].value
    action = _action(facts, stats)
    inputs, outputs = _features(facts, stats)
    expert = {} if facts.model.name == "pi0_fast" else {"action_expert_variant": "gemma_300m"}
    return {
        "type": facts.model.name,
        "chunk_size": horizon,
        "n_action_steps": horizon,
        "max_action_dim": action,
        # pi05 has no weight for the state; openpi gives both one width
        "max_state_dim": action,
        "dtype": facts.dtype if facts.dtype in ("float32", "bfloat16") else "float32",
        "paligemma_variant": "gemma_2b",
        **expert,
        "image_resolution": [_resolution(facts)] * 2,
        "tokenizer_max_length": facts.known[PROMPT_LENGTH.key].value,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": _norm_map(facts),
    }


def _action(facts: Facts, stats: Stats) -> int:
    """The width that states and actions are padded to; pi0_fast has no weight of it, and LeRobot's default."""
    widths = [_width(stats, feature) for feature in stats]
    return facts.sizes.get("projections.action") or max(DEFAULT_WIDTH, *widths, 0)


def _features(facts: Facts, stats: Stats) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs. Without stats the robot's dimensions are unknown, and LeRobot takes the widest."""
    image = {"type": "VISUAL", "shape": [3, _resolution(facts), _resolution(facts)]}
    inputs: dict[str, Any] = {f"{IMAGES}{camera}": image for camera in facts.known[CAMERAS.key].value}
    if not stats:
        return inputs, {}
    inputs["observation.state"] = {"type": "STATE", "shape": [_width(stats, "observation.state")]}
    return inputs, {"action": {"type": "ACTION", "shape": [_width(stats, "action")]}}


def _resolution(facts: Facts) -> int:
    side = policy_facts.image_side(facts.sizes)
    if side is not None:
        return side
    # an adapter alone has no position embedding
    known = facts.known.get(RESOLUTION.key)
    return known.value[0] if known is not None else DEFAULT_RESOLUTION


def _width(stats: Stats, feature: str) -> int:
    return len(next(iter(stats[feature].values())))


def _norm_map(facts: Facts) -> dict[str, str]:
    mode = MODES[_method(facts)]
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


def _processors(facts: Facts, stats: Stats) -> dict[str, bytes]:
    inputs, outputs = _features(facts, stats)
    tokenizer = facts.known[TOKENIZER.key].value
    # LeRobot's own eps is 1e-8, which makes a dimension that never moved (std 0) a hundred times larger
    normalize = {"eps": EPS, "norm_map": _norm_map(facts)}
    configs: dict[str, dict[str, Any]] = {
        "rename_observations_processor": {"rename_map": {}},
        "tokenizer_processor": {
            "max_length": facts.known[PROMPT_LENGTH.key].value,
            "task_key": "task",
            "padding_side": "right",
            "padding": "max_length",
            "truncation": True,
            "tokenizer_name": tokenizer,
        },
        # LeRobot pads the state of this model before it becomes words; openpi does not
        "pi0_fast_prepare_state_tokenizer_processor_step": {
            "max_state_dim": _width(stats, "observation.state")
        },
        "action_tokenizer_processor": {
            "action_tokenizer_name": ACTION_TOKENIZER,
            "trust_remote_code": True,
            "max_action_tokens": 256,
            "fast_skip_tokens": 128,
            "paligemma_tokenizer_name": tokenizer,
        },
        "device_processor": {"device": "cpu", "float_dtype": None},
        "relative_actions_processor": {"enabled": False, "exclude_joints": ["gripper"], "action_names": None},
        "absolute_actions_processor": {"enabled": False},
        "normalizer_processor": {**normalize, "features": {**inputs, **outputs}},
        "unnormalizer_processor": {**normalize, "features": outputs},
    }
    return {
        **_pipeline("policy_preprocessor", PREPROCESSOR[facts.model.name], configs, save(_tensors(stats))),
        **_pipeline("policy_postprocessor", POSTPROCESSOR, configs, save(_tensors(stats, inverse=True))),
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


def _tensors(stats: Stats, *, inverse: bool = False) -> dict[str, np.ndarray]:
    """The statistics, such that LeRobot's formulas with :data:`EPS` give what openpi's give."""
    tensors: dict[str, np.ndarray] = {}
    for feature, vectors in stats.items():
        for name, vector in vectors.items():
            if name == "std" and inverse:
                # LeRobot multiplies by std alone here, openpi by what it divided by
                vector = vector + EPS
            elif name == "q99" and "q01" in vectors:
                # LeRobot divides by q99 - q01 alone; but where they are equal as float32, by its eps
                equal = vector.astype(np.float32) == vectors["q01"].astype(np.float32)
                vector = np.where(equal, vector, vector + EPS)
            tensors[f"{feature}.{name}"] = vector.astype(np.float32)
    return tensors


def _wide(facts: Facts, stats: Stats) -> list[str]:
    """Stats as wide as the model may be padded; openpi cuts them to the robot, LeRobot does not."""
    action = _action(facts, stats)
    wide = [key for key, feature in FEATURES.items() if _width(stats, feature) >= action]
    if not wide:
        return []
    return [
        f"norm stats of {' and '.join(wide)} are as wide as the model, {action}: if they are padded, cut them "
        "to the robot's dimensions and convert again, LeRobot would take the padding for joints"
    ]


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
