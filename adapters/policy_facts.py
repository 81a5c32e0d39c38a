"""The facts around openpi-like policies: where each is read, what nothing states, and openpi's files of them.

openpi keeps norm stats in ``assets/<asset_id>/norm_stats.json`` and everything else in a training
config, which is in no checkpoint. What bridge learns elsewhere stands in ``policy_facts.json``
where no ``config.json`` has it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from bridge import Damage, Fact, Facts, FactTable, File, Model, Number, Option, Problem, Reading, Text

from . import lerobot_read, norm_stats
from .kinds import (
    ACTION_WIDTH,
    ASSET_ID,
    CAMERAS,
    HORIZON,
    KINDS,
    METHOD,
    NORM_STATS,
    PROMPT_LENGTH,
    RESOLUTION,
    STATE_WIDTH,
    TOKENIZER,
    is_whole,
)

POLICY_FILE = "policy_facts.json"
CONFIG = "config.json"
ASSETS = re.compile(r"assets/(.+)/norm_stats\.json")
#: below assets/, as openpi has "physical-intelligence/libero"
ASSET = re.compile(r"(?!\.{1,2}(/|$))[^/\x00-\x1f\\]+(/(?!\.{1,2}(/|$))[^/\x00-\x1f\\]+)*")

#: openpi's defaults: action_horizon and max_token_len (models/pi0_config.py, models/pi0_fast.py)
HORIZONS = {"pi0": 50, "pi05": 50, "pi0_fast": 32}
PROMPT_TOKENS = {"pi0": 48, "pi05": 200, "pi0_fast": 250}

#: openpi normalises every model but pi0 by quantiles (training/config.py)
METHODS = {"pi0": "mean and std", "pi05": "quantiles", "pi0_fast": "quantiles"}

#: openpi's cameras, in the order in which their tokens stand (models/model.py)
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
#: openpi's tokenizer under its name on the hub (models/tokenizer.py)
HUB_TOKENIZER = "google/paligemma-3b-pt-224"

#: key of a width -> the feature that is so wide
WIDTHS = {STATE_WIDTH.key: "state", ACTION_WIDTH.key: "actions"}

#: where nothing names the robot
NO_ID = "my_robot"


OPTIONS = {
    "action_horizon": Option(
        kind=Number(),
        help="Length of an action chunk, where no file beside the weights states it or it is wrong.",
    ),
    "norm_stats": Option(
        kind=File(),
        help="Norm stats to use in place of those beside the weights: a norm_stats.json of openpi's form.",
        fix="give the path of a norm_stats.json",
    ),
    "asset_id": Option(
        kind=Text("ID"),
        help="Name of the norm stats below assets/, as in the training config; chosen and reported where the "
        "source has none.",
    ),
}


def read(model: Model, files: Mapping[str, bytes], chosen: Mapping[str, Any]) -> Reading:
    """Everything that the files of a directory state."""
    lerobot = lerobot_read.read(files)
    facts, damaged = _openpi(model, files, chosen.get(ASSET_ID.key))
    if not lerobot.layout:
        other, trouble = _transformers(files)
        facts += other
        damaged += trouble
    stated, trouble = _policy_file(files)
    own = next((fact.value for fact in facts if fact.kind is NORM_STATS), None)
    from_lerobot = [
        fact
        for fact in lerobot.facts
        # the same statistics, in the form in which bridge's own processors have them
        if fact.kind is not NORM_STATS or own is None or not lerobot_read.are_made_from(own, fact.value)
    ]
    return Reading(
        facts=(*facts, *from_lerobot, *_train_config(files), *stated),
        damaged=(*damaged, *lerobot.damaged, *trouble),
        notes=lerobot.notes,
        layout=lerobot.layout,
        kept=lerobot.kept,
        inexpressible=lerobot.inexpressible,
    )


def _openpi(model: Model, files: Mapping[str, bytes], chosen: str | None) -> tuple[list[Fact], list[Damage]]:
    found = {match[1]: path for path in sorted(files) if (match := ASSETS.fullmatch(path))}
    facts: list[Fact] = []
    damaged: list[Damage] = []
    if len(found) > 1 and chosen is not None and chosen not in found:
        cause = f"assets/ has {', '.join(found)}, and no {chosen}"
        return [], [Damage(NORM_STATS, Problem(cause, "name one of them with --asset-id"))]
    statistics = norm_stats.METHODS[METHODS[model.name]]
    for asset_id, path in found.items():
        stats = norm_stats.read(path, files[path], statistics)
        if isinstance(stats, list):
            damaged += [Damage(NORM_STATS, problem) for problem in stats]
        # of several, which the policy uses is in its training config alone
        elif len(found) == 1 or asset_id == chosen:
            facts += [Fact(NORM_STATS, stats, path), Fact(ASSET_ID, asset_id, path)]
    return facts, damaged


def _transformers(files: Mapping[str, bytes]) -> tuple[list[Fact], list[Damage]]:
    """transformers, models/pi0/configuration_pi0.py."""
    if CONFIG not in files:
        return [], []
    try:
        config = json.loads(files[CONFIG])
    except (ValueError, RecursionError):
        return [], []  # lerobot_read names it
    chunk = norm_stats.at(config, "chunk_size")
    if norm_stats.at(config, "model_type") not in ("pi0", "pi05") or chunk is None:
        return [], []
    if is_whole(chunk):
        return [Fact(HORIZON, chunk, CONFIG)], []
    cause = f"chunk_size of {CONFIG} is {chunk!r:.60}, not a positive whole number"
    return [], [Damage(HORIZON, Problem(cause, "restore the file from a copy, or give --action-horizon"))]


def _train_config(files: Mapping[str, bytes]) -> list[Fact]:
    """lerobot-train records the data set; openpi's default asset id is its name as well."""
    try:
        name = norm_stats.at(json.loads(files.get("train_config.json", b"{}")), "dataset", "repo_id")
    except (ValueError, RecursionError):
        return []
    valid = isinstance(name, str) and len(name) <= 200 and ASSET.fullmatch(name)
    return [Fact(ASSET_ID, name, "train_config.json")] if valid else []


