"""Slabs assembled into cells: each cell complete, in order, and given out once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.arrays import FLOAT32, Spec, box, cells, run_shape
from bridge.stream.assemble import Gather

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@given(SHAPES.filter(bool), st.integers(1, 400), st.integers(1, 90))
@settings(max_examples=200, deadline=None)
def test_what_is_gathered_comes_whole_and_in_order(
    shape: tuple[int, ...], cell_bytes: int, slab: int
) -> None:
    spec = Spec(shape, FLOAT32)
    values = np.arange(spec.size, dtype=np.float32).reshape(shape)
    gather = Gather(shape, run_shape(spec, cell_bytes), FLOAT32, [])
    begins, given_out = [], b""
    for at, part in cells(shape, run_shape(spec, slab)):
        for of_box, into, begin in gather.parts(at, part):
            into[...] = values[box(at, part)][of_box]
            whole = gather.filled(begin, into.size)
            if whole is not None:
                begins.append(begin)
                given_out += whole.tobytes()
                gather.release(begin)
    assert gather.is_done and given_out == values.tobytes()
    assert begins == [at for at, _ in cells(shape, run_shape(spec, cell_bytes))]
