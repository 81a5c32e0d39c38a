"""Reading LeRobot's policy directory: its config, its processors and their statistics. lerobot 0.6.1.

What LeRobot does that openpi does not (relative actions, steps of other packages, other ways to
normalise) travels within LeRobot alone, and is named where a conversion leaves it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from bridge import IN_WEIGHTS, Damage, Fact, Problem, Reading

from . import lerobot_before, norm_stats
from .kinds import (
    ACTION_WIDTH,
    CAMERAS,
    HORIZON,
    MAX_NAMES,
    METHOD,
    NORM_STATS,
    PROMPT_LENGTH,
    RESOLUTION,
    STATE_WIDTH,
    TOKENIZER,
    is_whole,
)
from .norm_stats import NormStats

CONFIG = "config.json"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE_FILE = re.compile(r"policy_(?:pre|post)processor_step_\d+_\w+\.safetensors")
#: patterns of the names of its files
FILES = (
    CONFIG,
    PRE,
    POST,
    "policy_preprocessor_step_*.safetensors",
    "policy_postprocessor_step_*.safetensors",
)

MODELS = ("pi0", "pi05", "pi0_fast")
#: names in norm_stats.json -> LeRobot's
FEATURES = {"state": "observation.state", "actions": "action"}
TYPES = {"state": "STATE", "actions": "ACTION"}
MODES = {"MEAN_STD": "mean and std", "QUANTILES": "quantiles"}
IMAGES = "observation.images."

#: steps that openpi has as well, or that do nothing to numbers
KNOWN_STEPS = frozenset(
    {
        "rename_observations_processor", "to_batch_processor", "pi0_new_line_processor", "tokenizer_processor",
        "device_processor", "relative_actions_processor", "absolute_actions_processor", "normalizer_processor",
        "unnormalizer_processor", "pi05_prepare_state_tokenizer_processor_step",
        "pi0_fast_prepare_state_tokenizer_processor_step", "action_tokenizer_processor",
    }
)  # fmt: skip

#: steps that are openpi's as long as they are not enabled
RELATIVE = ("relative_actions_processor", "absolute_actions_processor")

#: fields of config.json that the runtime's function depends on, with openpi's values
FIXED = {"min_period": 4e-3, "max_period": 4.0}

STAY = "convert within LeRobot (--layout lerobot), which keeps it"
RECOPY = "copy the policy again, or give the statistics with --norm-stats"


def is_policy(config: Any) -> bool:
    """Whether a ``config.json`` is one of LeRobot's policies that openpi has."""
    return isinstance(config, dict) and config.get("type") in MODELS and "model_type" not in config


def read(files: Mapping[str, bytes]) -> Reading:
    """What LeRobot's files state; nothing where there are none."""
    trees, damaged = _trees(files)
    config = trees.get(CONFIG)
    before = lerobot_before.read(files[IN_WEIGHTS], config) if IN_WEIGHTS in files else None
    if (
        before is None
        and not is_policy(config)
        and PRE not in trees
        and not any(d.kind is NORM_STATS for d in damaged)
    ):
        return Reading(damaged=tuple(damaged))
    facts: list[Fact] = []
    notes: list[str] = []
    inexpressible: list[Problem] = []
    kept: dict[str, Mapping[str, bytes]] = {}
    if isinstance(config, dict) and is_policy(config):
        stated, trouble = _config_facts(config)
        facts += stated
        damaged += trouble
        inexpressible += _settings(config)
        notes += _lost(config)
        if "input_features" in config or "chunk_size" in config:
            kept["config"] = {CONFIG: files[CONFIG]}
    steps = {name: _steps(trees[name]) for name in (PRE, POST) if name in trees}
    if steps:
        kept["processors"] = {
            name: data for name, data in files.items() if name in (PRE, POST) or STATE_FILE.fullmatch(name)
        }
        facts += _tokenizer(steps.get(PRE, []))
        stated, trouble = _statistics(steps, files)
        facts += stated
        damaged += trouble
        inexpressible += _foreign(steps)
        notes += _renamed(steps.get(PRE, []))
    if before is not None:
        # a config of that time is refused by LeRobot of today: what it states is written anew
        return Reading(
            facts=(*facts, *before.facts),
            damaged=(*damaged, *before.damaged),
            notes=(*notes, *before.notes),
            layout=before.layout,
            inexpressible=tuple(dict.fromkeys((*inexpressible, *before.inexpressible))),
        )
    return Reading(
        facts=tuple(facts),
        damaged=tuple(damaged),
        notes=tuple(notes),
        layout="lerobot",
        kept=kept,
        inexpressible=tuple(dict.fromkeys(inexpressible)),
    )


def _trees(files: Mapping[str, bytes]) -> tuple[dict[str, Any], list[Damage]]:
    trees: dict[str, Any] = {}
    damaged = []
    for name, kind in ((CONFIG, HORIZON), (PRE, NORM_STATS), (POST, NORM_STATS)):
        if name not in files:
            continue
        try:
            tree = json.loads(files[name])
            if not isinstance(tree, dict):
                raise ValueError("it is not an object")
            trees[name] = tree
        except (ValueError, RecursionError) as error:
            damaged.append(Damage(kind, Problem(f"{name} is not JSON: {error}", RECOPY)))
    return trees, damaged


