"""A source, understood: which model it contains, in which dimensions, with which LoRA factors.

Everything is worked out from names and shapes. What is wrong is collected, not raised, so that
``inspect`` can describe a faulty checkpoint and ``plan`` can refuse with every fault at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, TypeAlias

import numpy as np

from bridge.arrays import Spec
from bridge.checkpoint.leave_out import NOTHING, LeftOut
from bridge.errors import CheckpointRefused, Problem
from bridge.formats.contract import Source, format_named
from bridge.graph import State
from bridge.lora.factors import Scale
from bridge.rules.family import Family
from bridge.rules.model import Bound, Layout, Model, Part, Unused
from bridge.rules.rule import Rule
from bridge.stream.readers import FactorReader, WeightsReader

Positions: TypeAlias = Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Module:
    """The factors of one module of an adapter: tensor names, rank, and PEFT's runtime scale."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ABC):
    """A source and the model it contains."""

    source: Source
    family: Family
    model: Model
    layout: Layout
    """How its PyTorch names are prefixed; the model's first layout for a pytree."""
    stored: Mapping[str, str]
    """Leaf path, or PyTorch name in the rules -> name in the source."""
    sizes: Mapping[str, int]
    problems: tuple[Problem, ...]
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Axes whose sizes neither its tensors nor a config tell -> the sizes that its tensors allow."""
    left_out: LeftOut = NOTHING

    naming: ClassVar[str] = ""
    """What its names are, where they have no layout."""
    in_jax: ClassVar[bool] = False
    """Whether the JAX runtime runs it."""

    @property
    @abstractmethod
    def contents(self) -> str:
        """``"base"``, ``"base+lora"`` or ``"lora"``."""

    @cached_property
    def state(self) -> State:
        """The node of the graph that this is. Raises CheckpointRefused where its format declares none."""
        states = format_named(self.source.format).states
        own = (each for each in states if each.contents == self.contents and not each.stripped)
        state = next(own, None)
        if state is None:
            raise CheckpointRefused(
                Problem(
                    f"{self.source.location} contains {self.contents}, and the format {self.source.format} "
                    "declares no such state",
                    "the package that registers the format must declare it",
                )
            )
        return state

    @property
    def model_name(self) -> str:
        """The model's name, or those of several between which nothing decides."""
        return self.model.name

    @property
    def suffixed(self) -> bool:
        """Whether leaf paths end in the suffix that training saves."""
        return False

    @property
    def modules(self) -> Mapping[str, Module]:
        """PyTorch name of a weight, in the rules -> the factors an adapter gives it."""
        return {}

    def bound(self) -> Iterator[Bound]:
        """Every leaf of the model with its sizes."""
        return self.model.bind(self.sizes)

    def seen(self) -> dict[str, int]:
        """Numbers of layers and the like, by qualified axis, as far as names tell, and one more of each."""
        return {}

    def spec(self, name: str) -> Spec:
        """Of what is stored as a leaf or weight."""
        return self.source.specs[self.stored[name]]

    def lora_rules(self) -> Iterator[tuple[Part, Rule]]:
        """The rules whose leaves carry factors in this checkpoint's own pytree, with their part."""
        return iter(())

    def factors_of(self, part: Part) -> list[str]:
        """Names in the source of the arrays that the LoRA factors of a part lie in."""
        return []

    def ranks_of(self, part: Part) -> dict[str, int]:
        """Rank of the LoRA factors of a part, by kind of weight."""
        return {}

    def rank(self, part: Part, rule: Rule) -> int:
        """The rank of a rule's factors in the pytree."""
        assert rule.lora is not None
        return self.sizes[self.model.qualified(part.name, rule.lora.rank)]

    @property
    def has_lora(self) -> bool:
        return self.contents != "base"

    @property
    def unused(self) -> dict[str, str]:
        """Arrays that stand for no weight of the model -> why they may be there."""
        return {}

    def reports(self) -> list[str]:
        """What a plan has to say of how it is read."""
        return []

    def unused_weight(self, unused: Unused) -> str | None:
        """Name in the source of a weight that the runtime declares and never uses, where it is stored."""
        return None

    def facts_inside(self) -> dict[str, np.ndarray]:
        """Arrays among the weights that are facts, by name. Raises SourceRefused where one cannot be read."""
        return {}

    @abstractmethod
    def arrays_of(self, part: Part) -> list[str]:
        """Names in the source of the arrays that a part's weights lie in."""

    @abstractmethod
    def weight_specs(self) -> dict[str, Spec]:
        """Shape and stored dtype of every weight, by its name in the rules."""

    @abstractmethod
    def weights_reader(self, key: str, bound: Bound, *, flat: bool) -> tuple[WeightsReader, Bound]:
        """How a leaf's weights are read, and the rule and sizes in the form that reading needs.

        Args:
            key: of this checkpoint among the sources of a plan.
            bound: the leaf.
            flat: read tensors without taking their rows apart, which needs no more than their shapes.
        """

    def factor_reader(self, key: str, bound: Bound, scale: Scale | None) -> FactorReader | None:
        """How the factors of a leaf's weights are read, or None where it has none."""
        return None

    def corner(self, bound: Bound, positions: Positions) -> tuple[str, np.ndarray] | None:
        """Name and some values of the first weight of a leaf; None where they take much to read.

        Args:
            bound: the leaf.
            positions: for a shape, the positions of the values: (count, axes of the weight).
        """
        return None
