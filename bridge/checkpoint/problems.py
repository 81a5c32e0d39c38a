"""What speaks against a source, once its model is known: names nothing reads, factors without their twin."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bridge.arrays import WEIGHT_DTYPES
from bridge.checkpoint.leaves import Tree
from bridge.checkpoint.match import Fit
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.formats.safetensors.header import MAX_TENSORS
from bridge.rules.model import Model
from bridge.rules.names import grouped


def fit_problems(source: Source, fit: Fit, kind: str) -> list[Problem]:
    """Names that are missing, and names that no rule reads. `kind` is what a name stands for."""
    problems = [
        Problem(
            f"{source.location}: {kind} {name} of {fit.model.name} is missing",
            "copy the checkpoint again, or take it from its source",
        )
        for name in fit.missing
    ]
    problems += [
        Problem(
            f"{source.location}: {kind} {name} is read by no rule of {fit.model.name}",
            "it would be lost: remove it, or declare it in an adapter",
        )
        for name in fit.extra
    ]
    return problems


def dtype_problems(source: Source) -> list[Problem]:
    """Arrays that are no weights: of another dtype, or without elements."""
    by_dtype: dict[str, list[str]] = {}
    for name, spec in source.specs.items():
        if spec.dtype.name not in WEIGHT_DTYPES:
            by_dtype.setdefault(spec.dtype.name, []).append(name)
    return [
        Problem(
            f"{source.location}: {name} has dtype {dtype}",
            f"openpi's weights are {', '.join(WEIGHT_DTYPES)}: save the checkpoint in one of them",
        )
        for dtype, names in by_dtype.items()
        for name in grouped(names)
    ] + [
        Problem(
            f"{source.location}: {name} has shape {list(spec.shape)}, no element at all",
            "take the checkpoint from its source again",
        )
        for name, spec in source.specs.items()
        if spec.size == 0
    ]


def factor_problems(source: Source, model: Model, tree: Tree) -> list[Problem]:
    """Factors without their twin, and leaves left without factors where their group has them."""
    problems = []
    for part in model.parts:
        groups: dict[str, dict[bool, list[str]]] = {}
        for rule in part.rules:
            if rule.factor_leaves is None or rule.lora is None:
                continue
            there = [leaf in tree.stored for leaf in rule.factor_leaves]
            if any(there) and not all(there):
                have, lack = rule.factor_leaves if there[0] else reversed(rule.factor_leaves)
                problems.append(
                    Problem(
                        f"{source.location}: {have} is there, and its twin {lack} is not",
                        "copy the checkpoint again, or take it from its source",
                    )
                )
            else:
                groups.setdefault(rule.lora.rank, {}).setdefault(all(there), []).append(rule.leaf)
        for group in groups.values():
            if len(group) == 2:
                problems += [
                    Problem(
                        f"{source.location}: {leaf} has no LoRA factors, and {group[True][0]} has",
                        "openpi gives factors to all of them or none: take the checkpoint from its source again",
                    )
                    for leaf in group[False]
                ]
    return problems


def count_problems(source: Source, model: Model, sizes: Mapping[str, int]) -> list[Problem]:
    """Rules of so many weights that nothing but their names would fill the memory."""
    counts = {
        rule.leaf: math.prod(
            sizes.get(model.qualified(part.name, axis), 1) for axis in rule.equation.placeholders
        )
        for part in model.parts
        for rule in part.rules
    }
    return [
        Problem(
            f"{source.location}: {leaf} would be {count} weights, more than {MAX_TENSORS}",
            f"no {model.name} has so many layers: take the checkpoint from its source again",
        )
        for leaf, count in counts.items()
        if count > MAX_TENSORS
    ]


def absence_problems(
    source: Source, fit: Fit, stored: Mapping[str, str], sizes: Mapping[str, int]
) -> list[Problem]:
    """Weights of single layers that are not there, once the number of layers is known."""
    absent = []
    for part in fit.model.parts:
        local = fit.model.local_sizes(part.name, sizes)
        for rule in part.rules:
            for _, name in rule.weights(local):
                if name not in stored:
                    absent.append(name)
    return [
        Problem(
            f"{source.location}: {name} is missing", "copy the checkpoint again, or take it from its source"
        )
        for name in grouped(absent)
    ]
