"""What an adapter has lost: modules that its config or its record names and its file lacks.

PEFT loads such a file with a warning and leaves those modules as it initialised them: LoRA without
effect, and the base's own weights for ``modules_to_save``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Set

from bridge.checkpoint.adapter_model import Match
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.sizes import Numbers, fixed_dimensions, solve
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.formats.safetensors.peft import CONFIG, FILE
from bridge.peft.config import PREFIX, A, AdapterConfig, B, module_of
from bridge.publish.record import RECORD, read_record
from bridge.rules.model import Bound
from bridge.rules.names import grouped
from bridge.rules.rule import Rule

RESTORE = f"restore the {FILE} that was saved with this config"


def lost_problems(
    source: Source, config: AdapterConfig, match: Match, base: Checkpoint | None
) -> list[Problem]:
    """Modules that must be in an adapter and are not.

    Args:
        source: the adapter.
        config: its config.
        match: the model it is of.
        base: what it applies to, which tells how many layers there are; else the adapter's own names do.
    """
    names, where = source.specs.keys(), source.location
    bounds = base.bound() if base is not None else _bounds(match)
    problems = _unrecorded(source, names)
    try:
        lost, unsaved = _lost(names, config, match, bounds)
    except TimeoutError:
        cause = f"{where}/{CONFIG}: matching its patterns {config.clock.spent}"
        return [*problems, Problem(cause, RESTORE)]
    problems += [
        Problem(
            f"{where}: {CONFIG} gives LoRA to {name}, but {FILE} has no factors of it",
            f"{RESTORE}; if they were never trained, target_modules must name the others alone",
        )
        for name in grouped(lost)
    ]
    problems += [
        Problem(f"{where}: modules_to_save names {name}, but {FILE} does not have it", RESTORE)
        for name in grouped(dict.fromkeys((*unsaved, *_unsaved_names(names, config, unsaved))))
    ]
    return problems


def _lost(
    names: Set[str], config: AdapterConfig, match: Match, bounds: Iterable[Bound]
) -> tuple[list[str], list[str]]:
    """Modules without factors, and weights that were to be saved whole. Raises TimeoutError."""
    lost, unsaved = [], []
    for bound in bounds:
        linear = _is_linear(bound.rule)
        for name in bound.names.values():
            weight = match.layout.rename(name)
            module = module_of(weight)
            if config.saves(module):
                if PREFIX + weight not in names:
                    unsaved.append(weight)
            elif (
                linear
                and not {f"{PREFIX}{module}{A}", f"{PREFIX}{module}{B}"} & names
                and config.applies(module)
            ):
                lost.append(module)
    return lost, unsaved


def _is_linear(rule: Rule) -> bool:
    """Whether a rule's weights are those of linear layers, which patterns may select.

    A matrix that JAX keeps the same way round is a table: an embedding, or a head tied to one.
    """
    equation = rule.equation.of_weight
    return len(equation.right) == 2 and (rule.lora is not None or equation.left != equation.weight_axes)


def _unsaved_names(names: Iterable[str], config: AdapterConfig, unsaved: Iterable[str]) -> list[str]:
    """Entries of ``modules_to_save`` of which the file has nothing, and no known weight was named above."""
    if not config.modules_to_save:
        return []
    whole = {module_of(name) for name in names if not name.endswith((A, B))} | {
        module_of(name) for name in unsaved
    }
    paths = {path for module in whole for path in itertools.accumulate(module.split("."), "{}.{}".format)}
    return [name for name in config.modules_to_save if not any(path.endswith(name) for path in paths)]


def _unrecorded(source: Source, names: Set[str]) -> list[Problem]:
    """Tensors that bridge wrote, by its record, and that are gone."""
    recorded = read_record(source.root).get("tensors")
    if not isinstance(recorded, dict):
        return []
    return [
        Problem(
            f"{source.location}: {RECORD} lists {name}, which is missing",
            f"restore {FILE} from a copy; if another program saved the adapter anew, move {RECORD} elsewhere",
        )
        # a base that it was saved with has a record of its own
        for name in grouped(name for name in recorded if name.startswith(PREFIX) and name not in names)
    ]


def _bounds(match: Match) -> Iterable[Bound]:
    """Every leaf of a model with as many layers as an adapter's names number."""
    numbers = Numbers(match.model)
    for place in match.places.values():
        numbers.add(place.part, {axis: place.at[axis] for axis in place.rule.template.numbered})
    counted, _ = numbers.dimensions()
    sizes, _ = solve([*fixed_dimensions(match.model, "", ()), *counted], match.model)
    return match.model.bind(sizes)
