"""The factor each expert's LoRA product is multiplied by, and where that number comes from.

openpi stores ranks (in shapes) and never alpha. A stock variant's alpha follows from its rank;
any other must be given, because a wrong guess changes the policy and nothing would show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.errors import Problem
from bridge.lora.algebra import scaling


@dataclass(frozen=True)
class Scale:
    """How one part's LoRA products are scaled."""

    part: str
    rank: int
    alpha: float
    rslora: bool
    origin: str
    """Where alpha comes from, for people."""

    @property
    def value(self) -> float:
        return scaling(self.rank, self.alpha, rslora=self.rslora)

    def __str__(self) -> str:
        root = "sqrt(rank)" if self.rslora else "rank"
        return f"{self.part}: rank {self.rank}, alpha {self.alpha:g} ({self.origin}), alpha/{root} = {self.value:g}"


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
        part.name: checkpoint.rank(part.name, rule)
        for part, rule in checkpoint.lora_rules()
        if rule.lora is not None and rule.lora.scaled
    }
    location = checkpoint.source.location
    found: dict[str, Scale] = {}
    problems: list[Problem] = []
    problems += alpha_problems(given)
    for name in given:
        if name and name not in ranks:
            have = " and ".join(ranks) or "no part"
            problems.append(
                Problem(
                    f"{location}: --lora-alpha is given for {name}, and scaled LoRA factors are in {have}",
                    f"name one of {', '.join(ranks)}" if ranks else "leave --lora-alpha out",
                )
            )
    if not ranks and ("" in given or rslora):
        flag = "--lora-alpha" if "" in given else "--rslora"
        problems.append(
            Problem(
                f"{location}: {flag} is given, and no scaled LoRA factors are there",
                f"leave {flag} out if that is what you expect; else the checkpoint has lost its factors",
            )
        )
    for part in checkpoint.model.parts:
        if part.name not in ranks:
            continue
        rank = ranks[part.name]
        alpha = given.get(part.name, given.get(""))
        origin = "given"
        if alpha is None:
            alpha, origin = part.stock_alpha.get(rank), f"the stock one for rank {rank}"
        if alpha is None:
            stock = ", ".join(map(str, part.stock_alpha)) or "none"
            problems.append(
                Problem(
                    f"{location}: {part.name} has LoRA of rank {rank} and unknown alpha "
                    f"(checkpoints do not store it; stock rank: {stock})",
                    f"add --lora-alpha {part.name}=ALPHA, from the training config's LoRAConfig",
                )
            )
        elif rank > 0:
            found[part.name] = Scale(part.name, rank, alpha, rslora, origin)
    return found, problems


def alpha_problems(given: Mapping[str, float]) -> list[Problem]:
    """Alphas that are none."""
    return [
        Problem(
            f"--lora-alpha {name}{'=' if name else ''}{value}: alpha is a positive number",
            "take it from the training config's LoRAConfig",
        )
        for name, value in given.items()
        if not (math.isfinite(value) and value > 0)
    ]
