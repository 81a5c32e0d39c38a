"""Dimensions of a model, worked out from the shapes in a checkpoint.

Every dimension of every array is an equation: the product of its axes is its length. A leaf's
dimensions are single axes; a weight's may be groups (``(head dim)``), solved once all but one of
their axes are known.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bridge.display import with_article
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.formats.disk.location import Location
from bridge.publish.record import read_record
from bridge.rules.equation import UNIT
from bridge.rules.model import Model, Part
from bridge.rules.names import grouped

#: layers that may be missing below the highest before the number itself is taken for the fault
MAX_GAP = 1000


@dataclass(frozen=True)
class Dimension:
    """One dimension of a stored array: the product of ``axes`` is ``length``."""

    axes: tuple[str, ...]
    """Qualified and canonical."""
    length: int
    where: str
    """The array, for messages."""
    alike: tuple[str, ...] = ()
    """Further arrays of which the same is true, so that a thousand layers are one equation."""

    @property
    def arrays(self) -> list[str]:
        """All the arrays, grouped."""
        return grouped((self.where, *self.alike))


def dimensions(
    model: Model, part: Part, dims: Iterable[tuple[tuple[str, ...], int]], arrays: Sequence[str]
) -> Iterator[Dimension]:
    """The dimensions of arrays of one rule and shape.

    Args:
        model: for the names under which sizes are kept.
        part: whose arrays they are.
        dims: for each of their axes, the axes it is the product of, and its length.
        arrays: their names, for messages.
    """
    for axes, length in dims:
        # a literal 1 is checked like an axis whose size is known
        named = tuple(axis if axis == UNIT else model.qualified(part.name, axis) for axis in axes)
        yield Dimension(named, length, arrays[0], tuple(arrays[1:]))


def fixed_dimensions(model: Model, runtime: str, seen: Iterable[Dimension]) -> list[Dimension]:
    """Sizes that the declarations fix: a unit axis, and axes whose placeholder lists its words."""
    fixed = [Dimension((UNIT,), 1, runtime)] if any(each.axes == (UNIT,) for each in seen) else []
    for part in model.parts:
        for rule in part.rules:
            for axis, words in rule.template.choices.items():
                fixed.append(Dimension((model.qualified(part.name, axis),), len(words), f"{rule.weight}"))
    return fixed


class Numbers:
    """The numbers in names, by axis: how many layers there are.

    Args:
        model: for the names under which sizes are kept.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._counts: dict[tuple[str, str], set[int]] = {}

    def add(self, part: Part, at: Mapping[str, int]) -> None:
        """The numbers in a name of a part."""
        for axis, number in at.items():
            self._counts.setdefault((part.name, axis), set()).add(number)

    def dimensions(self) -> tuple[list[Dimension], list[Problem]]:
        """Each axis is as long as its highest number says, unless that cannot be."""
        counted, problems = [], []
        for (part, axis), numbers in self._counts.items():
            if max(numbers) > len(numbers) + MAX_GAP:
                problems.append(
                    Problem(
                        f"{part} has {with_article(axis)} {max(numbers)} but only {len(numbers)} in all",
                        "layers are missing, or their names are damaged: copy the checkpoint again",
                    )
                )
                continue
            qualified = self._model.qualified(part, axis)
            counted.append(Dimension((qualified,), max(numbers) + 1, f"{part}: the highest {axis}"))
        return counted, problems


def recorded_sizes(root: Location) -> dict[str, int]:
    """The sizes that bridge itself wrote beside a checkpoint, if it did."""
    sizes = read_record(root).get("sizes")
    if not isinstance(sizes, dict):
        return {}
    return {axis: size for axis, size in sizes.items() if type(size) is int and size > 0}


def recorded_resizes(root: Location) -> dict[str, tuple[int, int]]:
    """The axes that bridge recorded it had cut or padded, with both lengths."""
    resized = read_record(root).get("resized")
    if not isinstance(resized, dict):
        return {}
    pairs: dict[str, tuple[int, int]] = {}
    for axis, each in resized.items():
        stored, made = (each.get("from"), each.get("to")) if isinstance(each, dict) else (None, None)
        if isinstance(stored, int) and isinstance(made, int):
            pairs[axis] = stored, made
    return pairs


def located(source: Source, problems: Iterable[Problem]) -> list[Problem]:
    """Problems of a source, with the source's name."""
    return [Problem(f"{source.location}: {problem.cause}", problem.fix) for problem in problems]


def solve(
    seen: Iterable[Dimension], model: Model, known: Mapping[str, int] | None = None
) -> tuple[dict[str, int], list[Problem]]:
    """Find the size of every axis, and every array that disagrees.

    Where arrays disagree, the size of the majority is taken as right, so that the message names the
    odd one out.

    Args:
        seen: every dimension of every array.
        model: for the relations that its architecture fixes.
        known: sizes from elsewhere (a config), by canonical axis.

    Returns:
        Sizes by canonical axis (axes that no equation fixes are absent), and the problems.
    """
    single: defaultdict[str, list[Dimension]] = defaultdict(list)
    groups: list[Dimension] = []
    for dimension in seen:
        if len(dimension.axes) == 1:
            single[dimension.axes[0]].append(dimension)
        else:
            groups.append(dimension)
    sizes = dict(known or {})
    problems = _solve_axes(single, sizes)
    unsolved = _solve_groups(groups, sizes, problems)
    return sizes, [*problems, *_product_problems(unsolved), *_multiple_problems(model, sizes)]


