"""What a plan reads from: the source, its base where there is one, and how rules are read from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bridge.arrays import Spec
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.scales import Scale
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.lora.algebra import factor_axes
from bridge.rules.equation import Index
from bridge.rules.model import Model, Part
from bridge.rules.rule import Rule
from bridge.stream.readers import (
    FactorReader,
    LeafFactors,
    LeafWeights,
    ModuleFactors,
    Read,
    ReplacedWeights,
    TensorWeights,
    Weights,
)


@dataclass(frozen=True)
class Inputs:
    """The checkpoints a plan reads from. ``weights`` is the base where there is one."""

    source: Checkpoint
    base: Checkpoint | None = None

    @property
    def weights(self) -> Checkpoint:
        return self.base or self.source

    @property
    def weights_key(self) -> str:
        return "base" if self.base else "source"

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        return {"source": self.source} | ({"base": self.base} if self.base else {})

    @property
    def sources(self) -> dict[str, Source]:
        return {key: checkpoint.source for key, checkpoint in self.checkpoints.items()}

    @property
    def model(self) -> Model:
        return self.weights.model

    def spec(self, read: Read) -> Spec:
        return self.sources[read[0]].specs[read[1]]


def weights_reader(
    inputs: Inputs, rule: Rule, sizes: dict[str, int], *, flat: bool
) -> tuple[Weights, Rule, dict[str, int]]:
    """How a rule's weights are read, with the rule and sizes in the form that reading needs.

    ``flat`` reads tensors without taking their rows apart, which needs no more than their shapes.
    """
    checkpoint, key = inputs.weights, inputs.weights_key
    weights: Weights
    if checkpoint.layout is None:
        weights = LeafWeights(key, checkpoint.stored[rule.leaf])
    else:
        names = dict(rule.weights(sizes))
        tensors = {index: (key, checkpoint.stored[name]) for index, name in names.items()}
        if flat:
            shape = inputs.spec(next(iter(tensors.values()))).shape
            rule = rule.flat
            placeholders = {axis: sizes[axis] for axis in rule.equation.placeholders}
            groups = (group[0] for group in rule.equation.right)
            sizes = {**placeholders, **dict(zip(groups, shape, strict=True))}
        twins = {
            index: (key, checkpoint.stored[alias])
            for index, name in names.items()
            for alias, of in inputs.model.tied.items()
            if of == name and alias in checkpoint.stored
        }
        weights = TensorWeights(tensors, sizes, twins)
    if inputs.base is not None:
        # an adapter's modules_to_save stand in for the base's own
        own = {
            index: ("source", inputs.source.stored[name])
            for index, name in rule.weights(sizes)
            if name in inputs.source.stored
        }
        if own:
            weights = ReplacedWeights(weights, own, sizes)
    return weights, rule, sizes


def factor_reader(
    inputs: Inputs, rule: Rule, names: Mapping[Index, str], scale: Scale | None
) -> FactorReader | None:
    """How the factors of a rule's weights are read, or None where it has none."""
    if inputs.base is not None:
        modules = {
            index: (("source", module.a), ("source", module.b), module.scale)
            for index, name in names.items()
            if (module := inputs.source.modules.get(name)) is not None
        }
        return ModuleFactors(modules) if modules else None
    if not inputs.source.has_lora(rule):
        return None
    return leaf_factors(inputs.source, rule, scale)


def leaf_factors(checkpoint: Checkpoint, rule: Rule, scale: Scale | None) -> LeafFactors:
    """How a leaf's factors are read, with the scale openpi's runtime gives their product."""
    assert rule.factor_leaves is not None and rule.lora is not None
    a, b = (checkpoint.stored[name] for name in rule.factor_leaves)
    return LeafFactors("source", a, b, scale.value if rule.lora.scaled and scale is not None else 1.0)


def kept_entries(rule: Rule, sizes: Mapping[str, int]) -> int:
    """How many blocks the factors of one weight have: the entries of axes that both keep."""
    axes = factor_axes(rule.equation.one)
    return math.prod(sizes[axis] for axis in axes.shared if axis in rule.equation.right[0])


def shape_problems(inputs: Inputs) -> list[Problem]:
    """Modules of an adapter whose factors do not fit the weights of the base."""
    adapter, base = inputs.source, inputs.base
    assert base is not None
    misfits = []
    for part in base.model.parts:
        sizes = base.model.local_sizes(part.name, base.sizes)
        for rule in part.rules:
            if any(axis not in sizes for axis in rule.equation.placeholders):
                continue
            for _, name in rule.weights(sizes):
                shape = _weight_shape(base, rule, sizes, name)
                found = _adapter_shape(adapter, name)
                if found is not None and shape is not None and found != shape:
                    misfits.append(f"{name} is {list(shape)} in the base, {list(found)} in the adapter")
    known = {name for part in base.model.parts for rule in part.rules for name in _names(base, part, rule)}
    misfits += [
        f"{name} is not in the base" for name in (*adapter.modules, *adapter.stored) if name not in known
    ]
    if not misfits:
        return []
    return [
        Problem(
            f"{adapter.source.location} does not fit {base.source.location}: {len(misfits)} weights disagree: "
            + "; ".join(misfits[:3]),
            "give the base that the adapter was trained on with --base",
        )
    ]


def size_problems(inputs: Inputs) -> list[Problem]:
    """Sizes that a JAX pytree needs and PyTorch weights alone do not tell."""
    model, sizes = inputs.model, inputs.weights.sizes
    unknown = sorted(
        {
            model.qualified(part.name, axis)
            for part in model.parts
            for rule in part.rules
            for axis in rule.equation.left
            if axis.isidentifier() and model.qualified(part.name, axis) not in sizes
        }
    )
    if not unknown or inputs.weights.problems:
        return []
    return [
        Problem(
            f"{inputs.weights.source.location}: its tensors do not tell {', '.join(unknown)}",
            "put the config.json of the model beside them (num_attention_heads, head_dim)",
        )
    ]


def _names(base: Checkpoint, part: Part, rule: Rule) -> Iterator[str]:
    sizes = base.model.local_sizes(part.name, base.sizes)
    return (name for _, name in rule.weights(sizes))


def _weight_shape(
    base: Checkpoint, rule: Rule, sizes: Mapping[str, int], name: str
) -> tuple[int, ...] | None:
    if base.layout is not None:
        return base.source.specs[base.stored[name]].shape if name in base.stored else None
    return rule.equation.weight_shape(sizes)


def _adapter_shape(adapter: Checkpoint, name: str) -> tuple[int, ...] | None:
    if name in adapter.modules:
        module = adapter.modules[name]
        return adapter.source.specs[module.b].shape[0], adapter.source.specs[module.a].shape[1]
    return adapter.source.specs[adapter.stored[name]].shape if name in adapter.stored else None
