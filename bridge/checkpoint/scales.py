"""The factor each part's LoRA product is multiplied by, and where that number comes from.

A checkpoint stores ranks (in shapes) but often no alpha. A stock variant's alpha follows from its
rank; any other must be given, because a wrong guess changes the model and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.options import SourceOptions
from bridge.errors import Problem
from bridge.formats.disk.location import Location
from bridge.lora.factors import Scale
from bridge.publish.record import RECORD, read_record
from bridge.rules.option import declared


def scales(
    checkpoint: Checkpoint, given: Mapping[str, float], rslora: bool
) -> tuple[dict[str, Scale], list[Problem]]:
    """The scale of every part that has scaled LoRA factors.

    Args:
        checkpoint: the source.
        given: alpha by part name; ``""`` stands for all parts.
        rslora: whether the run used rank-stabilised LoRA.
    """
    if any(
        rule.lora is not None
        and checkpoint.model.qualified(part.name, rule.lora.rank) not in checkpoint.sizes
        for part, rule in checkpoint.lora_rules()
    ):
        return {}, []  # no factor has the right number of axes: one of the checkpoint's own problems
    ranks = {
        part.name: checkpoint.rank(part, rule)
        for part, rule in checkpoint.lora_rules()
        if rule.lora is not None and rule.lora.scaled
    }
    location = checkpoint.source.location
    recorded = recorded_scales(checkpoint.source.root)
    known: dict[str, Scale] = {}
    problems: list[Problem] = []
    problems += alpha_problems(given)
    for name in given:
        if name and name not in ranks:
            have = " and ".join(ranks) or "no part"
            problems.append(
                Problem(
                    f"{location}: --lora-alpha names {name}, but scaled LoRA factors are in {have}",
                    f"name one of {', '.join(ranks)}" if ranks else "leave --lora-alpha out",
                )
            )
    if not ranks and ("" in given or rslora):
        flag = "--lora-alpha" if "" in given else "--rslora"
        problems.append(
            Problem(
                f"{location}: {flag} is given, but there are no scaled LoRA factors",
                f"leave {flag} out if that is what you expect; else the checkpoint has lost its factors",
            )
        )
    for part in checkpoint.model.parts:
        if part.name not in ranks:
            continue
        rank = ranks[part.name]
        alpha = given.get(part.name, given.get(""))
        origin = "given"
        uses_root, had = rslora, recorded.get(part.name, {})
        if alpha is None and had.get("rank") == rank:
            alpha, origin = float(had["alpha"]), f"from {RECORD}"
            uses_root = rslora or bool(had.get("rslora"))
        if alpha is None:
            alpha, origin = part.stock_alpha.get(rank), f"stock for rank {rank}"
        if alpha is None:
            stock = ", ".join(map(str, part.stock_alpha)) or "none"
            problems.append(
                Problem(
                    f"{location}: {part.name} has LoRA of rank {rank} with unknown alpha "
                    f"(the checkpoint does not store it; stock rank: {stock})",
                    f"add --lora-alpha {part.name}=ALPHA, as in the training config",
                )
            )
        elif rank > 0:
            known[part.name] = Scale(part=part.name, rank=rank, alpha=alpha, rslora=uses_root, origin=origin)
    return known, problems


def alpha_problems(given: Mapping[str, float]) -> list[Problem]:
    """Alphas that are not positive numbers."""
    return declared(SourceOptions)["lora_alpha"].problems("lora_alpha", given)


def recorded_scales(root: Location, *, of_source: bool = False) -> dict[str, dict[str, Any]]:
    """The scales that bridge recorded beside a checkpoint, by part; empty where there are none.

    Args:
        root: the checkpoint.
        of_source: those of what it was made from, where they are others.
    """
    record = read_record(root)
    try:
        scales = record["sources"]["source"]["scales"] if of_source else record.get("scales", {})
        return {
            name: scale
            for name, scale in scales.items()
            if type(scale["rank"]) is int and scale["rank"] > 0 and float(scale["alpha"]) > 0
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def alphas_for(
    own: Location, other: Location, given: Mapping[str, float], rslora: bool
) -> tuple[dict[str, float], bool]:
    """Alphas of one of two checkpoints: as given, else as its ``bridge.json`` records them, else the other's.

    Where ranks were changed on the way from one to the other, what is given speaks of the one before.
    """
    mine = recorded_scales(own)
    if given:
        before = recorded_scales(own, of_source=True)
        mine = {name: scale for name, scale in mine.items() if name in before and scale != before[name]}
    scales = mine or ({} if given else recorded_scales(other, of_source=True) or recorded_scales(other))
    alphas = {name: float(scale["alpha"]) for name, scale in scales.items()}
    return {**given, **alphas}, rslora or any(bool(scale.get("rslora")) for scale in scales.values())