def open_axes(model: Model, sizes: Mapping[str, int]) -> list[str]:
    """The axes of a model's leaves that have no size, sorted."""
    return sorted(axis for axis in axes_of(model) if axis not in sizes)


def axes_of(model: Model) -> set[str]:
    """The axes of a model's leaves, qualified and canonical."""
    return {
        model.qualified(part.name, axis)
        for part in model.parts
        for rule in part.rules
        for axis in rule.equation.left
        if axis.isidentifier()
    }


def choices(seen: Iterable[Dimension], model: Model, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """A few axes whose sizes would tell all that shapes leave open -> the sizes that shapes allow each.

    Args:
        seen: every dimension of every array.
        model: whose axes they are.
        sizes: all that is known.
    """
    dimensions, known = list(seen), dict(sizes)
    found: dict[str, tuple[int, ...]] = {}
    while open_products := [each for each in dimensions if any(axis not in known for axis in each.axes)]:
        # the longest: heads are better known than the key-value heads or the width of one
        product = max(open_products, key=lambda each: each.length)
        axis = next(axis for axis in product.axes if axis not in known)
        fitting = fitting_sizes(dimensions, model, known, axis)
        if not fitting:
            break
        found[axis] = fitting
        # which axes follow from it does not depend on the size it has
        known, _ = solve(dimensions, model, {**known, axis: fitting[0]})
    return found


def fitting_sizes(
    seen: Iterable[Dimension], model: Model, sizes: Mapping[str, int], axis: str
) -> tuple[int, ...]:
    """The sizes of an axis that the shapes allow; none for an axis of no array."""
    dimensions = list(seen)
    length = max((each.length for each in dimensions if axis in each.axes), default=0)
    return tuple(n for n in _divisors(length) if not solve(dimensions, model, {**sizes, axis: n})[1])


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]  # none of 0
    return sorted({*small, *(number // n for n in small)})


def _solve_axes(single: Mapping[str, list[Dimension]], sizes: dict[str, int]) -> list[Problem]:
    """Add the size that most arrays give each axis; what the others give is a problem."""
    problems = []
    for axis, dimensions in single.items():
        if axis not in sizes:
            sizes[axis] = _majority(dimensions)
        agree = next((each.where for each in dimensions if each.length == sizes[axis]), "the config")
        for each in dimensions:
            if each.length != sizes[axis]:
                problems += _disagree(axis, each, sizes[axis], agree)
    return problems


def _solve_groups(groups: list[Dimension], sizes: dict[str, int], problems: list[Problem]) -> list[Dimension]:
    """Add the axes that products give, as long as there are any; gives the products that stay open."""
    unsolved = groups
    while True:
        later: list[Dimension] = []
        for group in unsolved:
            unknown = [axis for axis in group.axes if axis not in sizes]
            rest = math.prod(sizes[axis] for axis in group.axes if axis in sizes)
            if not unknown and rest != group.length:
                problems += _disagree(" x ".join(group.axes), group, rest, "the other tensors")
            elif len(unknown) == 1 and rest > 0 and group.length % rest == 0:
                sizes[unknown[0]] = group.length // rest
            elif len(unknown) == 1:
                problems += _indivisible(group, rest)
            elif unknown:
                later.append(group)
        if len(later) == len(unsolved):
            return later
        unsolved = later


def _product_problems(unsolved: list[Dimension]) -> list[Problem]:
    """A product none of whose axes is known still has one length in all arrays."""
    products: defaultdict[tuple[str, ...], list[Dimension]] = defaultdict(list)
    for group in unsolved:
        products[group.axes].append(group)
    problems = []
    for axes, dimensions in products.items():
        length = _majority(dimensions)
        agree = next(each.where for each in dimensions if each.length == length)
        for each in dimensions:
            if each.length != length:
                problems += _disagree(" x ".join(axes), each, length, agree)
    return problems


def _multiple_problems(model: Model, sizes: Mapping[str, int]) -> list[Problem]:
    """Relations that the architecture fixes and the sizes do not have."""
    problems = []
    for multiple in model.multiples:
        axis, of = (model.canonical.get(name, name) for name in (multiple.axis, multiple.of))
        if axis in sizes and of in sizes and sizes[axis] != multiple.factor * sizes[of]:
            problems.append(
                Problem(
                    f"{axis} is {sizes[axis]}; expected {multiple.factor} x {of}, which is {sizes[of]}",
                    f"no {model.name} has these dimensions: it is another model, or a damaged copy",
                )
            )
    return problems


def _majority(dimensions: list[Dimension]) -> int:
    votes = Counter[int]()
    for each in dimensions:
        votes[each.length] += 1 + len(each.alike)
    return votes.most_common(1)[0][0]


def _indivisible(dimension: Dimension, rest: int) -> list[Problem]:
    return [
        Problem(
            f"{where}: {' x '.join(dimension.axes)} is {dimension.length}, not a multiple of {rest} "
            "in the other tensors",
            "the checkpoint mixes models of different dimensions, or is another model",
        )
        for where in dimension.arrays
    ]


def _disagree(axis: str, dimension: Dimension, expected: int, agree: str) -> list[Problem]:
    return [
        Problem(
            f"{where}: {axis} is {dimension.length}, but {expected} in {agree}",
            "the checkpoint mixes models of different dimensions, or is another model",
        )
        for where in dimension.arrays
    ]
