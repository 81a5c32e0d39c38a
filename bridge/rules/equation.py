r"""Axis equations: how the axes of a JAX leaf become the axes of PyTorch weights.

``"layer head width dim -> (head dim) width"`` says everything about ``q_proj``: one weight a
layer, whose rows are head and dim together and whose columns are width. Left: the leaf's axes
in order, ``1`` for an axis of size one. Right: the weight's axes, each a name or a group in
parentheses, output first. An axis on the left alone tells weights apart (a *placeholder*),
wherever it stands.

An equation moves numbers and never changes any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

UNIT = "1"

Index = tuple[int, ...]
"""Which weight of a leaf: one number for each placeholder, in the order of the left side."""


@dataclass(frozen=True)
class Equation:
    """A checked axis equation. Made by :meth:`parse`.

    >>> equation = Equation.parse("layer head width dim -> (head dim) width")
    >>> sizes = {"layer": 2, "head": 3, "width": 5, "dim": 7}
    >>> equation.placeholders, equation.leaf_shape(sizes), equation.weight_shape(sizes)
    (('layer',), (2, 3, 5, 7), (21, 5))
    >>> leaf = np.zeros(equation.leaf_shape(sizes))
    >>> [(index, equation.arrange(part).shape) for index, part in equation.slices(leaf)]
    [((0,), (21, 5)), ((1,), (21, 5))]
    """

    left: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Equation:
        """Read ``"a b c -> (a b) c"``.

        Raises:
            ValueError: the text is not an equation, an axis is named twice on one side, or an
                axis stands on the right alone.
        """
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(f"axis equation {text!r}: expected one '->'")
        left = tuple(sides[0].split())
        tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", sides[1])
        right = tuple(tuple(token.strip("()").split()) for token in tokens)
        equation = cls(left, right)
        equation._check(text)
        return equation

    def _check(self, text: str) -> None:
        named_left = [axis for axis in self.left if axis != UNIT]
        for axis in (*named_left, *self.weight_axes):
            if not axis.isidentifier():
                raise ValueError(f"axis equation {text!r}: {axis!r} is not a name")
        for side in (named_left, self.weight_axes):
            for axis in side:
                if side.count(axis) > 1:
                    raise ValueError(f"axis equation {text!r}: {axis!r} stands twice on one side")
        if not all(self.right) or not self.right:
            raise ValueError(f"axis equation {text!r}: an empty group on the right")
        for axis in self.weight_axes:
            if axis not in named_left:
                raise ValueError(f"axis equation {text!r}: {axis!r} stands on the right alone")

    def __str__(self) -> str:
        groups = (group[0] if len(group) == 1 else f"({' '.join(group)})" for group in self.right)
        return f"{' '.join(self.left)} -> {' '.join(groups)}"

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """Axes on the left alone, in order: they become part of the weight's name."""
        return tuple(axis for axis in self.left if axis != UNIT and axis not in self.weight_axes)

    @cached_property
    def weight_axes(self) -> tuple[str, ...]:
        """Axes of one weight, in order, its groups taken apart."""
        return tuple(axis for group in self.right for axis in group)

    @cached_property
    def in_order(self) -> bool:
        """Whether the weights of a leaf lie in it one after the other: placeholders come first."""
        return self.left[: len(self.placeholders)] == self.placeholders

    @cached_property
    def streams(self) -> bool:
        """Whether consecutive blocks along the leaf's first axis can be exported on their own.

        So when that axis tells weights apart (a block is whole weights), or is the first axis
        of the one weight (a block is whole rows, as in an embedding).
        """
        first = self.left[0]
        return first in self.placeholders or (not self.placeholders and self.right[0] == (first,))

    def leaf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the leaf, from the size of each axis."""
        return tuple(1 if axis == UNIT else sizes[axis] for axis in self.left)

    def weight_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of one weight, from the size of each axis."""
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.right)

    def slices(self, leaf: np.ndarray) -> Iterator[tuple[Index, np.ndarray]]:
        """Yield, for every weight held in ``leaf``, its index and a view of its part of the leaf.

        The view has the axes of :attr:`of_weight`'s left side.
        """
        named = [axis for axis in self.left if axis != UNIT]
        view = leaf.reshape([n for axis, n in zip(self.left, leaf.shape, strict=True) if axis != UNIT])
        view = np.moveaxis(
            view, [named.index(axis) for axis in self.placeholders], range(len(self.placeholders))
        )
        for index in np.ndindex(*view.shape[: len(self.placeholders)]):
            yield index, view[index]

    @cached_property
    def of_weight(self) -> Equation:
        """The equation of one weight: this one without its placeholders and unit axes."""
        kept = tuple(axis for axis in self.left if axis != UNIT and axis not in self.placeholders)
        return Equation(kept, self.right)

    def arrange(self, part: np.ndarray) -> np.ndarray:
        """The weight of one slice of a leaf: transpose and reshape.

        Args:
            part: with the left axes of :attr:`of_weight`, as :meth:`slices` gives it.
        """
        axes = self.of_weight.left
        sizes = dict(zip(axes, part.shape, strict=True))
        return part.transpose([axes.index(axis) for axis in self.weight_axes]).reshape(
            self.weight_shape(sizes)
        )

    def in_leaf(self, index: Index, positions: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Where entries of one weight lie in the leaf.

        Args:
            index: of the weight.
            positions: of the entries, in the weight's axes: (count, axes).
            sizes: of the weight's axes at least.

        Returns:
            Their positions in the leaf's axes: (count, axes).
        """
        at = dict(zip(self.placeholders, index, strict=True))
        for group, numbers in zip(self.right, positions.T, strict=True):
            at |= dict(zip(group, np.unravel_index(numbers, [sizes[axis] for axis in group]), strict=True))
        columns = (np.broadcast_to(at.get(axis, 0), len(positions)) for axis in self.left)
        return np.stack([*columns], axis=1)
