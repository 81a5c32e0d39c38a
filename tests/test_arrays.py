"""Boxes of arrays: a shape is cut into runs that follow each other in memory."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bridge.arrays import FLOAT32, Spec, box, cells, run_shape

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 500))
def test_runs_follow_each_other_in_c_order(shape: tuple[int, ...], limit: int) -> None:
    spec = Spec(shape, FLOAT32)
    run = run_shape(spec, limit)
    assert Spec(run, FLOAT32).nbytes <= max(limit, 4)
    order = np.arange(spec.size).reshape(shape)
    together = [order[box(at, part)].reshape(-1) for at, part in cells(shape, run)]
    assert list(itertools.chain(*together)) == list(range(spec.size))
