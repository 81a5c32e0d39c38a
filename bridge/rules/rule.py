"""Rules: which JAX leaf becomes which PyTorch weights. A model's table is made of these."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bridge.lora.algebra import FactorAxes, factor_axes
from bridge.rules.equation import Equation, Index
from bridge.rules.names import Template


@dataclass(frozen=True)
class Factors:
    """Where a leaf's LoRA factors are stored, and whether the runtime scales their product.

    ``leaf`` is the ending of the leaf's path that ``a`` and ``b`` take the place of.
    """

    leaf: str
    a: str
    b: str
    rank: str
    """Name of the rank axis: factors that name the same one, in one part, have one rank."""
    scaled: bool
    """Whether the product is multiplied by alpha / rank at run time."""


@dataclass(frozen=True)
class Rule:
    """One axis equation: ``leaf`` (path in the pytree) becomes ``weight`` (state_dict names).

    Checked when declared: the equation itself, that exactly its placeholders stand in the
    weight's name, and, with ``lora``, that the leaf can carry factors.

    Raises:
        ValueError: the declaration contradicts itself.
    """

    leaf: str
    weight: str
    axes: str
    lora: Factors | None = None
    runtime: str | None = None
    """The einsum by which openpi's JAX code applies one weight to an input, if it is one. A fact from
    its source, not from the axes above: `verify` holds the two against each other."""
    hold: str | None = None
    """dtype that the runtime holds this weight in whatever the policy's precision, if any."""

    def __post_init__(self) -> None:
        placeholders, named = self.equation.placeholders, self.template.axes
        if len(set(named)) != len(named) or set(placeholders) != set(named):
            raise ValueError(
                f"rule for {self.leaf}: {self.weight!r} has placeholders {sorted(named)}, "
                f"'{self.axes}' needs {sorted(placeholders)}"
            )
        if self.lora is not None:
            if not self.leaf.endswith(self.lora.leaf):
                raise ValueError(f"rule for {self.leaf}: factors replace {self.lora.leaf!r}, which it lacks")
            if self.lora.rank in self.equation.left:
                raise ValueError(f"rule for {self.leaf}: {self.lora.rank!r} is an axis of the leaf itself")
            factor_axes(self.equation)

    @cached_property
    def flat(self) -> Rule:
        """The same weights with each of their axes as one: what a state_dict alone can tell.

        Reading a tensor by its flat rule needs no head or head_dim, which no tensor's shape has.
        """
        groups = tuple("_".join(group) for group in self.equation.right)
        # LoRA factors the last two axes, input first
        order = groups[::-1] if self.lora is not None else groups
        left = (*self.equation.placeholders, *order)
        return replace(self, axes=f"{' '.join(left)} -> {' '.join(groups)}")

    @cached_property
    def equation(self) -> Equation:
        return Equation.parse(self.axes)

    @cached_property
    def template(self) -> Template:
        return Template(self.weight)

    @cached_property
    def factor_axes(self) -> FactorAxes:
        return factor_axes(self.equation)

    @cached_property
    def factor_leaves(self) -> tuple[str, str] | None:
        """Paths of ``lora_a`` and ``lora_b``, for a leaf that can have them."""
        if self.lora is None:
            return None
        stem = self.leaf.removesuffix(self.lora.leaf) if self.lora.leaf else self.leaf
        return stem + self.lora.a, stem + self.lora.b

    def weights(self, sizes: Mapping[str, int]) -> Iterator[tuple[Index, str]]:
        """Every weight: its index, in the order of the leaf's axes, and its name.

        Args:
            sizes: of the placeholders at least.
        """
        placeholders = self.equation.placeholders
        for index in itertools.product(*(range(sizes[axis]) for axis in placeholders)):
            yield index, self.template.format(dict(zip(placeholders, index, strict=True)))
