"""Two states of one policy, read side by side: what `verify` and `diff` walk over.

A side is a checkpoint, or an adapter on its base. Walking gives, for every weight, what each side
holds of it: the values, and LoRA factors where they are unmerged. Both are streamed; one weight
of each is in memory (a run of rows, for an embedding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge import converters
from bridge.axes import Index
from bridge.checkpoint import Checkpoint, open_source, understand, weight_names
from bridge.errors import CheckpointRefused, Problem, RouteRefused, refuse_if
from bridge.formats.location import Location
from bridge.inputs import Inputs, factor_reader, shape_problems, weights_reader
from bridge.model import Model, Part
from bridge.pieces import Done, Factors, Matrices, ModuleFactors, Piece
from bridge.rule import Rule
from bridge.scales import Scale, scales


@dataclass(frozen=True)
class Side:
    """One of the two: its checkpoints, and the scales openpi's runtime gives its factors."""

    inputs: Inputs
    scales: Mapping[str, Scale] | None
    """None where factors are left out of account."""

    @property
    def checkpoint(self) -> Checkpoint:
        return self.inputs.source

    @property
    def is_jax(self) -> bool:
        """Whether the weights lie in a pytree, so that openpi's JAX code would run them."""
        return self.inputs.weights.layout is None

    @property
    def has_lora(self) -> bool:
        return self.checkpoint.state in (converters.ORBAX_LORA, converters.PEFT)


@dataclass(frozen=True)
class Held:
    """What a side holds of one weight (or of a run of its rows)."""

    w: np.ndarray
    """In the leaf's axes, placeholders taken out; the stored dtype."""
    factors: Factors | None = None
    """openpi's factors, in the leaf's axes."""
    matrices: Matrices | None = None
    """An adapter's factors."""

    @property
    def has_factors(self) -> bool:
        return self.factors is not None or self.matrices is not None


@dataclass(frozen=True)
class Both:
    """One weight on both sides."""

    part: Part
    rule: Rule
    name: str
    """Its PyTorch name, in openpi's layout."""
    index: Index
    start: int
    a: Held
    b: Held


def open_side(
    path: str | Path,
    base: str | Path | None,
    lora_alpha: Mapping[str, float],
    rslora: bool,
    *,
    needs_scale: bool = True,
) -> Side:
    """Open a checkpoint, or an adapter with its base.

    Raises:
        Refusal: with every problem found.
    """
    checkpoint = understand(open_source(Location.parse(path)))
    problems = list(checkpoint.problems)
    if checkpoint.state is converters.PEFT:
        if base is None:
            raise RouteRefused(
                Problem(
                    f"{checkpoint.source.location} is an adapter, and its base is not given",
                    "add --base PATH",
                )
            )
        weights = understand(open_source(Location.parse(base)))
        inputs = Inputs(checkpoint, weights)
        problems += weights.problems
        if not problems:
            problems += shape_problems(inputs)
        refuse_if(problems, CheckpointRefused)
        return Side(inputs, {})
    refuse_if(problems, CheckpointRefused)
    if checkpoint.state is not converters.ORBAX_LORA or not needs_scale:
        return Side(Inputs(checkpoint), {} if needs_scale else None)
    found, problems = scales(checkpoint, lora_alpha, rslora)
    refuse_if(problems, CheckpointRefused)
    return Side(Inputs(checkpoint), found)


