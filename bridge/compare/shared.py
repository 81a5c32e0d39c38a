"""Two sides of which one was cut or padded along an axis: without what one of them alone has."""

from __future__ import annotations

from dataclasses import replace

from bridge.checkpoint.sizes import recorded_resizes
from bridge.compare.sides import Side


def shared(a: Side, b: Side) -> tuple[Side, Side, dict[str, tuple[int, int]]]:
    """Both sides without what one of them alone has of an axis, where one records that it was resized from the other.

    Returns:
        The sides, and for each such axis how many entries are compared, and how many the longer side has.
    """
    ours, theirs = a.inputs.sizes, b.inputs.sizes
    recorded: dict[str, set[int]] = {}
    for side in (a, b):
        for checkpoint in side.inputs.checkpoints.values():
            for axis, lengths in recorded_resizes(checkpoint.source.root).items():
                recorded.setdefault(axis, set()).update(lengths)
    both = {
        axis: (min(ours[axis], theirs[axis]), max(ours[axis], theirs[axis]))
        for axis, lengths in recorded.items()
        if axis in ours and axis in theirs and {ours[axis], theirs[axis]} == lengths
    }
    sides = []
    for side in (a, b):
        longer = {axis: least for axis, (least, _) in both.items() if side.inputs.sizes[axis] > least}
        sides.append(replace(side, inputs=replace(side.inputs, resized=longer)))
    return sides[0], sides[1], both
