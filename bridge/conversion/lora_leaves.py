"""Planning an adapter's return to JAX: ranks and scales of the LoRA leaves, and what fits them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bridge.checkpoint.inputs import Inputs
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.checkpoint.options import alphas_of
from bridge.checkpoint.scales import alpha_problems, recorded_scales
from bridge.checkpoint.sizes import recorded_sizes
from bridge.conversion.options import Options, compress_to
from bridge.errors import CheckpointRefused, Problem, refuse_if
from bridge.lora.factors import Scale
from bridge.publish.record import RECORD
from bridge.rules.model import Model, Part
from bridge.rules.names import grouped
from bridge.rules.rule import Rule
from bridge.stream.factor_writers import FactorWriter
from bridge.stream.output import Output
from bridge.stream.readers import Done


def joined_scales(inputs: Inputs, options: Options) -> tuple[dict[str, int], dict[str, Scale], list[Problem]]:
    """Rank and scale of the LoRA leaves of each part.

    A part gets leaves when the adapter touches it or ``--rank`` names it. Its rank is the one
    asked for, else the rank it had in JAX if the adapter's ``bridge.json`` records it, else the
    stock rank; alpha likewise, where the runtime scales the part's factors.
    """
    given, rslora = alphas_of(options), options["rslora"]
    if isinstance(inputs.source, AdapterCheckpoint) and inputs.source.alphas_given:
        # they are those of the run that trained it, which are in the scale of every module
        given, rslora = {}, False
    root = inputs.source.source.root
    recorded, runtime = recorded_scales(root), inputs.weights.family.runtime
    where = inputs.source.source.location
    rank_option = options["rank"]
    asked = rank_option if isinstance(rank_option, Mapping) else {}
    able = {part.name for part in inputs.model.parts if any(rule.lora for rule in part.rules)}
    touched = _touched(inputs) & able
    problems = [
        Problem(f"{flag} names {name}, which cannot carry LoRA", f"name one of {', '.join(sorted(able))}")
        for flag, names in (("--rank", asked), ("--lora-alpha", given))
        for name in names
        if name and name not in able
    ]
    problems += _unheld(inputs, touched or asked.keys() & able)
    problems += alpha_problems(given)
    problems += [
        Problem(
            f"{where}: --lora-alpha names {name}, which the adapter does not touch",
            f"leave it out, or give it LoRA leaves: --rank {name}=RANK",
        )
        for name in given
        if name in able and name not in touched and name not in asked
    ]
    parts = [part for part in inputs.model.parts if part.name in touched or part.name in asked]
    problems += _unscaled_problems(inputs, parts, options)
    ranks: dict[str, int] = {}
    scales: dict[str, Scale] = {}
    for part in parts:
        known = recorded.get(part.name, {})
        had = int(known["rank"]) if known else _recorded_rank(inputs.model, part, recorded_sizes(root))
        rank = asked.get(part.name, compress_to(options) or had or _stock_rank(part))
        if rank is None:
            problems.append(
                Problem(
                    f"{where}: the rank {part.name} should have in {runtime} is unknown",
                    f"add --rank {part.name}=RANK",
                )
            )
            continue
        if not part.scaled:
            ranks[part.name] = rank
            continue
        same = had == rank
        uses_root = rslora or bool(same and known.get("rslora") and part.name not in given)
        alpha, origin = given.get(part.name, given.get("")), "given"
        if alpha is None and same:
            alpha, origin = known.get("alpha"), f"from {RECORD}"
        if alpha is None:
            alpha, origin = part.stock_alpha.get(rank), f"stock for rank {rank}"
        if alpha is None:
            problems.append(
                Problem(
                    f"{where}: {part.name} gets LoRA of rank {rank}, but the alpha {runtime} will use is unknown",
                    f"add --lora-alpha {part.name}=ALPHA, as the training config will have it",
                )
            )
            continue
        ranks[part.name] = rank
        scales[part.name] = Scale(
            part=part.name, rank=rank, alpha=float(alpha), rslora=uses_root, origin=origin
        )
    return ranks, scales, problems


def _unheld(inputs: Inputs, parts: Collection[str]) -> list[Problem]:
    """Factors that become neither leaves nor a part of a weight.

    Args:
        inputs: an adapter and its base.
        parts: that get LoRA leaves.
    """
    where, runtime = inputs.source.source.location, inputs.weights.family.runtime
    beyond = without_leaves(inputs)
    # summed into it, the change would reach the weight's other use, where the adapter makes none
    tied = [name for name in beyond if name in inputs.model.tied.values()]
    problems = [
        Problem(
            f"{where}: {name} has LoRA factors, but {runtime} ties this weight to another and has no LoRA for it",
            "sum it into the weight under both names: --fold (or --to torch-merged)",
        )
        for name in grouped(tied)
    ]
    if beyond and not parts:
        problems.append(
            Problem(
                f"{where}: {runtime} has no LoRA for any of the {len(beyond)} weights that the adapter changes",
                "sum it into the weights: --fold (or --to torch-merged)",
            )
        )
    return problems


def _unscaled_problems(inputs: Inputs, parts: Sequence[Part], options: Options) -> list[Problem]:
    """Alphas that the runtime has no use for."""
    where, runtime = inputs.source.source.location, inputs.weights.family.runtime
    given = alphas_of(options)
    problems = [
        Problem(
            f"{where}: --lora-alpha names {part.name}, whose LoRA factors {runtime} never scales",
            "leave it out",
        )
        for part in parts
        if part.name in given and not part.scaled
    ]
    flag = "--lora-alpha" if "" in given else "--rslora" if options["rslora"] else ""
    if flag and parts and not any(part.scaled for part in parts):
        problems.append(
            Problem(f"{where}: {flag} is given, but {runtime} never scales LoRA factors", f"leave {flag} out")
        )
    return problems


def _recorded_rank(model: Model, part: Part, sizes: Mapping[str, int]) -> int | None:
    """The rank of a part's factors among recorded sizes, where all have one."""
    ranks = {sizes.get(model.qualified(part.name, rule.lora.rank)) for rule in part.rules if rule.lora}
    return ranks.pop() if len(ranks) == 1 else None


