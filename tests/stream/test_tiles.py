"""Tiles against plain numpy: any order of axes, any strides, any box, with and without a product."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.arrays import BFLOAT16, FLOAT16, FLOAT32, box
from bridge.lora.factors import Matrices
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
    a = rng.standard_normal((rank, int(np.prod(inputs)))).astype(np.float32)
    b = rng.standard_normal((int(np.prod(output)), rank)).astype(np.float32)
    src = arranged(shape, data.draw(st.permutations(axes)), data.draw(st.sampled_from(DTYPES)))
    dst = arranged(shape, data.draw(st.permutations(axes)), FLOAT32, seed=1)
    expected = src.astype(np.float32) + (np.float32(0.5) * (b @ a)).reshape(shape)
    steps = tuple(int(np.prod(group[i + 1 :])) for group in (output, inputs) for i in range(len(group)))
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    part = tuple(data.draw(st.integers(1, n - begin)) for begin, n in zip(at, shape, strict=True))
    before = dst.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", data.draw(st.integers(1, 9)))
        patch.setattr(tiles, "_WIDTH", data.draw(st.integers(1, 4)))
        product = Product(Matrices(a, b, 0.5), steps, len(output), at)
        place(dst[box(at, part)], src[box(at, part)], product, Workspace(), NonFinite())
    before[box(at, part)] = expected[box(at, part)]
    np.testing.assert_allclose(dst, before, rtol=1e-5, atol=1e-5)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=2),
    st.lists(st.integers(1, 9), min_size=1, max_size=2),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_sum_depends_on_neither_order_nor_cut(
    output: list[int], inputs: list[int], data: st.DataObject
) -> None:
    """To the last bit, whatever container a weight comes from and however it is cut."""
    shape = (*output, *inputs)
    axes = list(range(len(shape)))
    rng = np.random.default_rng(4)
    a = rng.standard_normal((3, int(np.prod(inputs)))).astype(np.float32)
    b = rng.standard_normal((int(np.prod(output)), 3)).astype(np.float32)
    steps = tuple(int(np.prod(group[i + 1 :])) for group in (output, inputs) for i in range(len(group)))
    values = rng.standard_normal(shape).astype(np.float32)
    whole, cut = (np.full(shape, np.nan, np.float32) for _ in range(2))
    order, back = data.draw(st.permutations(axes)), data.draw(st.permutations(axes))
    src = np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    dst = np.ascontiguousarray(cut.transpose(back)).transpose(np.argsort(back))
    axis = data.draw(st.sampled_from(axes))
    border = data.draw(st.integers(0, shape[axis]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 20)
        patch.setattr(tiles, "_WIDTH", 5)
        change = Matrices(a, b, 0.3)
        start = (0,) * len(shape)
        place(whole, values, Product(change, steps, len(output), start), Workspace(), NonFinite())
        for begin, end in ((0, border), (border, shape[axis])):
            at = tuple(begin if each == axis else 0 for each in axes)
            part = tuple(end - begin if each == axis else n for each, n in enumerate(shape))
            if end > begin:
                product = Product(change, steps, len(output), at)
                place(dst[box(at, part)], src[box(at, part)], product, Workspace(), NonFinite())
    assert dst.tobytes() == whole.tobytes()


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
