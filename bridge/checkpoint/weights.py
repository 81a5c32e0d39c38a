"""A PyTorch state_dict, understood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from bridge.checkpoint.given_sizes import contradictions, told_sizes
from bridge.checkpoint.kinds import WeightsCheckpoint
from bridge.checkpoint.match import Fit, Place, fit_weights, place_weights
from bridge.checkpoint.opening import BARE, Opening
from bridge.checkpoint.problems import (
    absence_problems,
    count_problems,
    dtype_problems,
    fit_problems,
    misshapen,
    unknown,
)
from bridge.checkpoint.sizes import (
    Dimension,
    Numbers,
    axes_of,
    choices,
    dimensions,
    fixed_dimensions,
    located,
    recorded_sizes,
    solve,
)
from bridge.display import with_article
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.formats.view import View
from bridge.publish.record import RECORD
from bridge.rules.names import Names


def understand_weights(
    source: Source, opening: Opening = BARE, fits: list[Fit] | None = None
) -> WeightsCheckpoint:
    """Work out which model a state_dict is of, whose names are those of a model alone.

    Args:
        source: the state_dict.
        opening: what its path does not tell.
        fits: the models that its names fit, where that is known.

    Raises:
        CheckpointRefused: no family's model fits even half of its weights.
    """
    names = Names.of(source.specs)
    fits = fit_weights(names) if fits is None else fits
    if not fits:
        raise unknown(source, source.specs)
    # models whose PyTorch names are the same differ in shapes; that of fewer leaves is the special case
    read = [_as_weights(source, names, fit, opening) for fit in fits]
    best, faults = min(read, key=lambda each: (len(each[0].problems), len(list(each[0].model.rules))))
    return replace(best, problems=(*best.problems, *faults))


def _as_weights(
    source: Source, names: Names, fit: Fit, opening: Opening
) -> tuple[WeightsCheckpoint, list[Problem]]:
    """A state_dict as one of a model, and what is wrong with the sizes that the user gave."""
    model, runtime, specs = fit.model, fit.family.runtime, source.specs
    problems = fit_problems(source, fit, "tensor") + dtype_problems(source, runtime)
    # a tied weight may be stored under its alias, or under both names
    renamed: dict[str, str] = {}
    stored: dict[str, str] = {}
    for alias, of in model.tied.items():
        name, kept = fit.layout.rename(alias), fit.layout.rename(of)
        if name in source.specs and name != kept:
            if kept not in source.specs or alias in model.applied:
                renamed[kept] = name
            elif of not in model.applied:
                stored[alias] = name
    numbers = Numbers(model)
    counts = Counter[str]()
    alike: dict[tuple[str, tuple[int, ...]], tuple[Place, list[str]]] = {}
    for effective, place in place_weights(model, fit.layout, names.and_of(renamed)).items():
        name = renamed.get(effective, effective)
        stored[place.weight] = name
        counts[place.rule.weight] += 1
        shape = specs[name].shape
        alike.setdefault((place.rule.weight, shape), (place, []))[1].append(name)
        if len(shape) == len(place.rule.equation.right):
            numbers.add(place.part, {axis: place.at[axis] for axis in place.rule.template.numbered})
    seen: list[Dimension] = []
    for (_, shape), (place, arrays) in alike.items():
        groups = place.rule.equation.right
        if len(shape) == len(groups):
            seen += dimensions(model, place.part, zip(groups, shape, strict=True), arrays)
        else:
            axes = tuple(" x ".join(group) for group in groups)
            problems += misshapen(
                source, arrays, shape, axes, f"this is not {with_article(model.name)} checkpoint"
            )
    counted, gaps = numbers.dimensions()
    seen = [*fixed_dimensions(model, runtime, seen), *seen, *counted]
    sizes, disagreements, faults = _solve(source, fit, seen, opening)
    problems += located(source, [*gaps, *disagreements])
    too_many = count_problems(source, model, sizes)
    problems += too_many or absence_problems(source, model, stored, sizes, counts)
    doubts, notes = ([], []) if problems else _config_doubts(source, fit, seen, opening)
    problems += located(source, doubts)
    weights = WeightsCheckpoint(
        source=View.of(source, {name: name for name in source.specs}, *notes) if notes else source,
        family=fit.family,
        model=model,
        layout=fit.layout,
        stored=stored,
        sizes=sizes,
        problems=tuple(problems),
        choices={} if problems else choices(seen, model, sizes),
    )
    return weights, located(source, faults)


def _solve(
    source: Source, fit: Fit, seen: list[Dimension], opening: Opening
) -> tuple[dict[str, int], list[Problem], list[Problem]]:
    """Sizes from tensors, and what they leave open (heads) from the user, a config or the stock models.

    Returns:
        The sizes, the tensors that disagree, and what is wrong with the sizes given.
    """
    model, beside = fit.model, source.metadata.get("config.json")
    sizes, problems = solve(seen, model)
    if problems:
        return sizes, problems, []
    told, faults = told_sizes(opening, fit.family, model, sizes)
    known = {axis: size for axis, size in told.items() if axis not in sizes}
    solved, trouble = solve(seen, model, known)
    if trouble:
        return sizes, [], [*faults, *contradictions(opening, known, seen, model, sizes)]
    sizes = solved
    axes = axes_of(model)
    config = fit.family.known_sizes(beside) if fit.family.known_sizes and isinstance(beside, dict) else {}
    for more in (recorded_sizes(source.root), config, model.stock):
        named = {model.canonical.get(axis, axis): size for axis, size in more.items()}
        more = known | {axis: size for axis, size in named.items() if axis in axes - sizes.keys()}
        solved, trouble = solve(seen, model, more)
        # what contradicts the tensors is not theirs: a config of another model, no stock model
        if not trouble:
            sizes, known = solved, more
    return sizes, [], faults


def _config_doubts(
    source: Source, fit: Fit, seen: list[Dimension], opening: Opening
) -> tuple[list[Problem], list[str]]:
    """Sizes that tensors leave open, and that a ``config.json`` gives as nobody else does.

    Returns:
        Problems: bridge recorded another beside the weights. Notes: the stock model, which fits, has another.
    """
    model, beside = fit.model, source.metadata.get("config.json")
    if fit.family.known_sizes is None or not isinstance(beside, dict):
        return [], []
    sizes, _ = solve(seen, model)
    told, _ = told_sizes(opening, fit.family, model, sizes)
    undecided = axes_of(model) - sizes.keys() - told.keys()

    def of_these(known: Mapping[str, int]) -> dict[str, int]:
        named = {model.canonical.get(axis, axis): size for axis, size in known.items()}
        return {axis: size for axis, size in named.items() if axis in undecided}

    config, record = of_these(fit.family.known_sizes(beside)), of_these(recorded_sizes(source.root))
    if solve(seen, model, config)[1]:
        return (
            [],
            [],
        )  # a config of other sizes than the tensors have, such as a stock variant's name, is not used
    stock = of_these(model.stock)
    problems = [
        Problem(
            f"config.json has {axis} {size}, and {RECORD} {record[axis]}",
            f"restore the config.json that was written with the weights, or add --size {axis}=N",
        )
        for axis, size in config.items()
        if record.get(axis, size) != size
    ]
    fits = not solve(seen, model, stock)[1]
    return problems, [
        f"config.json has {axis} {size}; the {model.name} whose other sizes are these has {stock[axis]}"
        for axis, size in config.items()
        if fits and axis not in record and stock.get(axis, size) != size
    ]
