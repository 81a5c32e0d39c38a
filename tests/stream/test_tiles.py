"""Tiles against plain numpy: any order of axes, any strides, any box, with and without a product."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.arrays import BFLOAT16, FLOAT16, FLOAT32, box
from bridge.lora.factors import Spread
from bridge.stream import tiles
from bridge.stream.tiles import NonFinite, Product, Workspace, place

DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


def arranged(shape: tuple[int, ...], order: list[int], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """Random numbers of this shape whose axes lie in memory in this order."""
    values = np.random.default_rng(seed).standard_normal([shape[axis] for axis in order]).astype(dtype)
    return values.transpose(np.argsort(order))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int]]:
    shape = draw(SHAPES)
    axes = list(range(len(shape)))
    return shape, draw(st.permutations(axes)), draw(st.permutations(axes))


@given(layouts(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_moves_and_casts_as_numpy_does(
    layout: tuple[tuple[int, ...], list[int], list[int]], source: np.dtype, target: np.dtype, edge: int
) -> None:
    shape, to, origin = layout
    src = arranged(shape, origin, source)
    dst = arranged(shape, to, target, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", edge * edge)
        patch.setattr(tiles, "_WIDTH", edge)
        seen = NonFinite()
        place(dst, src, None, Workspace(), seen)
    assert dst.tobytes() == src.astype(target).tobytes()
    assert seen == NonFinite()


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_adds_a_product_to_any_box(output: list[int], inputs: list[int], data: st.DataObject) -> None:
    """Axes grouped as rows and columns of a matrix, the box anywhere, every order in memory."""
    shape = (*output, *inputs)
    axes = list(range(len(shape)))
    rng = np.random.default_rng(3)
    rank = data.draw(st.integers(1, 4))
    a = rng.standard_normal((rank, *inputs)).astype(np.float32)
    b = rng.standard_normal((*output, rank)).astype(np.float32)
    src = arranged(shape, data.draw(st.permutations(axes)), data.draw(st.sampled_from(DTYPES)))
    dst = arranged(shape, data.draw(st.permutations(axes)), FLOAT32, seed=1)
    change = b.reshape(-1, rank) @ a.reshape(rank, -1)
    expected = src.astype(np.float32) + (np.float32(0.5) * change).reshape(shape)
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    part = tuple(data.draw(st.integers(1, n - begin)) for begin, n in zip(at, shape, strict=True))
    before = dst.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", data.draw(st.integers(1, 9)))
        patch.setattr(tiles, "_WIDTH", data.draw(st.integers(1, 4)))
        product = Product(Spread(a, b, 0.5), at, shape)
        place(dst[box(at, part)], src[box(at, part)], product, Workspace(), NonFinite())
    before[box(at, part)] = expected[box(at, part)]
    np.testing.assert_allclose(dst, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "seen"), [(np.nan, NonFinite(source=True)), (np.inf, NonFinite(source=True))]
)
def test_tells_a_faulty_source(value: float, seen: NonFinite) -> None:
    src = np.ones((5, 3), np.float32)
    src[4, 1] = value
    found = NonFinite()
    place(np.empty((3, 5), np.float32).T, src, None, Workspace(), found)
    assert found == seen


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_tells_an_overflow(dtype: np.dtype) -> None:
    src = np.ones((5, 3), np.float32)
    src[4, 1] = 3.4e38
    found = NonFinite()
    place(np.empty((5, 3), dtype), src, None, Workspace(), found)
    assert found == NonFinite(result=True)
