"""Sizes that a user gives, by ``--size`` and ``--config``, against a model's axes and its arrays' shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge.checkpoint.opening import Opening
from bridge.checkpoint.sizes import Dimension, axes_of, choices, fitting_sizes, open_axes, solve
from bridge.errors import Problem
from bridge.rules.family import Family
from bridge.rules.model import Model

#: values listed in a message
SHOWN = 8


def told_sizes(
    opening: Opening, family: Family, model: Model, sizes: Mapping[str, int]
) -> tuple[dict[str, int], list[Problem]]:
    """The sizes given, by canonical axis, and what is wrong with them.

    Args:
        opening: what the user gave; ``--size`` goes before ``--config``.
        family: reads the config.
        model: has the axes.
        sizes: that the shapes tell, which decide.
    """
    axes = axes_of(model)
    told: dict[str, int] = {}
    problems = []
    for name, size in opening.sizes.items():
        axis = model.canonical.get(name, name)
        if axis not in axes:
            open_ones = open_axes(model, sizes)
            problems.append(
                Problem(
                    f"--size names {name}, and {model.name} has no such axis",
                    f"name one of {', '.join(open_ones or sorted(axes))}",
                )
            )
        elif sizes.get(axis, size) != size:
            problems.append(
                Problem(
                    f"--size {name}={size}, but {axis} is {sizes[axis]} in the arrays of the checkpoint",
                    f"leave --size {name} out: the shapes tell it",
                )
            )
        elif told.setdefault(axis, size) != size:
            problems.append(
                Problem(f"--size gives {axis} twice: {told[axis]} and {size}", "give one size for each axis")
            )
    if opening.config is None:
        return told, problems
    read = family.known_sizes(opening.config) if family.known_sizes is not None else {}
    named = {model.canonical.get(axis, axis): size for axis, size in read.items()}
    where = f"--config {opening.config_path}"
    if not axes & named.keys():
        problems.append(
            Problem(f"{where} tells no size of {model.name}", "give the config.json of this model")
        )
    problems += [
        Problem(
            f"{where}: {axis} is {size}, but {sizes[axis]} in the arrays of the checkpoint",
            "give the config.json of this very model, or single sizes with --size",
        )
        for axis, size in named.items()
        if sizes.get(axis, size) != size and axis in axes
    ]
    return {axis: size for axis, size in named.items() if axis in axes} | told, problems


def contradictions(
    opening: Opening,
    known: Mapping[str, int],
    seen: Sequence[Dimension],
    model: Model,
    sizes: Mapping[str, int],
) -> list[Problem]:
    """Sizes given for axes that shapes leave open, where the shapes do not allow them."""
    problems = []
    for axis, size in known.items():
        if not solve(seen, model, {axis: size})[1]:
            continue
        given = (
            f"--size {axis}={size}" if axis in _named(opening, model) else f"--config says {axis} is {size}"
        )
        fix = f"give {flags({axis: fitting_sizes(seen, model, sizes, axis)})}"
        problems.append(Problem(f"{given}, which the shapes do not allow", fix))
    if not problems:
        given = ", ".join(f"{axis} {size}" for axis, size in known.items())
        problems = [
            Problem(
                f"--size and --config give {given}, which the shapes do not allow together",
                f"give {flags(choices(seen, model, sizes))}",
            )
        ]
    return problems


def _named(opening: Opening, model: Model) -> set[str]:
    return {model.canonical.get(name, name) for name in opening.sizes}


def flags(allowed: Mapping[str, Sequence[int]]) -> str:
    """The flags that give sizes, with the values that shapes allow."""
    return " and ".join(f"--size {axis}=N (N {_values(values)})" for axis, values in allowed.items())


def _values(values: Sequence[int]) -> str:
    if len(values) == 1:
        return f"{values[0]}"
    shown = [*map(str, values[:SHOWN])] if len(values) > SHOWN else [*map(str, values[:-1])]
    return f"{', '.join(shown)} or {f'up to {values[-1]}' if len(values) > SHOWN else values[-1]}"
