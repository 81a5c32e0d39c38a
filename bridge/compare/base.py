"""Numbers that a plan needs from data: weights that differ from a base, and compression errors."""

from __future__ import annotations

import math
from collections.abc import Callable

from bridge.arrays import FLOAT32
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.compare.gaps import Gap, Values, gap
from bridge.compare.sides import Both, Side, walk
from bridge.conversion.outputs import Output
from bridge.errors import Problem
from bridge.lora.algebra import compress, split
from bridge.peft.config import PREFIX, A
from bridge.stream.inputs import Inputs
from bridge.stream.readers import Done, LeafFactors
from bridge.stream.writers import AdapterWriter


def misfits(checkpoint: Checkpoint, reference: Checkpoint) -> list[Problem]:
    """Why the weights of a reference cannot be those that an adapter of a checkpoint applies to."""
    ours, theirs = _weight_shapes(checkpoint), _weight_shapes(reference)
    found = [
        f"{name} is {list(shape)} here, and {list(theirs[name]) if name in theirs else 'missing'} there"
        for name, shape in ours.items()
        if theirs.get(name) != shape
    ]
    found += [
        f"{name} is {list(theirs[name])} there, and missing here" for name in theirs if name not in ours
    ]
    if not found:
        return []
    return [
        Problem(
            f"{checkpoint.source.location} does not fit {reference.source.location}: {len(found)} weights "
            "disagree: " + "; ".join(found[:3]),
            "give a base of the same dimensions with --base",
        )
    ]


def _weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape of every weight, by openpi's PyTorch name."""
    if checkpoint.layout is not None:
        return {
            name: checkpoint.source.specs[stored].shape
            for name, stored in checkpoint.stored.items()
            if name not in checkpoint.model.tied
        }
    shapes = {}
    for part in checkpoint.model.parts:
        sizes = checkpoint.model.local_sizes(part.name, checkpoint.sizes)
        for rule in part.rules:
            for _, name in rule.weights(sizes):
                shapes[name] = rule.equation.weight_shape(sizes)
    return shapes


def differences(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 2,
) -> dict[str, float]:
    """Weights of a checkpoint (factors aside) that are not the reference's, and by how much.

    Args:
        checkpoint: the one whose weights are listed.
        reference: another of the same dimensions: see :func:`misfits`.
        progress: called with the bytes dealt with, and their total.
        workers: leaves compared at once.

    Returns:
        openpi's name of every weight that differs -> the norm of the difference over the norm of
        the reference. Streams both; each worker holds one weight of each.
    """
    sides = Side(Inputs(reference), None), Side(Inputs(checkpoint), None)
    squares: dict[str, list[float]] = {}
    for name, found in walk(*sides, _named_gap, workers=workers, progress=progress).looks:
        sums = squares.setdefault(name, [0.0, 0.0, 0.0])
        for number, more in enumerate((found.largest, found.squares, found.norm)):
            sums[number] += more
    return {
        name: math.sqrt(gap / norm) if norm else math.inf
        for name, (largest, gap, norm) in squares.items()
        if largest != 0
    }


def _named_gap(both: Both) -> tuple[str, Gap]:
    return both.name, gap(Values(both.a.w), Values(both.b.w))


def compression_errors(inputs: Inputs, adapter: Output) -> dict[str, float]:
    """The relative Frobenius error of every module that an adapter's rank limit changes, by its path."""
    errors: dict[str, float] = {}
    for step in adapter.steps:
        writer = step.writer
        if not isinstance(writer, AdapterWriter) or writer.compress_to is None:
            continue
        assert isinstance(step.factors, LeafFactors)
        factors_at = step.factors.open(step.rule, inputs.sources, Done(), None)
        for index, pair in writer.pairs.items():
            factors = factors_at(index)
            a, b = split(step.rule.equation.one, factors.a.astype(FLOAT32), factors.b.astype(FLOAT32))
            if len(a) > writer.compress_to:
                module = pair.a.removesuffix(A).removeprefix(PREFIX)
                errors[module] = compress(a, b, writer.compress_to)[2]
    return errors