def _touched(inputs: Inputs) -> set[str]:
    """Parts whose LoRA leaves the adapter fills."""
    return {part.name for part, rule in _places(inputs).values() if rule.lora is not None}


def without_leaves(inputs: Inputs) -> list[str]:
    """Weights that the adapter changes, and that carry no LoRA in the JAX runtime."""
    return [name for name, (_, rule) in _places(inputs).items() if rule.lora is None]


def _places(inputs: Inputs) -> dict[str, tuple[Part, Rule]]:
    places = ((name, inputs.model.weight_index.find(name)) for name in inputs.source.modules)
    return {name: place[0] for name, place in places if place is not None}


def _stock_rank(part: Part) -> int | None:
    return next(iter(part.stock_alpha)) if len(part.stock_alpha) == 1 else None


def start_notes(inputs: Inputs, output: Output, seed: int) -> list[str]:
    """A note on the modules and ranks that the source lacks."""
    absent = padded = 0
    starts: dict[str, None] = {}
    for step, writer in output.steps_of(FactorWriter):
        reader = step.factors
        assert reader is not None
        ranks = [reader.rank(step.rule, index, inputs.sources) for index in writer.indices()]
        absent += ranks.count(0)
        padded += sum(0 < rank < writer.rank for rank in ranks)
        if min(ranks) < writer.rank:
            starts[str(writer.start)] = None
    if not starts:
        return []
    lacks = [f"{absent} modules"] * bool(absent) + [f"the upper ranks of {padded} modules"] * bool(padded)
    return [
        f"{' and '.join(lacks)} have no factors in the source: the first is drawn from {', '.join(starts)} "
        f"(--seed {seed}), the second is zero, so that they train and change no output"
    ]


def summed_notes(inputs: Inputs) -> list[str]:
    """Notes on the weights that an adapter's factors are summed into, for want of LoRA leaves."""
    beyond = without_leaves(inputs)
    if not beyond:
        return []
    runtime = inputs.weights.family.runtime
    return [
        f"{runtime} has no LoRA for {len(beyond)} weights that the adapter changes: the change is summed into them",
        *(f"summed into {name}" for name in grouped(beyond)),
    ]


def fit_notes(inputs: Inputs, output: Output) -> list[str]:
    """What does not fit the ranks of the LoRA leaves: refused, or with ``--lossy`` its error.

    Reads the modules whose rank is larger than the leaf's.

    Raises:
        CheckpointRefused: factors do not fit, and may not be approximated.
    """
    misfits: dict[str, list[str]] = {}
    errors: dict[str, float] = {}
    for step, writer in output.steps_of(FactorWriter):
        if step.factors is None:
            continue
        ranks = {index: step.factors.rank(step.rule, index, inputs.sources) for index in writer.indices()}
        change_at = step.factors.open(step.rule, inputs.sources, Done(), None)
        for group in writer.groups():
            if sum(ranks[index] for index in group) <= writer.rank:
                continue
            changes = {i: change for i in group if (change := change_at(i)) is not None}
            modules = [
                step.factors.labels(step.rule, index)[0][0].removesuffix(".lora_A.weight")
                for index in changes
            ]
            why = writer.misfit(changes) if changes else None
            if why is not None and not writer.lossy:
                misfits.setdefault(why, []).extend(modules)
            elif why is not None:
                error = writer.fitted(changes)[1]
                errors |= {module: max(error, errors.get(module, 0.0)) for module in modules}
    where = inputs.source.source.location
    refuse_if(
        (
            Problem(
                f"{where}: {name} {why}",
                "merge it into the weights with --fold (or --to torch-merged); or approximate it with --lossy, "
                "which reports the error; or give the leaves a larger --rank",
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