# The config.


def _config_facts(config: Mapping[str, Any]) -> tuple[list[Fact], list[Damage]]:
    facts, damaged = [], []
    for kind, field in ((HORIZON, "chunk_size"), (PROMPT_LENGTH, "tokenizer_max_length")):
        value = config.get(field)
        if is_whole(value):
            facts.append(Fact(kind, value, CONFIG))
        elif value is not None:
            cause = f"{field} of {CONFIG} is {value!r:.60}, not a positive whole number"
            damaged.append(Damage(kind, Problem(cause, "copy the policy again")))
    inputs, outputs = config.get("input_features"), config.get("output_features")
    for kind, features, name in (
        (STATE_WIDTH, inputs, "observation.state"),
        (ACTION_WIDTH, outputs, "action"),
    ):
        shape = norm_stats.at(features, name, "shape")
        if isinstance(shape, list) and len(shape) == 1 and is_whole(shape[0]):
            facts.append(Fact(kind, shape[0], CONFIG))
    if isinstance(inputs, dict):
        cameras = tuple(
            name.removeprefix(IMAGES)
            for name, feature in inputs.items()
            if norm_stats.at(feature, "type") == "VISUAL" and not name.startswith(f"{IMAGES}empty_camera_")
        )
        if 0 < len(cameras) <= MAX_NAMES:
            facts.append(Fact(CAMERAS, cameras, CONFIG))
    resolution = config.get("image_resolution")
    if isinstance(resolution, list) and len(resolution) == 2 and all(map(is_whole, resolution)):
        facts.append(Fact(RESOLUTION, tuple(resolution), CONFIG))
    return facts, damaged


