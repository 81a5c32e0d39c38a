"""How a runtime factors a leaf for LoRA, declared once and named by every rule that uses it.

A low-rank change is applied by two einsums: the input with ``a``, and what comes of it with ``b``.
Which axes of the leaf each factor has decides everything else: the matrices PEFT would hold, the way
back, the fold and the two einsums themselves. Two choices are known:

- :func:`last_two_axes`, openpi's (models/lora.py): ``a`` has the leaf's axes with the last one replaced
  by the rank, ``b`` with the one before it.
- :func:`by_role`, that of google-deepmind/gemma (gemma/peft/_lora.py) and Qwix
  (qwix/_src/providers/lora.py): ``a`` has the axes that meet the input, ``b`` all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters

import numpy as np

from bridge.rules.equation import UNIT, Equation, Index
from bridge.rules.initialiser import Initialiser, Normal

#: of the first factor, where a runtime's own is not declared: small and random trains, zero does not
SMALL = Normal(0.01)

#: the rank among the axes of a factor; no axis of a leaf can have this name
RANK = "(rank)"


@dataclass(frozen=True)
class FactorAxes:
    """The axes of a leaf's two factors, in order, :data:`RANK` among them.

    Args:
        equation: of the leaf.
        a: axes of the first factor.
        b: axes of the second.

    Raises:
        ValueError: these factors make no low-rank change of the weight.

    >>> leaf = Equation.parse("layer head width dim -> (head dim) width")
    >>> last_two_axes(leaf).a, last_two_axes(leaf).kept
    (('layer', 'head', 'width', '(rank)'), ('head',))
    >>> by_role(leaf, stacked=("layer",)).b
    ('layer', '(rank)', 'head', 'dim')
    """

    equation: Equation
    a: tuple[str, ...]
    b: tuple[str, ...]

    def __post_init__(self) -> None:
        equation = self.equation
        if UNIT in equation.left or len(equation.right) != 2:
            raise ValueError(f"{equation}: LoRA needs a leaf whose weights are matrices")
        output, inputs = equation.right
        if not set(inputs) <= set(self.a) or not set(output) <= set(self.b):
            raise ValueError(
                f"{equation}: LoRA factors over {' '.join(self.a)} and {' '.join(self.b)} are not input x output"
            )
        if set(self.a) | set(self.b) != {*equation.left, RANK} or RANK not in set(self.a) & set(self.b):
            raise ValueError(f"{equation}: LoRA factors must have the rank and every axis of the leaf")
        if len(set(self.a)) < len(self.a) or len(set(self.b)) < len(self.b):
            raise ValueError(f"{equation}: LoRA factors have an axis twice")
        for axis in equation.placeholders:
            if axis not in self.b:
                # weights may share their first factor; with one `b` for all of them none could be filled alone
                raise ValueError(f"{equation}: LoRA factors need the axis {axis} in the second factor")

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Output axes of both factors: each entry (each head of q) has a product of its own."""
        return tuple(axis for axis in self.equation.left if axis in self.equation.right[0] and axis in self.a)

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """Input axes of both factors: each einsum contracts them alone, so ``b`` is summed over them."""
        return tuple(axis for axis in self.equation.left if axis in self.equation.right[1] and axis in self.b)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """Axes of what passes from the first einsum to the second, the batch aside, in the order of ``a``.

        Each entry (a rank, of a layer and a head) is trained by itself: a gradient reaches it unless it is
        zero in both factors.
        """
        return tuple(axis for axis in self.a if axis in self.b and axis not in self.summed)

    @cached_property
    def placeholders_a(self) -> tuple[int, ...]:
        """Positions, among the equation's placeholders, of those that ``a`` has.

        Weights that differ in the others alone share one ``a``: k and v, factored by role.
        """
        return tuple(n for n, axis in enumerate(self.equation.placeholders) if axis in self.a)

    @cached_property
    def of_weight(self) -> FactorAxes:
        """The axes of the factors of one weight: these without placeholders."""
        return self.without(self.equation.placeholders)

    def without(self, axes: tuple[str, ...]) -> FactorAxes:
        """The axes where some are fixed at one entry."""
        left = tuple(axis for axis in self.equation.left if axis not in axes)
        right = tuple(tuple(axis for axis in group if axis not in axes) for group in self.equation.right)
        return FactorAxes(
            Equation(left, right),
            tuple(axis for axis in self.a if axis not in axes),
            tuple(axis for axis in self.b if axis not in axes),
        )

    def shapes(self, sizes: Mapping[str, int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of both factors, from the size of each axis of the leaf.

        >>> axes = last_two_axes(Equation.parse("head width dim -> (head dim) width"))
        >>> axes.shapes({"head": 2, "width": 5, "dim": 3}, 4)
        ((2, 5, 4), (2, 4, 3))
        """
        known = {**sizes, RANK: rank}
        return tuple(known[axis] for axis in self.a), tuple(known[axis] for axis in self.b)

    def slices(self, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[Index, np.ndarray, np.ndarray]]:
        """For every weight of the leaf, its index and views of its parts of both factors.

        Args:
            a: with the axes :attr:`a`.
            b: with the axes :attr:`b`.
        """
        placeholders = self.equation.placeholders
        sizes = dict(zip(self.a, a.shape, strict=True)) | dict(zip(self.b, b.shape, strict=True))
        for index in np.ndindex(*(sizes[axis] for axis in placeholders)):
            at = dict(zip(placeholders, index, strict=True))
            pick_a, pick_b = (tuple(at.get(axis, slice(None)) for axis in side) for side in (self.a, self.b))
            yield index, a[pick_a], b[pick_b]

    def einsums(self, runtime: str) -> tuple[str, str]:
        """The runtime's two LoRA einsums, from the einsum by which it applies one weight.

        Args:
            runtime: such as ``"BTD,NDH->BTNH"``; the weight's labels are the axes of one weight of
                the leaf, in order.

        >>> axes = last_two_axes(Equation.parse("head dim width -> width (head dim)"))
        >>> axes.einsums("BTNH,NHD->BTD")
        ('BTNH,NHL->BTL', 'BTL,NLD->BTD')
        """
        operands, output = runtime.split("->")
        x, weight = operands.split(",")
        # as openpi labels the rank, unless the runtime's own einsum has that label
        rank = next(each for each in "L" + ascii_letters if each not in runtime)
        label = dict(zip(self.equation.of_weight.left, weight, strict=True)) | {RANK: rank}
        a, b = ("".join(label[axis] for axis in axes if axis in label) for axes in (self.a, self.b))
        batch = [each for each in x if each not in weight]
        # what the first einsum leaves: the output's axes that `a` has, in the output's order, then the rank
        middle = "".join(each for each in output if each in batch or each in a) + rank
        return f"{x},{a}->{middle}", f"{middle},{b}->{output}"


Axes = Callable[[Equation, tuple[str, ...]], FactorAxes]
"""The axes of both factors of a leaf, from its equation and those axes that stack separate modules."""


def last_two_axes(equation: Equation, stacked: tuple[str, ...] = ()) -> FactorAxes:
    """openpi's: the leaf's last two axes, inner and outer, are factored; both factors have the others."""
    left = equation.left
    return FactorAxes(equation, (*left[:-1], RANK), (*left[:-2], RANK, *left[-1:]))


def by_role(equation: Equation, stacked: tuple[str, ...] = ()) -> FactorAxes:
    """DeepMind's and Qwix's: ``a`` (…inputs, rank), ``b`` (rank, …all others).

    Args:
        equation: of the leaf.
        stacked: axes that stack modules (layers), which the einsum never sees: both factors have them,
            where the leaf has them. An axis on the left alone that is not stacked (k or v, gate or up)
            is an output of one einsum, and ``a`` is shared by its entries.
    """
    inputs = equation.right[-1]
    own = [axis for axis in equation.left if axis not in stacked]
    a = [*(axis for axis in own if axis in inputs), RANK]
    b = [RANK, *(axis for axis in own if axis not in inputs)]
    for position, axis in enumerate(equation.left):
        if axis in stacked:
            # stacked modules lie along the same axis of the factors as of the leaf
            a.insert(position, axis)
            b.insert(position, axis)
    return FactorAxes(equation, tuple(a), tuple(b))


@dataclass(frozen=True, kw_only=True)
class Factoring:
    """Where a runtime stores the LoRA factors of a leaf, which axes they have, and how it scales them.

    Args:
        leaf: ending of the leaf's path that ``a`` and ``b`` take the place of.
        a: ending of the first factor's path.
        b: ending of the second factor's path.
        rank: name of the rank axis: factors that name the same, in one part, have one rank.
        name: what its leaves are called in descriptions, such as ``"attention"``.
        scaled: whether the runtime multiplies the product by alpha / rank.
        axes: :func:`last_two_axes`, :func:`by_role`, or a function of one's own.
        stacked: axes of leaves that stack separate modules.
        start: what the runtime draws a fresh first factor from. Where it starts, the second is zero, whatever
            the runtime's own: the model stays the same function, and the second has a gradient.
    """

    leaf: str
    a: str
    b: str
    rank: str
    scaled: bool
    name: str = "LoRA"
    axes: Axes = last_two_axes
    stacked: tuple[str, ...] = ("layer",)
    start: Initialiser = SMALL

    def paths(self, leaf: str) -> tuple[str, str]:
        """Paths of both factors of a leaf.

        Raises:
            ValueError: the leaf's path does not end as declared.
        """
        if not leaf.endswith(self.leaf):
            raise ValueError(f"rule for {leaf}: its factors replace {self.leaf!r}, which the path lacks")
        stem = leaf.removesuffix(self.leaf) if self.leaf else leaf
        return stem + self.a, stem + self.b

    def of(self, equation: Equation) -> FactorAxes:
        """The axes of the factors of a leaf. Raises ValueError as :class:`FactorAxes`."""
        return self.axes(equation, self.stacked)
