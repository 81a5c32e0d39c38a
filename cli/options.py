"""Options that several commands read the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _by_expert(
    what: str, values: tuple[str, ...], ctx: click.Context, option: click.Parameter
) -> dict[str, float]:
    """Read ``NUMBER`` and ``EXPERT=NUMBER``, repeated or with commas; ``""`` stands for all experts."""
    found: dict[str, float] = {}
    for value in (part for text in values for part in text.split(",")):
        expert, _, text = value.strip().rpartition("=")
        try:
            number = float(text)
        except ValueError:
            raise click.BadParameter(f"{value!r} is neither {what} nor EXPERT={what}", ctx, option) from None
        if not math.isfinite(number) or number <= 0:
            raise click.BadParameter(f"{value!r}: {what.lower()} is a positive number", ctx, option)
        if expert in found:
            raise click.BadParameter(
                f"{what.lower()} of {expert or 'all experts'} is given twice", ctx, option
            )
        found[expert] = number
    return found


def alphas(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """``--lora-alpha``: by expert; ``""`` stands for all."""
    return _by_expert("ALPHA", values, ctx, option)


def ranks(
    ctx: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> int | dict[str, int] | None:
    """``--rank``: one number, or one for each expert."""
    found = _by_expert("RANK", values, ctx, option)
    if any(number != int(number) for number in found.values()):
        raise click.BadParameter("a rank is a whole number", ctx, option)
    whole = {expert: int(number) for expert, number in found.items()}
    if "" in whole and len(whole) > 1:
        raise click.BadParameter("give one rank, or one for each expert", ctx, option)
    return whole.get("", whole or None)


def lora(command: F) -> F:
    """What a checkpoint does not store of its LoRA."""
    command = click.option("--rslora", is_flag=True, help="The run scaled LoRA by alpha / sqrt(rank).")(
        command
    )
    return click.option(
        "--lora-alpha",
        multiple=True,
        metavar="[EXPERT=]ALPHA",
        callback=alphas,
        help="LoRA alpha of the training config, where no stock rank or bridge.json tells it. Repeatable.",
    )(command)