def same_model(a: Side, b: Side) -> Model:
    """The model both sides are of, with every size known from one of them.

    Raises:
        CheckpointRefused: they are different models or dimensions.
    """
    model = a.inputs.model
    if model.name != b.inputs.model.name or model.rules_key != b.inputs.model.rules_key:
        raise CheckpointRefused(
            Problem(
                f"{a.inputs.weights.source.location} is {model.name}, and {b.inputs.weights.source.location} is "
                f"{b.inputs.model.name}",
                "compare two checkpoints of one model",
            )
        )
    ours, theirs = a.inputs.weights.sizes, b.inputs.weights.sizes
    ranks = {
        model.qualified(part.name, rule.lora.rank) for part in model.parts for rule in part.rules if rule.lora
    }
    refuse_if(
        (
            Problem(
                f"{axis} is {ours[axis]} in {a.inputs.weights.source.location}, and {theirs[axis]} in "
                f"{b.inputs.weights.source.location}",
                "compare two checkpoints of the same dimensions",
            )
            for axis in sorted((ours.keys() & theirs.keys()) - ranks)
            if ours[axis] != theirs[axis]
        ),
        CheckpointRefused,
    )
    return model


def walk(a: Side, b: Side, tick: Callable[[int], None] | None = None) -> Iterator[Both]:
    """Every weight on both sides, in the order of the model's rules."""
    model = same_model(a, b)
    sizes = {**a.inputs.weights.sizes, **b.inputs.weights.sizes}
    # without a pytree on either side nothing tells heads apart, and nothing needs to
    flat = not (a.is_jax or b.is_jax)
    for part in model.parts:
        local = model.local_sizes(part.name, sizes)
        for rule in part.rules:
            used = rule.flat if flat else rule
            names = dict(weight_names(rule, {axis: local[axis] for axis in rule.equation.placeholders}))
            sides = [_pieces(side, part, rule, local, flat=flat) for side in (a, b)]
            for (piece_a, held_a), (_, held_b) in _aligned(sides[0], sides[1]):
                yield Both(part, used, names[piece_a.index], piece_a.index, piece_a.start, held_a, held_b)
                if tick is not None:
                    tick(held_a.w.nbytes + held_b.w.nbytes)


def counter(sides: Iterable[Side], progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """A tick for :func:`walk` that passes on the bytes dealt with so far, and their total."""
    total = sum(spec.nbytes for side in sides for spec in side.inputs.weights.source.specs.values())
    count = 0

    def tick(seen: int) -> None:
        nonlocal count
        count += seen
        if progress is not None:
            progress(min(count, total), total)

    return tick


Pieces = Iterator[tuple[Piece, Held]]


def _pieces(side: Side, part: Part, rule: Rule, sizes: dict[str, int], *, flat: bool) -> Pieces:
    weights, used, local = weights_reader(side.inputs, rule, sizes, flat=flat)
    names = dict(weight_names(used, local))
    reader = factor_reader(side.inputs, used, names, local, (side.scales or {}).get(part.name))
    sources, done = side.inputs.sources, Done()
    factors_at = None
    if reader is not None and not isinstance(reader, ModuleFactors) and side.scales is not None:
        factors_at = reader.open(used, sources, done, None)
    for piece in weights.pieces(used, sources, done, None):
        factors = factors_at(piece.index) if factors_at is not None else None
        matrices = (
            reader.matrices(piece.index, sources, done, None) if isinstance(reader, ModuleFactors) else None
        )
        yield piece, Held(piece.w, factors, matrices)


def _aligned(a: Pieces, b: Pieces) -> Iterator[tuple[tuple[Piece, Held], tuple[Piece, Held]]]:
    """Pair pieces of the same weight; runs of rows are cut to the same length on both sides."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        rows = min(len(left[1].w), len(right[1].w)) if left[1].w.ndim else 0
        if left[1].w.shape == right[1].w.shape:
            yield left, right
            left, right = next(a, None), next(b, None)
            continue
        yield _cut(left, 0, rows), _cut(right, 0, rows)
        left = _cut(left, rows, None) if len(left[1].w) > rows else next(a, None)
        right = _cut(right, rows, None) if len(right[1].w) > rows else next(b, None)


def _cut(pair: tuple[Piece, Held], first: int, stop: int | None) -> tuple[Piece, Held]:
    piece, held = pair
    w = held.w[first:stop]
    return Piece(piece.index, piece.start + first, w), Held(w, held.factors, held.matrices)