def _policy_file(files: Mapping[str, bytes]) -> tuple[list[Fact], list[Damage]]:
    facts, damaged = [], []
    if POLICY_FILE in files:
        try:
            tree = json.loads(files[POLICY_FILE])
            for kind in KINDS:
                if kind.key in tree and kind is not NORM_STATS:
                    facts.append(Fact(kind, kind.decode(tree[kind.key]), POLICY_FILE))
        except (ValueError, TypeError, RecursionError) as error:
            fix = "restore it from a copy, or give the values by --action-horizon and the other options"
            damaged.append(Damage(HORIZON, Problem(f"{POLICY_FILE} is damaged: {error}", fix)))
    return facts, damaged


def given(model: Model, settings: Mapping[str, Any]) -> Reading:
    """What the options state."""
    facts: list[Fact] = []
    damaged: list[Damage] = []
    if (data := settings.get("norm_stats")) is not None:
        stats = norm_stats.read("--norm-stats", data, norm_stats.METHODS[METHODS[model.name]])
        if isinstance(stats, list):
            damaged += [Damage(NORM_STATS, problem) for problem in stats]
        else:
            facts.append(Fact(NORM_STATS, stats, "--norm-stats"))
    if (name := settings.get("asset_id")) is not None:
        if len(name) > 200 or not ASSET.fullmatch(name):
            cause = f"--asset-id is {name!r:.100}, which cannot be a folder below assets/"
            damaged.append(Damage(ASSET_ID, Problem(cause, "give a name such as my_robot")))
        facts.append(Fact(ASSET_ID, name, "--asset-id"))
    if (horizon := settings.get("action_horizon")) is not None:
        facts.append(Fact(HORIZON, horizon, "--action-horizon"))
    return Reading(facts=tuple(facts), damaged=tuple(damaged))


def image_side(sizes: Mapping[str, int]) -> int | None:
    """Pixels a side of an image, from the patches and their size; None where either is unknown."""
    return math.isqrt(sizes.get("siglip.token", 0)) * sizes.get("siglip.rows", 0) or None


def complete(model: Model, sizes: Mapping[str, int], facts: Mapping[str, Fact]) -> tuple[Fact, ...]:
    """What follows from the facts stated, and openpi's own values where nothing states any."""
    more: list[Fact] = []
    stats = facts.get(NORM_STATS.key)
    if stats is not None:
        for kind in (STATE_WIDTH, ACTION_WIDTH):
            feature = WIDTHS[kind.key]
            if kind.key not in facts:
                more.append(Fact(kind, norm_stats.width(stats.value, feature), stats.origin))
        if ASSET_ID.key not in facts:
            more.append(Fact(ASSET_ID, NO_ID, "chosen: no file names the robot", assumed=True))
    rule = f"openpi's for {model.name}"
    side = image_side(sizes)
    if side is not None and RESOLUTION.key not in facts:
        more.append(Fact(RESOLUTION, (side, side), "the position embedding"))
    defaults = (
        (METHOD, METHODS[model.name], rule),
        (HORIZON, HORIZONS[model.name], f"assumed: {rule}"),
        (CAMERAS, OPENPI_CAMERAS, rule),
        (TOKENIZER, HUB_TOKENIZER, rule),
        (PROMPT_LENGTH, PROMPT_TOKENS[model.name], rule),
    )
    more += [
        Fact(kind, value, origin, assumed=kind is not METHOD)
        for kind, value, origin in defaults
        if kind.key not in facts
    ]
    return tuple(more)


