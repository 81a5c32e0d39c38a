"""How far two arrays are apart, tile by tile, whatever the order of their axes in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bridge.arrays import BFLOAT16, FLOAT32
from bridge.compare import gaps
from bridge.compare.gaps import Change, Values, gap, gap_after_cast, tiles
from bridge.lora.factors import Matrices
from bridge.rules.equation import Equation
from tests.kit.algebra import restore

SHAPES = [(7,), (5, 3), (241, 479), (3, 61, 7), (2, 3, 5, 257), (61001,), (1, 997, 1), (0, 3)]


def orders(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Arrays of a shape in every order that matters: as a leaf, as a tensor, and as a part of one."""
    size = math.prod(shape)
    plain = np.arange(size, dtype=np.float32).reshape(shape)
    turned = np.ascontiguousarray(plain.T).T
    part = np.zeros([n + 1 for n in shape], np.float32)[tuple(slice(0, n) for n in shape)]
    part[...] = plain
    return [plain, turned, part]


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_cover_every_entry_once(shape: tuple[int, ...]) -> None:
    for a in orders(shape):
        for b in orders(shape):
            seen = np.zeros(shape, int)
            for tile in tiles(a, b):
                seen[tile] += 1
                assert 0 < seen[tile].size <= gaps.ENTRIES
            assert (seen == 1).all()


@pytest.mark.parametrize("shape", [(5, 3), (241, 479), (2, 3, 5, 257)])
def test_one_entry_is_found_wherever_it_is(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(5)
    for a, b in zip(orders(shape), reversed(orders(shape)), strict=True):
        for _ in range(5):
            at = tuple(int(random.integers(n)) for n in shape)
            before = b[at]
            assert gap_after_cast(a, b, FLOAT32) is None
            b[at] = before + 3
            found = gap_after_cast(a, b, FLOAT32)
            assert found is not None
            assert (found.largest, found.total, found.squares) == (3, 3, 9)
            assert found.reach == a.max()
            for odd in (np.nan, np.inf):
                b[at] = odd
                assert not gap(Values(a), Values(b)).largest <= 1e30
                b[at] = before


def test_bits_are_compared_after_the_cast() -> None:
    wide = np.array([1, 1 + 2**-12, 0.0, np.nan], np.float32)
    narrow = wide.astype(BFLOAT16)
    assert gap_after_cast(wide, narrow, BFLOAT16) is None
    assert gap_after_cast(wide, narrow.astype(np.float32), FLOAT32) is not None
    zero = gap_after_cast(np.zeros(3, np.float32), -np.zeros(3, np.float32), FLOAT32)
    assert zero is not None and zero.largest == 0


@pytest.mark.parametrize(
    "axes",
    [
        "in out -> out in",
        "head in dim -> (head dim) in",
        "head dim out -> out (head dim)",
        "out in -> out in",
        "in head dim -> (head dim) in",
    ],
)
def test_products_are_read_by_tiles(axes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "EDGE", 4)
    monkeypatch.setattr(gaps, "ENTRIES", 16)
    random = np.random.default_rng(6)
    equation = Equation.parse(axes)
    sizes = dict(zip(equation.left, (5, 11, 7), strict=False))
    rows, columns = equation.weight_shape(sizes)
    a, b = (random.standard_normal(shape, np.float32) for shape in ((3, columns), (rows, 3)))
    tensor = random.standard_normal((rows, columns), np.float32)
    # in the memory order of a tensor, so that the two sides lie differently
    merged = in_order_of(equation, restore(equation, tensor + np.float32(0.5) * (b @ a), sizes))
    leaf = restore(equation, tensor, sizes).astype(BFLOAT16)
    rounding = restore(equation, tensor, sizes) - leaf.astype(np.float32)
    change = Change(equation, Matrices(a, b, 0.5).spread(equation, sizes))
    found = gap(Values(leaf, change), Values(merged))
    np.testing.assert_allclose(found.largest, np.abs(rounding).max(), rtol=1e-4)
    np.testing.assert_allclose(found.total, np.abs(rounding).sum(), rtol=1e-4)
    np.testing.assert_allclose(found.squares, np.square(rounding).sum(), rtol=1e-4)
    expected = merged - rounding
    np.testing.assert_allclose(found.norm, np.square(expected).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.reach, np.abs(expected).max(), rtol=1e-5)


def in_order_of(equation: Equation, part: np.ndarray) -> np.ndarray:
    """The same array, its axes in memory as the weight has them."""
    order = [equation.left.index(axis) for axis in equation.weight_axes]
    return np.ascontiguousarray(part.transpose(order)).transpose(np.argsort(order))


def test_numbers_beyond_float32_squares() -> None:
    a, b = np.full((3, 5), 1e-30, np.float32), np.full((3, 5), 2e-30, np.float32)
    found = gap(Values(a), Values(b))
    assert math.isclose(found.squares, 15e-60, rel_tol=1e-6)
    found = gap(Values(a), Values(np.full((3, 5), 2e30, np.float32)))
    assert math.isclose(found.squares, 60e60, rel_tol=1e-6)
