"""The kinds of checkpoint: a JAX pytree, a PyTorch state_dict, a PEFT adapter.

Each knows how its weights and factors are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bridge.arrays import Spec
from bridge.checkpoint.checkpoint import Checkpoint, Module, Positions
from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.lora.factors import Scale
from bridge.rules.equation import Index
from bridge.rules.model import Bound, Model, Part, Unused
from bridge.rules.names import Names, grouped
from bridge.rules.rule import Rule
from bridge.stream.readers import (
    FactorReader,
    LeafFactors,
    LeafWeights,
    ModuleFactors,
    Read,
    TensorWeights,
    WeightsReader,
)

#: bytes of an array that is a fact, such as a mean of every joint
MAX_FACT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TreeCheckpoint(Checkpoint):
    """A JAX pytree."""

    value_suffix: bool

    naming = "pytree"
    in_jax = True

    @property
    def contents(self) -> str:
        return "base+lora" if any(self.lora_rules()) else "base"

    @property
    def suffixed(self) -> bool:
        return self.value_suffix

    def lora_rules(self) -> Iterator[tuple[Part, Rule]]:
        return ((part, rule) for part, rule in self.model.leaves(self.sizes) if self._factored(rule))

    def _factored(self, rule: Rule) -> bool:
        return rule.factor_leaves is not None and all(leaf in self.stored for leaf in rule.factor_leaves)

    def factors_of(self, part: Part) -> list[str]:
        return [
            self.stored[path]
            for each, rule in self.lora_rules()
            if each is part
            for path in rule.factor_leaves or ()
        ]

    def ranks_of(self, part: Part) -> dict[str, int]:
        return {
            rule.lora.name: self.rank(part, rule)
            for each, rule in self.lora_rules()
            if each is part and rule.lora is not None and self._has_rank(part, rule)
        }

    def _has_rank(self, part: Part, rule: Rule) -> bool:
        return rule.lora is not None and self.model.qualified(part.name, rule.lora.rank) in self.sizes

    def arrays_of(self, part: Part) -> list[str]:
        paths = (rule.leaf for each, rule in self.model.leaves(self.sizes) if each is part)
        return [self.stored[path] for path in paths if path in self.stored]

    def weight_specs(self) -> dict[str, Spec]:
        return {
            name: Spec(bound.weight_shape, self.spec(bound.rule.leaf).dtype)
            for bound in self.bound()
            for name in bound.names.values()
        }

    def weights_reader(self, key: str, bound: Bound, *, flat: bool) -> tuple[WeightsReader, Bound]:
        return LeafWeights(key, self.stored[bound.rule.leaf]), bound

    def corner(self, bound: Bound, positions: Positions) -> tuple[str, np.ndarray] | None:
        rule, (index, name) = bound.rule, bound.first
        at = rule.equation.in_leaf(index, positions(bound.weight_shape), bound.sizes)
        values = self.source.sample(self.stored[rule.leaf], at)
        return None if values is None else (name, values)

    def factor_reader(self, key: str, bound: Bound, scale: Scale | None) -> FactorReader | None:
        rule = bound.rule
        if not self._factored(rule) or rule.factor_leaves is None or rule.lora is None:
            return None
        a, b = (self.stored[path] for path in rule.factor_leaves)
        return LeafFactors(key, a, b, scale.value if rule.lora.scaled and scale is not None else 1.0)


@dataclass(frozen=True, kw_only=True)
class WeightsCheckpoint(Checkpoint):
    """A PyTorch state_dict."""

    @property
    def contents(self) -> str:
        return "base"

    def arrays_of(self, part: Part) -> list[str]:
        return [self.stored[name] for name in self._by_part.get(part.name, ())]

    @cached_property
    def _by_part(self) -> Mapping[str, list[str]]:
        return _by_part(self.model, self.stored)

    def facts_inside(self) -> dict[str, np.ndarray]:
        names = [name for name in self.source.specs if self.layout.is_fact(name)]
        refuse_if(
            (
                Problem(
                    f"{self.source.location}: {name} is {self.source.specs[name]}, too large for a fact",
                    "do not trust this checkpoint",
                )
                for name in names
                if self.source.specs[name].nbytes > MAX_FACT
            ),
            SourceRefused,
        )
        return {name: self.source.read(name) for name in names}

    @property
    def unused(self) -> dict[str, str]:
        compared = set(self.stored.values())
        reasons = self.model.optional(self.layout)
        return {
            name: reasons.get(name, "a fact of the training, not a weight")
            for name in self.source.specs
            if name not in compared
        }

    def unused_weight(self, unused: Unused) -> str | None:
        name = self.layout.rename(unused.weight)
        return name if name in self.source.specs else None

    def reports(self) -> list[str]:
        """Tied weights that are stored twice, where the runtime uses one of the two alone.

        Reads the first slab of each, in which training shows: rows of an embedding that every prompt needs.
        """
        notes = []
        for alias, of in self.model.tied.items():
            if not {alias, of} & self.model.applied or self.layout.rename(alias) == self.layout.rename(of):
                continue
            used, other = (alias, of) if alias in self.model.applied else (of, alias)
            taken, left = self.layout.rename(used), self.layout.rename(other)
            if taken in self.source.specs and left in self.source.specs:
                differs = not self._begin_alike(taken, left)
                notes.append(
                    f"{taken} is taken: {self.family.runtime} uses it alone; "
                    f"{left} {'differs from it, and ' if differs else ''}is not read"
                )
        return notes

    def _begin_alike(self, *names: str) -> bool:
        """Whether two tensors are equal in their first slab."""
        first, second = (next(self.source.slabs(name))[1].copy() for name in names)
        return np.array_equal(first, second)

    def weight_specs(self) -> dict[str, Spec]:
        return {name: self.spec(name) for name in self.stored if name not in self.model.tied}

    def weights_reader(self, key: str, bound: Bound, *, flat: bool) -> tuple[WeightsReader, Bound]:
        names = bound.names
        tensors: dict[tuple[int, ...], Read] = {i: (key, self.stored[name]) for i, name in names.items()}
        if flat:
            bound = bound.flat(self.source.specs[next(iter(tensors.values()))[1]].shape)
        twins = {
            index: (key, self.stored[alias])
            for index, name in names.items()
            for alias, of in self.model.tied.items()
            if of == name and alias in self.stored
        }
        return TensorWeights(tensors, bound.sizes, twins, self.family.runtime), bound

    def corner(self, bound: Bound, positions: Positions) -> tuple[str, np.ndarray] | None:
        _, name = bound.first
        stored = self.stored[name]
        values = self.source.sample(stored, positions(self.source.specs[stored].shape))
        return None if values is None else (name, values)


@dataclass(frozen=True, kw_only=True)
class AdapterCheckpoint(Checkpoint):
    """A PEFT adapter: factors of some weights, and whole weights that stand in for the base's."""

    factors: Mapping[str, Module] = field(default_factory=dict)
    own_base: Checkpoint | None = None
    """The base, where both were saved as one model."""
    alphas_given: bool = False
    """Whether the user gave its alphas, because no file has them."""
    possible: tuple[str, ...] = ()
    """Names of the models it may be of, where neither its names nor the files beside it tell one."""
    unapplied: Mapping[str, str] = field(default_factory=dict)
    """Tensors that belong to a weight which the runtime never uses -> why it does not."""

    @property
    def unused(self) -> dict[str, str]:
        return dict(self.unapplied)

    def reports(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.unapplied.items():
            by_reason.setdefault(reason, []).append(name)
        return [
            f"{name} is left out, as {self.family.runtime} never applies it: {reason}"
            for reason, names in by_reason.items()
            for name in grouped(names)
        ]

    @property
    def contents(self) -> str:
        return "lora"

    @property
    def model_name(self) -> str:
        return " or ".join(self.possible) or self.model.name

    @property
    def modules(self) -> Mapping[str, Module]:
        return self.factors

    def arrays_of(self, part: Part) -> list[str]:
        return []

    def _modules_of(self, part: Part) -> dict[str, Module]:
        return {name: self.factors[name] for name in self._by_part.get(part.name, ())}

    @cached_property
    def _by_part(self) -> Mapping[str, list[str]]:
        return _by_part(self.model, self.factors)

    def factors_of(self, part: Part) -> list[str]:
        return [tensor for module in self._modules_of(part).values() for tensor in (module.a, module.b)]

    def ranks_of(self, part: Part) -> dict[str, int]:
        return {name.split(".")[-2]: module.rank for name, module in self._modules_of(part).items()}

    def weight_specs(self) -> dict[str, Spec]:
        """Of the weights that it changes or replaces."""
        return {name: self.weight_spec(name) for name in (*self.factors, *self.stored)}

    def weight_spec(self, name: str) -> Spec:
        """Of one weight that it changes or replaces."""
        module, specs = self.factors.get(name), self.source.specs
        if module is None:
            return self.spec(name)
        return Spec((specs[module.b].shape[0], specs[module.a].shape[1]), specs[module.b].dtype)

    def weights_reader(self, key: str, bound: Bound, *, flat: bool) -> tuple[WeightsReader, Bound]:
        raise ValueError("an adapter has no weights of its own")

    def place(self, name: str) -> tuple[Bound, Index]:
        """The leaf that a weight of this adapter belongs to, its axes as the weight has them, and the index there.

        Args:
            name: of one of :attr:`modules` or :attr:`stored`.
        """
        place = self.model.weight_index.find(name)
        assert place is not None
        (part, rule), at = place
        rule = rule.at(at)
        placeholders = rule.equation.placeholders
        shape = self.weight_spec(name).shape
        bound = Bound(part, rule, {axis: at[axis] + 1 for axis in placeholders}).flat(shape)
        return bound, tuple(at[axis] for axis in placeholders)

    def seen(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for (part, rule), at in self.model.weight_index.find_all(
            Names.of((*self.modules, *self.stored))
        ).values():
            for axis in rule.template.numbered:
                qualified = self.model.qualified(part.name, axis)
                sizes[qualified] = max(sizes.get(qualified, 0), at[axis] + 2)
        words = (
            (self.model.qualified(part.name, axis), len(choices))
            for part in self.model.parts
            for rule in part.rules
            for axis, choices in rule.template.choices.items()
        )
        return {**sizes, **dict(words)}

    def factor_reader(self, key: str, bound: Bound, scale: Scale | None) -> FactorReader | None:
        modules = {
            index: ((key, module.a), (key, module.b), module.scale)
            for index, name in bound.names.items()
            if (module := self.factors.get(name)) is not None
        }
        return ModuleFactors(modules) if modules else None


def _by_part(model: Model, weights: Iterable[str]) -> dict[str, list[str]]:
    """Weights, by their names in the rules, by the name of the part that they are of."""
    by_part: dict[str, list[str]] = {}
    for name, ((part, _), _) in model.weight_index.find_all(Names.of(weights)).items():
        by_part.setdefault(part.name, []).append(name)
    return by_part
