"""LeRobot's policies from before it had processors: statistics as buffers among the weights.

lerobot 0.1 to 0.3: policies/normalize.py, policies/pi0/configuration_pi0.py; how LeRobot itself takes
them over: processor/migrate_policy_normalization.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from bridge import Damage, Fact, Problem, Reading

from . import norm_stats
from .kinds import METHOD, NORM_STATS
from .norm_stats import NormStats

#: the layout of such policies
LAYOUT = "lerobot-0.3"

#: the buffers, before whose names the data set's may stand
BUFFER = (
    r"(?P<where>normalize_inputs|normalize_targets|unnormalize_outputs)"
    r"\.(?:(?P<data_set>[^.]+)_)?buffer_(?P<feature>[^.]+)\.(?P<statistic>mean|std|min|max)"
)
#: features as they stand in names of buffers -> openpi's
FEATURES = {"observation_state": "state", "action": "actions"}

MIGRATE = "take it over with LeRobot's migrate_policy_normalization.py first, and stay within LeRobot"
GIVE = "give the statistics with --norm-stats"

#: settings that LeRobot had built in, and openpi has in its data config
ALOHA = {
    "adapt_to_pi_aloha": "adapt_to_pi=True",
    "use_delta_joint_actions_aloha": "use_delta_joint_actions=True",
}


def read(stored: bytes, config: Any) -> Reading:
    """What the buffers and the old settings state.

    Args:
        stored: the buffers, as a safetensors file.
        config: the ``config.json`` beside the weights.
    """
    notes = [
        f"config.json has {field}: LeRobot of today has no such step; openpi does the same with {ours} in its "
        "data config"
        for field, ours in ALOHA.items()
        if norm_stats.at(config, field)
    ]
    try:
        # safetensors gives them in another order each time
        buffers = dict(sorted(load(stored).items()))
    except (SafetensorError, ValueError) as error:
        damage = Damage(
            NORM_STATS, Problem(f"the buffers among the weights are damaged: {error!s:.200}", GIVE)
        )
        return Reading(damaged=(damage,), notes=tuple(notes), layout=LAYOUT)
    sets: dict[tuple[str, str], dict[str, dict[str, np.ndarray]]] = {}
    foreign = []
    for name, array in buffers.items():
        match = re.fullmatch(BUFFER, name)
        assert match is not None  # the layout's pattern
        feature = FEATURES.get(match["feature"])
        if feature is None:
            foreign.append(match["feature"])
            continue
        key = match["data_set"] or "", match["where"]
        vectors = sets.setdefault(key, {}).setdefault(feature, {})
        vectors[match["statistic"]] = np.atleast_1d(array).astype(np.float64)
    inexpressible = tuple(
        Problem(f"the policy normalises {feature} by buffers among its weights, and openpi does not", MIGRATE)
        for feature in dict.fromkeys(foreign)
    )
    facts: list[Fact] = []
    damaged: list[Damage] = []
    for stated in _pairs(sets):
        made, trouble = _fact(*stated)
        facts += [made] if made is not None else []
        damaged += [] if trouble is None else [Damage(NORM_STATS, trouble)]
    if facts:
        facts.append(Fact(METHOD, "mean and std", facts[0].origin))
    elif not damaged:
        notes.append("the statistics among the weights are infinity: the policy was never given any")
    return Reading(
        facts=tuple(facts),
        damaged=tuple(damaged),
        notes=tuple(notes),
        layout=LAYOUT,
        inexpressible=inexpressible,
    )


Vectors = Mapping[str, np.ndarray]


def _pairs(
    sets: Mapping[tuple[str, str], Mapping[str, Vectors]],
) -> Iterator[tuple[str, Vectors, Vectors]]:
    """Statistics of states and of actions that belong together, with their origin.

    Actions are unnormalised by one buffer and were normalised in training by another: where these
    differ, or those of several data sets, they are several statements of the norm stats.
    """
    for data_set in dict.fromkeys(data_set for data_set, _ in sets):
        state = sets.get((data_set, "normalize_inputs"), {}).get("state", {})
        for where in ("unnormalize_outputs", "normalize_targets"):
            actions = sets.get((data_set, where), {}).get("actions", {})
            if actions or where == "unnormalize_outputs":
                yield f"{where} of {data_set or 'the weights'}", state, actions


def _fact(origin: str, state: Vectors, actions: Vectors) -> tuple[Fact | None, Problem | None]:
    """The norm stats of one origin, or what is wrong with them; neither where none were ever set."""
    stats: NormStats = {"state": state, "actions": actions}
    for feature, vectors in stats.items():
        lacks = [name for name in norm_stats.REQUIRED if name not in vectors]
        if lacks and {"min", "max"} <= vectors.keys():
            return None, Problem(
                f"{origin}: {feature} are normalised by min and max; openpi does not", MIGRATE
            )
        if lacks:
            return None, Problem(f"{origin}: {feature} have no {' and '.join(lacks)}", GIVE)
    arrays = [vectors[name] for vectors in stats.values() for name in norm_stats.REQUIRED]
    if all(np.isinf(array).all() for array in arrays):
        return None, None
    if not all(np.isfinite(array).all() and array.ndim == 1 for array in arrays):
        return None, Problem(f"{origin} have numbers that are not finite, or no list of them", GIVE)
    for feature, vectors in stats.items():
        kept = {name: vectors[name] for name in norm_stats.REQUIRED}
        if problems := norm_stats.length_problems(origin, feature, kept):
            return None, problems[0]
    kept_stats = {f: {name: v[name] for name in norm_stats.REQUIRED} for f, v in stats.items()}
    return Fact(NORM_STATS, kept_stats, origin), None