def _settings(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings that change what the policy does, and that no other layout has."""
    if config.get("use_relative_actions"):
        yield Problem(
            f"{CONFIG} has use_relative_actions: the policy predicts differences from the state, and openpi "
            "knows that from a transform of its training config alone",
            STAY,
        )
    for field, value in FIXED.items():
        if config.get(field, value) != value:
            yield Problem(f"{CONFIG} has {field} {config[field]!r:.40}; openpi has {value} built in", STAY)


def _lost(config: Mapping[str, Any]) -> Iterator[str]:
    steps, chunk = config.get("n_action_steps"), config.get("chunk_size")
    if steps is not None and steps != chunk:
        yield f"LeRobot executes {steps!r:.20} of {chunk!r:.20} actions before it predicts again (n_action_steps)"
    if config.get("empty_cameras"):
        yield f"LeRobot adds {config['empty_cameras']!r:.20} empty cameras (empty_cameras)"
    if config.get("num_inference_steps", 10) != 10:
        yield f"LeRobot samples in {config['num_inference_steps']!r:.20} steps, openpi in 10 unless told"


# The processors.


def _steps(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    steps = tree.get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _named(steps: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((step for step in steps if step.get("registry_name") == name), None)


def _tokenizer(steps: list[dict[str, Any]]) -> Iterator[Fact]:
    config = norm_stats.at(_named(steps, "tokenizer_processor"), "config")
    name, length = norm_stats.at(config, "tokenizer_name"), norm_stats.at(config, "max_length")
    if isinstance(name, str) and name:
        yield Fact(TOKENIZER, name, PRE)
    if is_whole(length):
        yield Fact(PROMPT_LENGTH, length, PRE)


def _foreign(steps: Mapping[str, list[dict[str, Any]]]) -> Iterator[Problem]:
    for file, listed in steps.items():
        for step in listed:
            name = str(step.get("registry_name") or step.get("class") or "without a name")
            if name not in KNOWN_STEPS:
                yield Problem(f"{file} has the step {name:.80}, which openpi does not have", STAY)
            elif name in RELATIVE and norm_stats.at(step, "config", "enabled"):
                yield Problem(f"{file}: {name} is enabled: the actions are relative to the state", STAY)
    config = norm_stats.at(_named(steps.get(PRE, []), "normalizer_processor"), "config", "norm_map")
    for feature in TYPES.values():
        mode = norm_stats.at(config, feature)
        if mode is not None and str(mode) not in MODES:
            yield Problem(f"{PRE} normalises {feature} by {mode!s:.40}, which openpi does not have", STAY)
    modes = {str(norm_stats.at(config, feature)) for feature in TYPES.values()}
    if modes <= MODES.keys() and len(modes) > 1:
        cause = f"{PRE} normalises the state by another method than the actions; openpi has one for both"
        yield Problem(cause, STAY)


def _renamed(steps: list[dict[str, Any]]) -> Iterator[str]:
    names = norm_stats.at(_named(steps, "rename_observations_processor"), "config", "rename_map")
    if isinstance(names, dict) and names:
        shown = ", ".join(f"{old} to {new}" for old, new in list(names.items())[:8])
        yield f"LeRobot renames observations ({shown:.400}); the robot's code does it for other runtimes"


def _statistics(
    steps: Mapping[str, list[dict[str, Any]]], files: Mapping[str, bytes]
) -> tuple[list[Fact], list[Damage]]:
    """The statistics that the preprocessor has, and those of the postprocessor where they differ."""
    facts: list[Fact] = []
    damaged: list[Damage] = []
    before = _named(steps.get(PRE, []), "normalizer_processor")
    after = _named(steps.get(POST, []), "unnormalizer_processor")
    modes = {str(norm_stats.at(before, "config", "norm_map", each)) for each in TYPES.values()}
    method = MODES.get(modes.pop()) if len(modes) == 1 else None
    read: dict[str, NormStats] = {}
    for file, step in ((PRE, before), (POST, after)):
        state_file = norm_stats.at(step, "state_file")
        if state_file is None:
            continue  # a policy that was never given any, such as a base on the hub
        stats = _tensors(state_file, files, method)
        if isinstance(stats, Problem):
            damaged.append(Damage(NORM_STATS, stats))
        elif stats:
            read[file] = stats
    if method is not None:
        facts.append(Fact(METHOD, method, PRE))
    if PRE in read:
        facts.append(Fact(NORM_STATS, read[PRE], PRE))
    if POST in read and not (PRE in read and unnormalizes(read[PRE], read[POST])):
        facts.append(Fact(NORM_STATS, read[POST], POST))
    return facts, damaged


#: what openpi adds to every divisor (transforms.py, Normalize and Unnormalize)
EPS = 1e-6


def unnormalizes(before: NormStats, after: NormStats) -> bool:
    """Whether a postprocessor has the statistics of its preprocessor; bridge's own has std + 1e-6."""
    return norm_stats.same(before, after) or all(
        bool(
            np.all(
                np.abs(vectors[name] - before[feature][name] - EPS * (name == "std")) <= _ulps(vectors[name])
            )
        )
        for feature, vectors in after.items()
        for name in vectors.keys() & before[feature].keys()
    )


def without_eps(stats: NormStats) -> NormStats:
    """The statistics from which bridge made a preprocessor: it adds 1e-6 to every q99 that is not its q01."""
    return {
        feature: {
            name: vector - EPS * (vector != vectors.get("q01")) if name == "q99" else vector
            for name, vector in vectors.items()
        }
        for feature, vectors in stats.items()
    }


def near(a: NormStats, b: NormStats) -> bool:
    """Whether they are one set, but for what rounding to float32 and back has made of it."""
    return all(
        a[feature][name].shape == vector.shape
        and bool(np.all(np.abs(a[feature][name] - vector) <= _ulps(vector)))
        for feature, vectors in b.items()
        for name, vector in vectors.items()
        if name in a[feature]
    )


def are_made_from(own: NormStats, processors: NormStats) -> bool:
    """Whether a processor's statistics are a policy's own, straight or in the form in which bridge writes them."""
    plain = without_eps(processors)
    return near(own, processors) or near(own, plain) or unnormalizes(own, plain)


def _ulps(vector: np.ndarray) -> np.ndarray:
    """Two units in the last place of float32, and what 1e-6 has of them."""
    spacing: np.ndarray = 2 * np.spacing(np.abs(vector).astype(np.float32)).astype(np.float64) + 1e-12
    return spacing


def _tensors(name: Any, files: Mapping[str, bytes], method: str | None) -> NormStats | Problem | None:
    """The statistics of states and actions in a state file; None where it has none at all."""
    if not isinstance(name, str) or name not in files:
        return Problem(f"the statistics {name!r:.100} of the processors are missing", RECOPY)
    try:
        tensors = load(files[name])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        return Problem(f"{name} is damaged: {error!s:.200}", RECOPY)
    stats: dict[str, dict[str, np.ndarray]] = {}
    for feature, stored in FEATURES.items():
        vectors = {
            statistic: np.atleast_1d(tensors[f"{stored}.{statistic}"]).astype(np.float64)
            for statistic in (*norm_stats.REQUIRED, *norm_stats.QUANTILES)
            if f"{stored}.{statistic}" in tensors
        }
        if vectors:
            stats[feature] = vectors
    if not stats:
        return None
    for feature, stored in FEATURES.items():
        lacks = [
            each for each in norm_stats.METHODS.get(method or "", ()) if each not in stats.get(feature, {})
        ]
        if lacks or feature not in stats:
            return Problem(f"{name} has no {stored}.{' and '.join(lacks or norm_stats.REQUIRED)}", RECOPY)
        if any(vector.ndim != 1 or not np.isfinite(vector).all() for vector in stats[feature].values()):
            return Problem(f"{stored} of {name} has numbers that are not finite, or no list of them", RECOPY)
        if problems := norm_stats.length_problems(name, stored, stats[feature]):
            return problems[0]
    return stats
