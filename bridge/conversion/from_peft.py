"""Planning an adapter's return to JAX: ranks and scales of the LoRA leaves, and what fits them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.match import Place, place_weights
from bridge.checkpoint.scales import Scale, alpha_problems
from bridge.conversion.outputs import Output
from bridge.errors import CheckpointRefused, Problem, refuse_if
from bridge.publish.atomic import RECORD
from bridge.publish.record import read_record
from bridge.rules.model import Part
from bridge.rules.names import grouped
from bridge.stream.inputs import Inputs
from bridge.stream.readers import Done, ModuleFactors
from bridge.stream.writers import FactorWriter

if TYPE_CHECKING:
    from bridge.conversion.options import Options


def joined_scales(
    inputs: Inputs, options: Options, given: Mapping[str, float], rslora: bool
) -> tuple[dict[str, int], dict[str, Scale], list[Problem]]:
    """Rank and scale of the LoRA leaves of each part.

    A part gets leaves when the adapter touches it or ``--rank`` names it. Its rank is the one
    asked for, else the one it had in openpi if the adapter's ``bridge.json`` knows it, else the
    stock one; alpha likewise.
    """
    recorded = _recorded(inputs.source)
    where = inputs.source.source.location
    asked = options.rank if isinstance(options.rank, Mapping) else {}
    able = {part.name for part in inputs.model.parts if any(rule.lora for rule in part.rules)}
    # LoRA elsewhere is a problem of the adapter's own
    touched = _touched(inputs) & able
    problems = [
        Problem(f"{flag} names {name}, which carries no LoRA", f"name one of {', '.join(sorted(able))}")
        for flag, names in (("--rank", asked), ("--lora-alpha", given))
        for name in names
        if name and name not in able
    ]
    problems += [
        Problem(
            f"{where}: {name} carries LoRA, and openpi has none there",
            "sum it into the weights: --fold (or --to torch-merged)",
        )
        for name in grouped(_beyond(inputs))
    ]
    problems += alpha_problems(given)
    problems += [
        Problem(
            f"{where}: --lora-alpha is given for {name}, which the adapter does not touch",
            f"leave it out, or give it LoRA leaves: --rank {name}=RANK",
        )
        for name in given
        if name in able and name not in touched and name not in asked
    ]
    ranks: dict[str, int] = {}
    scales: dict[str, Scale] = {}
    for part in inputs.model.parts:
        if part.name not in touched and part.name not in asked:
            continue
        known = recorded.get(part.name, {})
        had = int(known["rank"]) if known else None
        rank = asked.get(part.name, options.compress_to or had or _stock_rank(part))
        if rank is None:
            problems.append(
                Problem(
                    f"{where}: the rank that {part.name} should have in openpi is not known",
                    f"add --rank {part.name}=RANK",
                )
            )
            continue
        same = had == rank
        uses_root = rslora or bool(same and known.get("rslora") and part.name not in given)
        alpha, origin = given.get(part.name, given.get("")), "given"
        if alpha is None and same:
            alpha, origin = known.get("alpha"), f"as {RECORD} says"
        if alpha is None:
            alpha, origin = part.stock_alpha.get(rank), f"the stock one for rank {rank}"
        if alpha is None:
            problems.append(
                Problem(
                    f"{where}: {part.name} gets LoRA of rank {rank}, and the alpha that openpi will use is unknown",
                    f"add --lora-alpha {part.name}=ALPHA, as the training config's LoRAConfig will have it",
                )
            )
            continue
        ranks[part.name] = rank
        scales[part.name] = Scale(part.name, rank, float(alpha), uses_root, origin)
    return ranks, scales, problems


def _touched(inputs: Inputs) -> set[str]:
    """Parts whose LoRA leaves the adapter fills."""
    return {place.part.name for place in _places(inputs).values() if place.rule.lora is not None}


def _beyond(inputs: Inputs) -> list[str]:
    """Weights that the adapter changes, and that carry no LoRA in openpi."""
    return [name for name, place in _places(inputs).items() if place.rule.lora is None]


def _places(inputs: Inputs) -> dict[str, Place]:
    layout = inputs.model.layouts[0]
    return place_weights(inputs.model, layout, (layout.rename(name) for name in inputs.source.modules))


def _stock_rank(part: Part) -> int | None:
    return next(iter(part.stock_alpha)) if len(part.stock_alpha) == 1 else None


def _recorded(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """The scales that bridge wrote beside an adapter, by part; empty where there are none."""
    scales = read_record(checkpoint.source.root).get("scales", {})
    try:
        return {
            name: scale
            for name, scale in scales.items()
            if type(scale["rank"]) is int and scale["rank"] > 0 and scale["alpha"] > 0
        }
    except (AttributeError, KeyError, TypeError):
        return {}


def fit_notes(inputs: Inputs, output: Output) -> list[str]:
    """What does not fit openpi's ranks: refused, or with ``--lossy`` its error.

    Reads the modules whose rank is larger than the leaf's.

    Raises:
        CheckpointRefused: factors do not fit, and may not be approximated.
    """
    misfits: dict[str, list[str]] = {}
    errors: dict[str, float] = {}
    for step in output.steps:
        writer = step.writer
        if not isinstance(writer, FactorWriter) or not isinstance(step.factors, ModuleFactors):
            continue
        for index, (read, _, _) in step.factors.modules.items():
            if inputs.spec(read).shape[0] <= writer.rank:
                continue
            matrices = step.factors.matrices(index, inputs.sources, Done(), None)
            assert matrices is not None
            module = read[1].removesuffix(".lora_A.weight")
            why = writer.misfit(step.rule.equation.one, matrices)
            if why is not None and not writer.lossy:
                misfits.setdefault(why, []).append(module)
            elif why is not None:
                errors[module] = writer.fitted(step.rule.equation.one, matrices)[2]
    where = inputs.source.source.location
    refuse_if(
        (
            Problem(
                f"{where}: {name} {why}",
                "fold it: --fold (or --to torch-merged); or approximate it: --lossy, which says the error; "
                "or give openpi a larger --rank",
            )
            for why, modules in misfits.items()
            for name in grouped(modules)
        ),
        CheckpointRefused,
    )
    if not errors:
        return []
    order = sorted(errors, key=lambda name: -errors[name])
    return [
        f"{len(errors)} modules are approximated, relative Frobenius error up to {errors[order[0]]:.2e}",
        *(f"approximated: {name} {errors[name]:.2e}" for name in order),
    ]
