"""Dimensions of a model, worked out from the shapes in a checkpoint.

Every dimension of every array is one equation: the product of its axes is its length. Leaves
give one axis each; weights give groups (``(head dim)``), solved once all but one axis is known.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bridge.errors import Problem
from bridge.rules.model import Model


@dataclass(frozen=True)
class Seen:
    """One dimension of one stored array: the product of ``axes`` is ``length``."""

    axes: tuple[str, ...]
    """Qualified and canonical."""
    length: int
    where: str
    """The array, for messages."""


def solve(
    seen: Iterable[Seen], model: Model, known: Mapping[str, int] | None = None
) -> tuple[dict[str, int], list[Problem]]:
    """Find the size of every axis, and every array that disagrees.

    Where arrays disagree, the size most of them have is taken for the true one, so that the
    message names the odd one out.

    Args:
        seen: every dimension of every array.
        model: for the relations that its architecture fixes.
        known: sizes from elsewhere (a config), by canonical axis.

    Returns:
        Sizes by canonical axis (axes that no equation fixes are absent), and the problems.
    """
    votes: defaultdict[str, list[Seen]] = defaultdict(list)
    groups: list[Seen] = []
    for one in seen:
        if len(one.axes) == 1:
            votes[one.axes[0]].append(one)
        else:
            groups.append(one)

    sizes = dict(known or {})
    problems: list[Problem] = []
    for axis, members in votes.items():
        if axis not in sizes:
            sizes[axis] = Counter(one.length for one in members).most_common(1)[0][0]
        agree = next((one.where for one in members if one.length == sizes[axis]), "the config")
        problems += [_disagree(axis, one, sizes[axis], agree) for one in members if one.length != sizes[axis]]

    unsolved = groups
    while True:
        later: list[Seen] = []
        for one in unsolved:
            unknown = [axis for axis in one.axes if axis not in sizes]
            rest = math.prod(sizes[axis] for axis in one.axes if axis in sizes)
            if not unknown and rest != one.length:
                problems.append(_disagree(" x ".join(one.axes), one, rest, "the other tensors"))
            elif len(unknown) == 1 and rest > 0 and one.length % rest == 0:
                sizes[unknown[0]] = one.length // rest
            elif len(unknown) == 1:
                problems.append(_indivisible(one, rest))
            elif unknown:
                later.append(one)
        if len(later) == len(unsolved):
            break
        unsolved = later

    # a product none of whose axes is known has one length all the same
    products: defaultdict[tuple[str, ...], list[Seen]] = defaultdict(list)
    for one in unsolved:
        products[one.axes].append(one)
    for axes, members in products.items():
        length = Counter(one.length for one in members).most_common(1)[0][0]
        agree = next(one.where for one in members if one.length == length)
        problems += [
            _disagree(" x ".join(axes), one, length, agree) for one in members if one.length != length
        ]

    for multiple in model.multiples:
        axis, of = (
            model.canonical.get(multiple.axis, multiple.axis),
            model.canonical.get(multiple.of, multiple.of),
        )
        if axis in sizes and of in sizes and sizes[axis] != multiple.factor * sizes[of]:
            problems.append(
                Problem(
                    f"{axis} is {sizes[axis]}, and must be {multiple.factor} x {of}, which is {sizes[of]}",
                    f"no {model.name} has these dimensions: take the checkpoint from its source again",
                )
            )
    return sizes, problems


def _indivisible(one: Seen, rest: int) -> Problem:
    return Problem(
        f"{one.where}: {' x '.join(one.axes)} is {one.length}, which is no multiple of {rest} in the other tensors",
        "the checkpoint mixes models of different dimensions: take it from its source again",
    )


def _disagree(axis: str, one: Seen, expected: int, agree: str) -> Problem:
    return Problem(
        f"{one.where}: {axis} is {one.length}, but {expected} in {agree}",
        "the checkpoint mixes models of different dimensions: take it from its source again",
    )
