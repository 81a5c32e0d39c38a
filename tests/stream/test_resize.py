"""Weights cut and padded while they are read, box by box, whatever the boxes are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bridge import LecunNormal, Model, Multiple, Part, Rule, Zeros
from bridge.stream.readers import Done, Region
from bridge.stream.resize import ResizedWeights

RULE = Rule("a/kernel", "a.{layer}.weight", "layer inner mid outer -> outer inner mid", start=LecunNormal())
STORED = {"layer": 2, "inner": 7, "mid": 3, "outer": 11}


@dataclass(frozen=True)
class Boxes:
    """A reader that gives boxes of an array, cut at the borders of a grid."""

    leaf: np.ndarray
    grid: tuple[int, int, int]
    reads = ()

    def regions(self, *_: Any) -> Iterator[Region]:
        _, *shape = self.leaf.shape
        for layer in range(len(self.leaf)):
            starts = (range(0, n, step) for n, step in zip(shape, self.grid, strict=True))
            for at in itertools.product(*starts):
                part = tuple(slice(a, a + step) for a, step in zip(at, self.grid, strict=True))
                yield Region((layer,), at, self.leaf[layer][part])


LENGTHS = {
    "one longer": {"inner": 13},
    "one shorter": {"outer": 5},
    "two longer": {"inner": 8, "outer": 17},
    "longer and shorter": {"inner": 13, "outer": 2},
    "a box and no more": {"inner": 4},
}


@pytest.mark.parametrize("grid", [(7, 3, 11), (4, 1, 11), (1, 3, 5), (3, 2, 4)])
@pytest.mark.parametrize("how", LENGTHS)
def test_every_entry_comes_once(how: str, grid: tuple[int, int, int]) -> None:
    leaf = np.random.default_rng(0).standard_normal(list(STORED.values())).astype(np.float32)
    lengths = {**STORED, **LENGTHS[how]}
    reader = ResizedWeights(
        weights=Boxes(leaf, grid),  # type: ignore[arg-type]
        stored={axis: STORED[axis] for axis in LENGTHS[how]},
        lengths=lengths,
        start=LecunNormal(),
        seed=3,
    )
    out = np.zeros(list(lengths.values()), np.float32)
    times = np.zeros(out.shape, int)
    done = Done()
    for region in reader.regions(RULE, {}, done, None):
        part = (region.index[0], *(slice(a, a + n) for a, n in zip(region.at, region.w.shape, strict=True)))
        out[part] = region.w
        times[part] += 1
    assert (times == 1).all()
    both = tuple(slice(0, min(lengths[axis], n)) for axis, n in STORED.items())
    assert np.array_equal(out[both], leaf[both])
    new = np.ones(out.shape, bool)
    new[both] = False
    assert out[new].all() and np.count_nonzero(new) == (done.drawn[RULE.leaf].values if new.any() else 0)
    # drawn in the weight's own order: outer inner mid
    for layer in range(2):
        shape = (lengths["outer"], lengths["inner"], lengths["mid"])
        drawn = LecunNormal().fill(f"3:a/kernel:({layer},)", shape, shape[1] * shape[2])
        assert np.array_equal(out[layer][new[layer]], drawn.transpose(1, 2, 0)[new[layer]])


def test_an_axis_that_cannot_follow_is_refused_when_declared() -> None:
    def model(axes: str, **options: Any) -> Model:
        rules = (
            Rule("a/kernel", "a.weight", axes, **options),
            Rule("b/kernel", "b.weight", "twice -> twice"),
        )
        return Model(name="toy", parts=(Part("p", rules),), multiples=(Multiple("p.twice", 2, "p.outer"),))

    good = model("inner outer -> outer inner", start=Zeros())
    good.check_resizable("p.inner")
    for broken, axis, says in (
        (model("inner outer -> outer inner"), "p.inner", "what fresh entries start as"),
        (model("head inner outer -> (head outer) inner", start=Zeros()), "p.head", "by itself"),
        (good, "p.outer", "a multiple of it"),
        (good, "p.width", "no rule has the axis p.width"),
    ):
        with pytest.raises(ValueError, match=says):
            broken.check_resizable(axis)