def remarks(model: Model, sizes: Mapping[str, int], facts: Mapping[str, Fact]) -> tuple[str, ...]:
    """What looks wrong about norm stats: dimensions that never moved, widths that do not fit."""
    said: list[str] = []
    stats, action = facts.get(NORM_STATS.key), sizes.get("projections.action")
    if stats is None:
        # without them a policy moves the robot wrongly, and nothing says so
        return ("no norm stats are known: the policy needs its own to run, give them with --norm-stats",)
    for key, feature in WIDTHS.items():
        wide, robot = norm_stats.width(stats.value, feature), facts.get(key)
        if still := norm_stats.constant(stats.value[feature]):
            said.append(
                f"{feature} never moved in dimension {', '.join(map(str, still[:16]))}: a value that differs "
                "from its mean there is scaled by a million"
            )
        if robot is not None and robot.value != wide:
            said.append(f"norm stats have {wide} {feature}, but {robot.origin} has {robot.value}")
        if action is not None and wide > action:
            said.append(f"norm stats have {wide} {feature}, but the model is {action} wide")
        elif action is not None and wide == action:
            said.append(f"norm stats of {feature} are as wide as the model, {action}: they may be padded")
    method = facts[METHOD.key].value
    if lacking := [each for each in norm_stats.METHODS[method] if each not in stats.value["actions"]]:
        said.append(f"norm stats have no {' and '.join(lacking)}, which {method} needs")
    return tuple(said)


TABLE = FactTable(
    kinds=KINDS,
    files=(*lerobot_read.FILES, "train_config.json", POLICY_FILE, "assets/*/norm_stats.json"),
    read=read,
    given=given,
    complete=complete,
    remarks=remarks,
)


# openpi's own files of them.


def assets(facts: Facts) -> dict[str, bytes]:
    """What stands below ``assets/``: the source's files, or what openpi reads, made from the norm stats.

    The files stay as they are, byte for byte, where they state the norm stats that were decided on.
    """
    stats, name = facts.known.get(NORM_STATS.key), facts.known.get(ASSET_ID.key)
    if stats is None or name is None:
        return dict(facts.assets)
    path = f"assets/{name.value}/norm_stats.json"
    if path in facts.assets:
        own = norm_stats.read(path, facts.assets[path])
        if not isinstance(own, list) and norm_stats.same(own, stats.value):
            return dict(facts.assets)
    others = {path: data for path, data in facts.assets.items() if not ASSETS.fullmatch(path)}
    return {**others, path: norm_stats.write(stats.value)}


def notes(facts: Facts) -> list[str]:
    """What a user must know who runs the policy in openpi."""
    said = []
    stats, name, method = (facts.known.get(kind.key) for kind in (NORM_STATS, ASSET_ID, METHOD))
    if stats is not None and name is not None and name.assumed:
        said.append(
            f"norm stats are written to assets/{name.value}: no file names the robot (choose with --asset-id)"
        )
    if stats is not None and method is not None and method.value != METHODS[facts.model.name]:
        quantiles = method.value == "quantiles"
        said.append(
            f"the policy is normalised by {method.value}, and openpi normalises {facts.model.name} by "
            f"{METHODS[facts.model.name]}: set use_quantile_norm={quantiles} in its data config"
        )
    return said


def policy_file(facts: Facts, *, horizon: bool) -> dict[str, bytes]:
    """``policy_facts.json``: what is known, and no other file of the output states.

    Args:
        facts: of the output.
        horizon: whether the action horizon is among that.
    """
    stated = {
        key: fact.kind.encode(fact.value)
        for key, fact in facts.known.items()
        if fact.kind is not NORM_STATS and not _follows(fact, facts) and (horizon or fact.kind is not HORIZON)
    }
    return {POLICY_FILE: (json.dumps(stated, indent=2) + "\n").encode()} if stated else {}


def _follows(fact: Fact, facts: Facts) -> bool:
    """Whether a fact need not be written: assumed, openpi's own, or in the assets."""
    stats, feature = facts.known.get(NORM_STATS.key), WIDTHS.get(fact.kind.key)
    return (
        fact.assumed
        or fact.kind in (ASSET_ID, RESOLUTION)
        or (fact.kind is METHOD and fact.value == METHODS[facts.model.name])
        or (
            stats is not None and feature is not None and fact.value == norm_stats.width(stats.value, feature)
        )
    )
