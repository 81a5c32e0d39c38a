"""Effective rank, of any singular values."""

from __future__ import annotations

import math

import pytest

from bridge.lora.algebra import effective_rank


@pytest.mark.parametrize(
    ("values", "directions"),
    [
        ((1e300, 1e300), 2.0),
        ((3.0, 0.0), 1.0),
        ((math.inf, 1.0), None),
        ((math.nan,), None),
        ((0.0,), None),
        ((), None),
    ],
)
def test_directions_of_any_singular_values(values: tuple[float, ...], directions: float | None) -> None:
    assert effective_rank(values) == (None if directions is None else pytest.approx(directions))
