"""A JAX pytree, understood."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bridge.checkpoint.given_sizes import told_sizes
from bridge.checkpoint.kinds import TreeCheckpoint
from bridge.checkpoint.leave_out import NOTHING, without
from bridge.checkpoint.match import Fit, fit_leaves
from bridge.checkpoint.opening import BARE, Opening
from bridge.checkpoint.problems import (
    absent_leaves,
    count_problems,
    dtype_problems,
    factor_problems,
    fit_problems,
    misshapen,
    unknown,
)
from bridge.checkpoint.sizes import Dimension, Numbers, dimensions, fixed_dimensions, located, solve
from bridge.formats.contract import Source
from bridge.rules.factoring import RANK
from bridge.rules.model import Model, Part
from bridge.rules.names import NameIndex, Template
from bridge.rules.rule import Rule


def understand_tree(source: Source, opening: Opening = BARE) -> TreeCheckpoint:
    """Work out which model a pytree is.

    Raises:
        CheckpointRefused: no family's model fits even half of its leaves.
    """
    fit = fit_leaves(source.specs)
    if fit is None:
        raise unknown(source, source.specs)
    left_out = NOTHING
    if opening.leave_out:
        leaves = {name: leaf for leaf, name in fit.leaves.stored.items()}
        source, left_out = without(source, opening.leave_out, _known(fit, leaves), leaves)
        fit = fit_leaves(source.specs) or fit
    stored, model, runtime = fit.leaves.stored, fit.model, fit.family.runtime
    problems = [*fit.leaves.problems, *fit_problems(source, fit, "leaf"), *dtype_problems(source, runtime)]

    index = _index(model)
    places = [(*place, leaf) for leaf in stored if (place := index.find(leaf)) is not None]
    # as declared, so that the first of two that disagree is the same whatever the container's order
    places.sort(key=lambda place: place[0][0])
    numbers = Numbers(model)
    alike: dict[tuple[int, tuple[int, ...]], tuple[Part, tuple[str, ...], list[str]]] = {}
    for (number, part, axes), at, leaf in places:
        shape = source.specs[stored[leaf]].shape
        alike.setdefault((number, shape), (part, axes, []))[2].append(leaf)
        if len(shape) == len(axes):
            numbers.add(part, at)
    seen: list[Dimension] = []
    for (_, shape), (part, axes, paths) in alike.items():
        if len(shape) == len(axes):
            seen += dimensions(model, part, zip(((axis,) for axis in axes), shape, strict=True), paths)
        else:
            problems += misshapen(
                source, paths, shape, axes, f"this is not how {runtime} stores {model.name}"
            )
    counted, gaps = numbers.dimensions()
    sizes, disagreements = solve([*fixed_dimensions(model, runtime, seen), *seen, *counted], model)
    problems += factor_problems(source, fit, sizes)
    if not disagreements:
        problems += located(source, told_sizes(opening, fit.family, model, sizes)[1])
    problems += located(source, [*gaps, *disagreements])
    too_many = count_problems(source, model, sizes)
    problems += too_many or absent_leaves(source, model, stored, sizes)
    return TreeCheckpoint(
        source=source,
        family=fit.family,
        model=model,
        layout=fit.layout,
        stored=stored,
        value_suffix=fit.leaves.suffixed,
        sizes=sizes,
        problems=tuple(problems),
        left_out=left_out,
    )


def _known(fit: Fit, leaves: Mapping[str, str]) -> Callable[[str], str]:
    """What a leaf is to the model that fits best, by its stored name; ``leaves`` has its path by that."""
    index, model = _index(fit.model), fit.model
    paths = (path for rule in model.rules for path in rule.factor_leaves or ())
    factors = NameIndex({Template(path, "/"): None for path in paths}, "/")

    def known(name: str) -> str:
        leaf = leaves.get(name, name)
        if factors.find(leaf) is not None:
            return "is LoRA: --to torch-base writes the model without it"
        return f"{model.name} has" if index.find(leaf) is not None or leaf in model.ignored else ""

    return known


def _index(model: Model) -> NameIndex[tuple[int, Part, tuple[str, ...]]]:
    """What the path of a leaf or of a factor stands for: its place in the table, and its axes."""
    declared: list[tuple[str, Part, tuple[str, ...]]] = []
    for part in model.parts:
        for rule in part.rules:
            declared.append((rule.leaf, part, rule.equation.left))
            declared += ((path, part, axes) for path, axes in _factors(rule))
    return NameIndex(
        {Template(path, "/"): (number, part, axes) for number, (path, part, axes) in enumerate(declared)}, "/"
    )


def _factors(rule: Rule) -> list[tuple[str, tuple[str, ...]]]:
    """The paths of a leaf's factors, each with its axes."""
    if rule.lora is None or rule.factor_leaves is None:
        return []
    axes = rule.factor_axes
    named = (tuple(rule.lora.rank if axis == RANK else axis for axis in side) for side in (axes.a, axes.b))
    return list(zip(rule.factor_leaves, named, strict=True))
