"""Rules: which JAX leaf becomes which PyTorch weights. A model's table is made of these."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bridge.rules.equation import Equation, Index
from bridge.rules.factoring import FactorAxes, Factoring
from bridge.rules.initialiser import Initialiser
from bridge.rules.names import Template


@dataclass(frozen=True)
class Rule:
    """One axis equation: ``leaf`` (path in the pytree) becomes ``weight`` (state_dict names).

    A placeholder in the weight's name is an axis on the equation's left alone (layers stacked in the
    leaf), or one of the leaf's own path (a leaf for each layer).

    Checked when declared: the equation itself, that its placeholders and the path's stand in the
    weight's name, and, with ``lora``, that the leaf can carry factors.

    Raises:
        ValueError: the declaration contradicts itself.

    >>> stacked = Rule("layers/q/w", "layers.{layer}.q.weight", "layer head width dim -> (head dim) width")
    >>> dict(stacked.weights({"layer": 2}))
    {(0,): 'layers.0.q.weight', (1,): 'layers.1.q.weight'}
    >>> apart = Rule("layer_{layer}/q/w", "layers.{layer}.q.weight", "head width dim -> (head dim) width")
    >>> [(rule.leaf, dict(rule.weights({}))) for rule in apart.bind({"layer": 2})]
    [('layer_0/q/w', {(): 'layers.0.q.weight'}), ('layer_1/q/w', {(): 'layers.1.q.weight'})]
    """

    leaf: str
    weight: str
    axes: str
    lora: Factoring | None = None
    runtime: str | None = None
    """The einsum by which the JAX runtime applies one weight to an input, if it is one, such as
    ``"BTD,NDH->BTNH"``: batch and token first, and a label for each axis of the weight. A fact from its
    source, not from the axes above: verification compares the two."""
    dtype: str | None = None
    """dtype in which the runtime keeps this weight whatever the model's precision, if any."""
    start: Initialiser | None = None
    """What the runtime draws a fresh leaf from: needed where an axis of it may be padded."""

    def __post_init__(self) -> None:
        placeholders, named = (*self.path.axes, *self.equation.placeholders), self.template.axes
        if len(set(named)) != len(named) or sorted(placeholders) != sorted(named):
            need = "and the path need" if self.path.axes else "needs"
            raise ValueError(
                f"rule for {self.leaf}: {self.weight!r} has placeholders {sorted(named)}, "
                f"'{self.axes}' {need} {sorted(placeholders)}"
            )
        if self.path.choices:
            raise ValueError(f"rule for {self.leaf}: a placeholder of a path is a number")
        if self.lora is not None:
            self.lora.paths(self.leaf)
            if self.lora.rank in self.equation.left:
                raise ValueError(f"rule for {self.leaf}: {self.lora.rank!r} is an axis of the leaf itself")
            self.lora.of(self.equation)

    @classmethod
    def copying(cls, name: str, axes: int) -> Rule:
        """For an array that stays as it is, whatever its axes stand for.

        >>> Rule.copying("layers/q/lora_a", 3).axes
        'axis_0 axis_1 axis_2 -> axis_0 axis_1 axis_2'
        """
        named = " ".join(f"axis_{number}" for number in range(axes))
        return cls(name, name, f"{named} -> {named}")

    def check_runtime(self) -> None:
        """Whether the einsum can be run for the weights of this leaf.

        Raises:
            ValueError: it is not one of two operands, or has other labels than the leaf has axes.
        """
        if self.runtime is None:
            return
        parsed = re.fullmatch(r"(([A-Za-z]{2})[A-Za-z]+),([A-Za-z]+)->\2[A-Za-z]+", self.runtime)
        axes = self.equation.of_weight.left
        if parsed is None or len(parsed[3]) != len(axes) or set(parsed[2]) & set(parsed[3]):
            raise ValueError(
                f"rule for {self.leaf}: {self.runtime!r} is not an einsum such as 'BTD,DF->BTF': batch and token "
                f"first on both sides, and {len(axes)} labels for {' '.join(axes)}"
            )

    @cached_property
    def flat(self) -> Rule:
        """The same weights with each of their axes as one: what a state_dict alone can tell.

        Reading a tensor by its flat rule needs no head or head_dim, which no tensor's shape has.
        """
        groups = tuple("_".join(group) for group in self.equation.right)
        # input first, which every factoring accepts
        order = groups[::-1] if self.lora is not None else groups
        left = (*self.equation.placeholders, *order)
        # the einsum speaks of the axes apart
        return replace(self, axes=f"{' '.join(left)} -> {' '.join(groups)}", runtime=None)

    @cached_property
    def equation(self) -> Equation:
        return Equation.parse(self.axes)

    @cached_property
    def template(self) -> Template:
        """The weight's name."""
        return Template(self.weight)

    @cached_property
    def path(self) -> Template:
        """The leaf's path."""
        return Template(self.leaf, "/")

    @cached_property
    def factor_axes(self) -> FactorAxes:
        """The axes of both factors, for a leaf that can have them."""
        assert self.lora is not None
        return self.lora.of(self.equation)

    @cached_property
    def factor_leaves(self) -> tuple[str, str] | None:
        """Paths of both factors, for a leaf that can have them."""
        return None if self.lora is None else self.lora.paths(self.leaf)

    @cached_property
    def named_axes(self) -> tuple[str, ...]:
        """Every axis whose size a model knows: of the leaf, of its path, and the rank's."""
        own = (*self.path.axes, *(axis for axis in self.equation.left if axis.isidentifier()))
        return (*own, self.lora.rank) if self.lora else own

    def bind(self, sizes: Mapping[str, int]) -> Iterator[Rule]:
        """This rule for each leaf that its path stands for.

        Args:
            sizes: of the path's placeholders at least.
        """
        if not self.path.axes:
            yield self
            return
        for numbers in itertools.product(*(range(sizes[axis]) for axis in self.path.axes)):
            yield self.at(dict(zip(self.path.axes, numbers, strict=True)))

    def at(self, numbers: Mapping[str, int]) -> Rule:
        """This rule for one of the leaves that its path stands for.

        Args:
            numbers: of the path's placeholders at least.
        """
        if not self.path.axes:
            return self
        own = {axis: numbers[axis] for axis in self.path.axes}
        return replace(self, leaf=self.path.format(own), weight=self.template.format(own))

    def weights(self, sizes: Mapping[str, int]) -> Iterator[tuple[Index, str]]:
        """Every weight of one leaf: its index, in the order of the leaf's axes, and its name.

        Args:
            sizes: of the equation's placeholders at least.
        """
        placeholders = self.equation.placeholders
        for index in itertools.product(*(range(sizes[axis]) for axis in placeholders)):
            yield index, self.template.format(dict(zip(placeholders, index, strict=True)))
