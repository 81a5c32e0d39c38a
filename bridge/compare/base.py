"""A checkpoint against the base it may have been trained from: which weights differ."""

from __future__ import annotations

import math

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.inputs import Inputs
from bridge.compare.gaps import Gap, Values, gap
from bridge.compare.sides import Side, WeightPair, walk
from bridge.errors import Problem
from bridge.stream.workers import Progress


def misfits(checkpoint: Checkpoint, reference: Checkpoint) -> list[Problem]:
    """Why the weights of a reference cannot be those that an adapter of a checkpoint applies to."""
    ours, theirs = (
        {name: spec.shape for name, spec in each.weight_specs().items()} for each in (checkpoint, reference)
    )
    differing = [
        f"{name} is {list(shape)} here, {list(theirs[name]) if name in theirs else 'missing'} there"
        for name, shape in ours.items()
        if theirs.get(name) != shape
    ]
    differing += [
        f"{name} is {list(theirs[name])} there, missing here" for name in theirs if name not in ours
    ]
    if not differing:
        return []
    return [
        Problem(
            f"{checkpoint.source.location} does not fit {reference.source.location}: {len(differing)} weights "
            "disagree: " + "; ".join(differing[:3]),
            "give a base of the same dimensions with --base",
        )
    ]


def differences(
    checkpoint: Checkpoint, reference: Checkpoint, progress: Progress | None = None, workers: int = 2
) -> dict[str, float]:
    """Weights of a checkpoint (factors aside) that are not the reference's, and by how much.

    Args:
        checkpoint: whose weights are listed.
        reference: another of the same dimensions: see :func:`misfits`.
        progress: called with the bytes processed, and their total.
        workers: leaves compared at once.

    Returns:
        Name in the rules of every weight that differs -> the norm of the difference over the norm of
        the reference. Streams both; each worker has one weight of each in memory.
    """
    sides = Side(Inputs(reference), None), Side(Inputs(checkpoint), None)
    squares: dict[str, list[float]] = {}
    for name, measured in walk(*sides, _named_gap, workers=workers, progress=progress).results:
        sums = squares.setdefault(name, [0.0, 0.0, 0.0])
        for number, more in enumerate((measured.largest, measured.squares, measured.norm)):
            sums[number] += more
    return {
        name: math.sqrt(gap / norm) if norm else math.inf
        for name, (largest, gap, norm) in squares.items()
        if largest != 0
    }


def _named_gap(pair: WeightPair) -> tuple[str, Gap]:
    return pair.name, gap(Values(pair.a.w), Values(pair.b.w))
