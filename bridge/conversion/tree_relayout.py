"""Planning a JAX pytree with LoRA leaves from one: other suffix or dtype, padded or compressed ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from bridge.arrays import Spec
from bridge.checkpoint.inputs import Inputs
from bridge.checkpoint.options import alphas_of
from bridge.checkpoint.scales import scales
from bridge.conversion.lora_leaves import fit_notes, start_notes
from bridge.conversion.options import Options
from bridge.conversion.request import Built, Request
from bridge.conversion.to_pytree import factor_step, pytree_output, stored_name, weight_step
from bridge.errors import Problem
from bridge.graph import Loss
from bridge.lora.factors import Scale
from bridge.rules.model import Bound, Part
from bridge.rules.rule import Rule
from bridge.stream.readers import LeafWeights
from bridge.stream.step import Step
from bridge.stream.writers import LeafWriter


def relaid_scales(inputs: Inputs, options: Options) -> tuple[dict[str, int], dict[str, Scale], list[Problem]]:
    """Ranks that change, and the scales of all LoRA leaves once they have.

    A stock rank has the stock alpha, which the runtime's own configs give it; any other keeps the
    scale that the factors have now, and the alpha that follows is reported.
    """
    source = inputs.source
    own, problems = scales(source, alphas_of(options), options["rslora"])
    carrying = {part.name: part for part, _ in source.lora_rules()}
    asked = options["rank"]
    ranks = dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(carrying, asked) if asked else {}
    problems += [
        Problem(
            f"{source.source.location}: --rank names {name}, which has no LoRA factors to change",
            f"name one of {', '.join(carrying)}",
        )
        for name in ranks
        if name not in carrying
    ]
    return (
        ranks,
        {name: _ranked(scale, carrying[name], ranks.get(name)) for name, scale in own.items()},
        problems,
    )


def _ranked(scale: Scale, part: Part, rank: int | None) -> Scale:
    if rank is None or rank == scale.rank:
        return scale
    alpha, origin = part.stock_alpha.get(rank), f"stock for rank {rank}"
    if alpha is None or scale.rslora:
        alpha, origin = (
            scale.value * (math.sqrt(rank) if scale.rslora else rank),
            "keeps the scale: train with it",
        )
    return replace(scale, rank=rank, alpha=alpha, origin=origin)


def build_relaid_tree(request: Request) -> Built:
    """Every leaf, and every factor: as it is where its rank stays."""
    inputs, source = request.inputs, request.inputs.source
    own, _ = scales(source, alphas_of(request.options), request.options["rslora"])
    carrying = {rule.leaf for _, rule in source.lora_rules()}
    steps: list[Step] = []
    ranked: list[Step] = []
    for bound in inputs.bound():
        steps.append(weight_step(request, bound, None))
        if bound.rule.leaf not in carrying:
            continue
        rank = request.ranks.get(bound.part.name)
        if rank is None or rank == source.rank(bound.part, bound.rule):
            steps += _copies(request, bound)
            continue
        factors = source.factor_reader("source", bound, own.get(bound.part.name))
        assert factors is not None
        ranked.append(factor_step(request, bound, factors, rank))
    output = pytree_output(request, [*steps, *ranked])
    approximated = fit_notes(inputs, output)
    started = start_notes(inputs, output, request.options["seed"])
    loss = Loss.ROUNDED if approximated else Loss.EQUIVALENT if ranked else Loss.EXACT
    return Built(outputs=(output,), notes=(*started, *approximated), loss=loss, read_scales=own)


def _copies(request: Request, bound: Bound) -> Iterator[Step]:
    """Both factors of a leaf, as they are."""
    source = request.inputs.source
    for leaf in bound.rule.factor_leaves or ():
        stored = source.spec(leaf)
        rule = Rule.copying(leaf, len(stored.shape))
        copied = Bound(bound.part, rule, dict(zip(rule.equation.left, stored.shape, strict=True)))
        spec = Spec(stored.shape, request.factor_dtype(stored.dtype))
        writer = LeafWriter(stored_name(request, leaf), spec)
        yield request.step(copied, LeafWeights("source", source.stored[leaf]), None, writer, stored)
