"""Numbers that a plan needs from data: weights that differ from a base, and compression errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bridge.checkpoint import Checkpoint, weight_names
from bridge.errors import Problem
from bridge.inputs import Inputs
from bridge.lora import compress, split
from bridge.outputs import Output
from bridge.peft import PREFIX, A
from bridge.pieces import Done, LeafWeights, Piece
from bridge.rule import Rule
from bridge.specs import FLOAT32
from bridge.writers import AdapterWriter


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
            for _, name in weight_names(rule, sizes):
                shapes[name] = rule.equation.weight_shape(sizes)
    return shapes


def differences(
    checkpoint: Checkpoint, reference: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Weights of a checkpoint (factors aside) that are not the reference's, and by how much.

    Returns:
        openpi's name of every weight that differs -> the norm of the difference over the norm of
        the reference. Streams both; holds one weight of each.
    """
    found: dict[str, float] = {}
    total = sum(
        checkpoint.source.specs[checkpoint.stored[rule.leaf]].nbytes for rule in checkpoint.model.rules
    )
    count = 0
    for part in checkpoint.model.parts:
        sizes = checkpoint.model.local_sizes(part.name, checkpoint.sizes)
        for rule in part.rules:
            names = dict(weight_names(rule, sizes))
            squares: dict[str, list[float]] = {}
            ours = LeafWeights("source", checkpoint.stored[rule.leaf]).pieces(
                rule, {"source": checkpoint.source}, Done(), None
            )
            for piece in ours:
                name = names[piece.index]
                theirs = _same_piece(reference, rule, sizes, name, piece)
                if theirs is None or theirs.shape != piece.w.shape:
                    squares[name] = [float("inf"), 1.0]
                    continue
                if piece.w.dtype == theirs.dtype and piece.w.tobytes() == theirs.tobytes():
                    continue
                wide, ref = piece.w.astype(np.float64), theirs.astype(np.float64)
                gap, norm = float(((wide - ref) ** 2).sum()), float((ref**2).sum())
                if gap:
                    before = squares.setdefault(name, [0.0, 0.0])
                    before[0] += gap
                    before[1] += norm
            found |= {
                name: float(np.sqrt(gap / norm)) if norm else float("inf")
                for name, (gap, norm) in squares.items()
            }
            count += checkpoint.source.specs[checkpoint.stored[rule.leaf]].nbytes
            if progress is not None:
                progress(count, total)
    return found


def _same_piece(
    reference: Checkpoint, rule: Rule, sizes: dict[str, int], name: str, piece: Piece
) -> np.ndarray | None:
    """The reference's values of a piece, in the leaf's axes."""
    equation = rule.equation
    if reference.layout is None:
        stored = reference.stored[rule.leaf]
        if not equation.placeholders:
            rows = slice(piece.start, piece.start + len(piece.w)) if equation.streams else None
            return next(one for _, one in equation.slices(reference.source.read(stored, rows)))
        if equation.left[0] not in equation.placeholders:
            return dict(equation.slices(reference.source.read(stored)))[piece.index]
        leaf = reference.source.read(stored, slice(piece.index[0], piece.index[0] + 1))
        return dict(equation.slices(leaf))[(0, *piece.index[1:])]
    if name not in reference.stored:
        return None
    stored = reference.stored[name]
    shape = reference.source.specs[stored].shape
    if shape != equation.weight_shape(sizes):
        return None
    if equation.streams and not equation.placeholders:
        rows = slice(piece.start, piece.start + len(piece.w))
        return reference.source.read(stored, rows)
    return equation.restore(reference.source.read(stored), sizes)


def compression_errors(inputs: Inputs, adapter: Output) -> dict[str, float]:
    """The relative Frobenius error of every module that an adapter's rank limit changes, by its path."""
    errors: dict[str, float] = {}
    for step in adapter.steps:
        writer = step.writer
        if not isinstance(writer, AdapterWriter) or writer.compress_to is None or step.factors is None:
            continue
        factors_at = step.factors.open(step.rule, inputs.sources, Done(), None)
        for index, pair in writer.pairs.items():
            factors = factors_at(index)
            assert factors is not None
            a, b = split(step.rule.equation.one, factors.a.astype(FLOAT32), factors.b.astype(FLOAT32))
            if len(a) > writer.compress_to:
                module = pair.a.removesuffix(A).removeprefix(PREFIX)
                errors[module] = compress(a, b, writer.compress_to)[2]
    return errors
