"""What a plan reads from: the source, its base where there is one, and how leaves are read from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from bridge.arrays import Spec
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.given_sizes import flags
from bridge.checkpoint.sizes import open_axes
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.lora.factors import Scale
from bridge.rules.model import Bound, Model
from bridge.stream.readers import FactorReader, Read, ReplacedWeights, WeightsReader
from bridge.stream.resize import ResizedFactors, ResizedWeights


@dataclass(frozen=True)
class Inputs:
    """The checkpoints a plan reads from. ``weights`` is the base where there is one."""

    source: Checkpoint
    base: Checkpoint | None = None
    resized: Mapping[str, int] = field(default_factory=dict)
    """Axes, by the names under which sizes are kept, that come out at another length than they are stored in."""
    seed: int = 0
    """Of what is drawn where they are longer."""

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

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every axis, as it comes out."""
        return {**self.weights.sizes, **self.resized}

    @property
    def cut(self) -> list[str]:
        """The axes among them that come out shorter."""
        return [axis for axis, length in self.resized.items() if length < self.weights.sizes[axis]]

    def bound(self) -> Iterator[Bound]:
        """Every leaf of the model with its sizes."""
        return self.model.bind(self.sizes)

    def _stored(self, bound: Bound) -> dict[str, int]:
        """Lengths in the source of the axes of a leaf that are resized, by the rule's own names."""
        named = {axis: self.model.qualified(bound.part.name, axis) for axis in bound.rule.named_axes}
        return {axis: self.weights.sizes[name] for axis, name in named.items() if name in self.resized}

    def weights_reader(self, bound: Bound, *, flat: bool) -> tuple[WeightsReader, Bound]:
        """How a leaf's weights are read, and the leaf in the form that reading needs.

        Args:
            bound: the leaf.
            flat: read tensors without taking their rows apart, which needs no more than their shapes.
        """
        stored = self._stored(bound)
        as_stored = replace(bound, sizes={**bound.sizes, **stored})
        weights, used = self.weights.weights_reader(self.weights_key, as_stored, flat=flat)
        # an adapter's modules_to_save stand in for the base's own
        own = {
            index: ("source", self.source.stored[name])
            for index, name in used.names.items()
            if self.base is not None and name in self.source.stored
        }
        if own:
            weights = ReplacedWeights(weights, own, used.sizes)
        if not stored:
            return weights, used
        assert bound.rule.start is not None
        used = replace(used, sizes={**used.sizes, **{axis: bound.sizes[axis] for axis in stored}})
        resized = ResizedWeights(
            weights=weights, stored=stored, lengths=used.sizes, start=bound.rule.start, seed=self.seed
        )
        return resized, used

    def factor_reader(self, bound: Bound, scale: Scale | None) -> FactorReader | None:
        """How the factors of a leaf's weights are read, or None where it has none."""
        factors = self.source.factor_reader("source", bound, scale)
        if factors is None or not self._stored(bound):
            return factors
        return ResizedFactors(factors, bound.sizes)


def shape_problems(inputs: Inputs) -> list[Problem]:
    """Modules of an adapter whose factors do not fit the weights of the base."""
    adapter, base = inputs.source, inputs.base
    assert base is not None
    ours, theirs = base.weight_specs(), adapter.weight_specs()
    # in the model's order, whatever the containers'
    known = dict.fromkeys(name for bound in base.bound() for name in bound.names.values())
    misfits = [
        f"{name} is {list(ours[name].shape)} in the base, {list(theirs[name].shape)} in the adapter"
        for name in known
        if name in ours and name in theirs and ours[name].shape != theirs[name].shape
    ]
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
    weights = inputs.weights
    unknown = open_axes(inputs.model, weights.sizes)
    if not unknown or weights.problems:
        return []
    hint = weights.family.size_hint
    return [
        Problem(
            f"{weights.source.location}: cannot infer {', '.join(unknown)} from tensor shapes",
            f"add {flags(weights.choices)}, or --config FILE; or {hint}" if weights.choices else hint,
        )
    ]
