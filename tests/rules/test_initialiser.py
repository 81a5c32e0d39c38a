"""Initialisers: the distributions that jax documents, and the same bytes everywhere."""

import statistics

import numpy as np
import pytest
import xxhash

from bridge.rules import initialiser
from bridge.rules.initialiser import LecunNormal, Normal, Zeros

NORMAL = statistics.NormalDist()
#: of the values below, by xxh3-64
PINNED = ["1332b08993fcba12", "41daac40cbd1751a"]


def test_quantiles_are_those_of_the_normal_distribution() -> None:
    """Against Python's own, into the tails."""
    q = np.concatenate(
        [np.linspace(-0.499999, 0.499999, 3001), [0.425, -0.425, 0.5 - 2.0**-53, 2.0**-53 - 0.5, 0.0]]
    )
    # by the lower half: the ends of the upper one are rounded away in 0.5 + q
    expected = np.array([-np.sign(value) * NORMAL.inv_cdf(0.5 - abs(value)) for value in q])
    assert np.allclose(initialiser._quantile(q), expected, rtol=4e-15, atol=1e-15)


def test_logarithms() -> None:
    x = np.concatenate([np.logspace(-300, 2, 997), [0.5, 0.5**0.5, np.nextafter(0.5**0.5, 0), 1.0, 2.0]])
    assert np.allclose(initialiser._log(x), np.log(x), rtol=5e-16, atol=1e-16)


def test_normal() -> None:
    """Kolmogorov and Smirnov's distance, at a thousandth of chance."""
    values = Normal(0.01).fill("0:leaf", (97, 1031), 97)
    assert values.dtype == np.float32 and values.shape == (97, 1031)
    ordered = np.sort(values.reshape(-1).astype(np.float64)) / 0.01
    below = np.array([NORMAL.cdf(value) for value in ordered[::50]])
    distance = np.abs(below - np.arange(0, ordered.size, 50) / ordered.size).max()
    assert distance < 1.95 / ordered.size**0.5
    rows = values / 0.01
    assert abs(np.corrcoef(rows[:-1].reshape(-1), rows[1:].reshape(-1))[0, 1]) < 4 / values.size**0.5


def test_lecun_normal() -> None:
    """Of variance 1 / fan_in, cut off at two deviations of what it is cut from."""
    values = LecunNormal().fill("0:leaf", (97, 1031), 23)
    assert values.std() == pytest.approx(23**-0.5, rel=0.01)
    end = 2 * 23**-0.5 / 0.87962566103423978
    assert 0.99 * end < np.abs(values).max() <= end * (1 + 1e-6)


def test_zeros() -> None:
    assert not Zeros().fill("0:leaf", (3, 5), 3).any()


def test_the_bytes_are_pinned() -> None:
    """They go into checkpoints: whatever changes them changes what two machines write."""
    values = [made.fill("0:leaf", (3, 7001), 29) for made in (Normal(0.01), LecunNormal())]
    assert [xxhash.xxh3_64_hexdigest(array.tobytes()) for array in values] == PINNED
    assert values[0][0, 0] == values[0].reshape(-1)[0] == Normal(0.01).fill("0:leaf", (1,), 1)[0]
    assert Normal(0.01).fill("1:leaf", (1,), 1)[0] != values[0][0, 0]
