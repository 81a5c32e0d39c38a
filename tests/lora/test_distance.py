"""The distance of two products of factors, which are never formed, against products in exact arithmetic."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.lora.algebra import split
from bridge.lora.distance import distance, module_error, product_norm
from bridge.lora.factors import Factors
from bridge.proof.peft import TOLERANCE
from bridge.rules.equation import Equation
from bridge.rules.factoring import last_two_axes
from tests.kit.algebra import openpi_change

Array = np.ndarray[Any, np.dtype[Any]]


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float64))


def exactly(b: Array, a: Array, other_b: Array, other_a: Array) -> float:
    """The norm of the difference, in fractions."""
    total = Fraction(0)
    for row, other_row in zip(b, other_b, strict=True):
        for column, other_column in zip(a.T, other_a.T, strict=True):
            entry = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(row, column, strict=True))
            entry -= sum(
                Fraction(float(x)) * Fraction(float(y)) for x, y in zip(other_row, other_column, strict=True)
            )
            total += Fraction(entry) ** 2
    return math.sqrt(total)


def weight_of(b: Array, a: Array) -> float:
    """The sum over the rank of column norm times row norm: what rounding is measured by."""
    return float((np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)).sum())


def factors(seed: int, out: int, rank: int, into: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    return random.standard_normal((out, rank)), random.standard_normal((rank, into))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(1, 11),
    st.integers(-14, 3), st.integers(0, 99),
)  # fmt: skip
def test_any_distance_is_exact(out: int, rank: int, other: int, into: int, power: int, seed: int) -> None:
    """Of equal ranks and of others, near and far: to 1e-14 of the factors, or of the distance itself."""
    b, a = factors(seed, out, rank, into)
    if rank == other:
        moved_b, moved_a = factors(seed + 1, out, rank, into)
        other_b, other_a = b + 10.0**power * moved_b, a + 10.0**power * moved_a
    else:
        other_b, other_a = factors(seed + 1, out, other, into)
    found = distance(tensor(b), tensor(a), tensor(other_b), tensor(other_a))
    expected = exactly(b, a, other_b, other_a)
    near = weight_of(b - other_b, a) + weight_of(other_b, a - other_a) if rank == other else math.inf
    unseen = min(weight_of(b, a) + weight_of(other_b, other_a), near)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-14 * unseen)


@pytest.mark.parametrize("power", range(-15, 1))
def test_one_entry_is_seen_however_small(power: int) -> None:
    """A change of one entry by 10**power, with factors of one rank: to three digits, 1e-15 as well as 1."""
    b, a = factors(3, 53, 7, 31)
    wrong = b.copy()
    wrong[17, 3] += 10.0**power
    change = wrong[17, 3] - b[17, 3]
    found = distance(tensor(wrong), tensor(a), tensor(b), tensor(a))
    assert found == pytest.approx(abs(change) * np.linalg.norm(a[3]), rel=1e-3)


@pytest.mark.parametrize("power", range(-13, 1))
def test_products_that_cancel(power: int) -> None:
    """One product twice, in factors of other ranks, and what was added: seen down to 1e-13 of the product."""
    b, a = factors(5, 53, 7, 31)
    more_b, more_a = factors(6, 53, 1, 31)
    more_b *= 10.0**power * np.linalg.norm(b @ a) / np.linalg.norm(more_b @ more_a)
    mixed = np.random.default_rng(7).standard_normal((7, 7))
    left, right = np.hstack([b @ mixed, more_b]), np.vstack([np.linalg.inv(mixed) @ a, more_a])
    found = distance(tensor(left), tensor(right), tensor(b), tensor(a)) / np.linalg.norm(b @ a)
    assert found == pytest.approx(10.0**power, rel=0.2 if power < -12 else 1e-2)


def test_what_cannot_be_seen_lies_far_below_the_tolerance() -> None:
    """Equal products in other factors: what is found is rounding, a million times below what is allowed."""
    b, a = factors(8, 307, 16, 211)
    mixed = np.random.default_rng(9).standard_normal((16, 16))
    found = distance(
        tensor(np.hstack([b @ mixed, np.zeros((307, 1))])),
        tensor(np.vstack([np.linalg.inv(mixed) @ a, np.ones((1, 211))])),
        tensor(b),
        tensor(a),
    )
    assert 0 < found / np.linalg.norm(b @ a) < min(TOLERANCE.values()) / 1e6


def test_norm_of_a_product_that_cancels_itself() -> None:
    """Columns that are equal but for a little: Gram matrices would see nothing of it."""
    b, a = factors(10, 53, 1, 31)
    tiny, _ = factors(11, 53, 1, 31)
    pair = np.hstack([b, -b + 1e-12 * tiny])
    rows = np.vstack([a, a])
    assert product_norm(tensor(pair), tensor(rows)) == pytest.approx(
        exactly(pair, rows, np.zeros((53, 1)), np.zeros((1, 31))), rel=1e-2
    )


def test_no_distance() -> None:
    b, a = (tensor(each) for each in factors(12, 13, 3, 7))
    assert distance(b, a, b, a) == 0
    assert distance(torch.zeros_like(b), a, torch.zeros_like(b), 2 * a) == 0
    assert product_norm(b, torch.zeros_like(a)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_is_infinitely_far(which: int, value: float) -> None:
    """Also where it meets a column of zeros, which PEFT would make NaN of."""
    b, a = factors(13, 11, 3, 7)
    b[:, 0] = 0
    every = [tensor(each.copy()) for each in (b, a, b, a)]
    every[which][0, 0] = value
    assert distance(*every) == math.inf


EQUATIONS = {
    "q": ("head width dim -> (head dim) width", {"head": 5, "width": 13, "dim": 7}),
    "one of k and v": ("group width dim -> (group dim) width", {"group": 1, "width": 13, "dim": 7}),
    "o": ("head dim width -> width (head dim)", {"head": 5, "width": 13, "dim": 7}),
    "gate": ("width hidden -> hidden width", {"width": 13, "hidden": 17}),
    "kept and summed at once": ("x y in out -> (x out) (in y)", {"x": 2, "y": 3, "in": 7, "out": 5}),
    "in another order": ("x y in out -> (out x) (y in)", {"x": 2, "y": 3, "in": 7, "out": 5}),
    "two kept": ("x y in out -> (y x out) in", {"x": 2, "y": 3, "in": 7, "out": 5}),
}


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("rank", [1, 4])
def test_module_error_is_that_of_the_change(name: str, rank: int) -> None:
    """Against openpi's change of the leaf, arranged as the weight; exact, wrong by a little, and wrong."""
    text, sizes = EQUATIONS[name]
    equation = Equation.parse(text)
    random = np.random.default_rng(17)
    *shared, inner, outer = (sizes[axis] for axis in equation.left)
    lora_a = random.standard_normal((*shared, inner, rank))
    lora_b = random.standard_normal((*shared, rank, outer))
    scale = 1.75
    expected = scale * equation.arrange(openpi_change(equation, lora_a, lora_b))
    axes = last_two_axes(equation)
    matrix_a, matrix_b = split(axes, lora_a, lora_b)
    matrix_b = scale * matrix_b
    for noise in (0.0, 1e-9, 1e-6, 1e-2, 1.0):
        wrong_b = matrix_b + noise * random.standard_normal(matrix_b.shape)
        found = module_error(tensor(matrix_a), tensor(wrong_b), Factors(axes, lora_a, lora_b, scale))
        dense = np.linalg.norm(wrong_b @ matrix_a - expected) / np.linalg.norm(expected)
        assert found == pytest.approx(dense, rel=1e-5, abs=1e-14)
        assert (found < 1e-14) == (noise == 0)


def test_error_of_a_module_without_factors_is_what_peft_adds() -> None:
    """Where openpi's product is zero there is nothing to be relative to."""
    axes = last_two_axes(Equation.parse("width hidden -> hidden width"))
    factors = Factors(axes, np.ones((3, 2)), np.zeros((2, 5)), 1.0)
    a, b = np.ones((2, 3)), np.zeros((5, 2))
    assert module_error(tensor(a), tensor(b), factors) == 0
    b[4, 1] = 1e-3
    assert module_error(tensor(a), tensor(b), factors) == pytest.approx(1e-3 * math.sqrt(3))
