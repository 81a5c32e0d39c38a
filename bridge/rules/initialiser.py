"""How runtimes initialise what is not trained yet, drawn here with the same bytes everywhere.

The numbers are a function of a key alone: of no platform, thread or version. numpy promises that for the
integers of a bit generator, not for its normal numbers, whose logarithms are the C library's or the
processor's; what follows uses the operations that IEEE 754 rounds exactly, and no other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import xxhash

#: values drawn at once: their float64 intermediates fit in a core's second-level cache
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Initialiser(ABC):
    """What a runtime draws the values of a fresh array from."""

    @abstractmethod
    def fill(self, key: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        """A fresh array, float32.

        Args:
            key: what the numbers are a function of, the seed in it.
            shape: of the array.
            fan_in: how many inputs each output of a fresh weight sums.
        """


@dataclass(frozen=True)
class Zeros(Initialiser):
    """Nothing but zeros."""

    def __str__(self) -> str:
        return "zeros"

    def fill(self, key: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        return np.zeros(shape, np.float32)


@dataclass(frozen=True)
class Normal(Initialiser):
    """A normal distribution around zero (``jax.nn.initializers.normal``)."""

    stddev: float

    def __str__(self) -> str:
        return f"normal(stddev={self.stddev:g})"

    def fill(self, key: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        return _drawn(key, shape, 0.5, self.stddev)


@dataclass(frozen=True)
class LecunNormal(Initialiser):
    """A normal distribution cut off at two deviations, of variance 1 / fan_in
    (``jax.nn.initializers.lecun_normal``)."""

    #: between the median and two deviations of a normal distribution
    _WITHIN = 0.47724986805182079
    #: deviation of a standard normal distribution cut off there (jax, nn/initializers.py, variance_scaling)
    _NARROWED = 0.87962566103423978

    def __str__(self) -> str:
        return "lecun_normal"

    def fill(self, key: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        return _drawn(key, shape, self._WITHIN, math.sqrt(1 / fan_in) / self._NARROWED)


def _drawn(key: str, shape: tuple[int, ...], within: float, factor: float) -> np.ndarray:
    """Normal numbers times a factor, from the middle ``2 * within`` of their distribution alone."""
    bits = np.random.Philox(key=xxhash.xxh3_128_intdigest(key.encode()))
    flat = np.empty(math.prod(shape), np.float32)
    for begin in range(0, flat.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        # 52 bits and a half: exact in float64, symmetric, never at either end
        uniform = (np.asarray(bits.random_raw(part.size)) >> np.uint64(12)) + 0.5
        part[...] = _quantile((uniform * 2.0**-51 - 1.0) * within) * factor
    return flat.reshape(shape)


def _quantile(q: np.ndarray) -> np.ndarray:
    """The standard normal number below which lies ``0.5 + q`` of the distribution.

    Wichura's algorithm AS 241 (PPND16), to about 1e-16.
    """
    inner = 0.180625 - q * q
    values: np.ndarray = q * _polynomial(_CENTRE[0], inner) / _polynomial(_CENTRE[1], inner)
    outer = inner < 0
    tail = q[outer]
    r = np.sqrt(-_log(0.5 - np.abs(tail)))
    near, far = (
        _polynomial(above, r - start) / _polynomial(below, r - start)
        for (above, below), start in ((_NEAR, 1.6), (_FAR, 5.0))
    )
    values[outer] = np.copysign(np.where(r <= 5, near, far), tail)
    return values


def _log(x: np.ndarray) -> np.ndarray:
    """The natural logarithm of positive numbers, by operations that are rounded alike everywhere."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, 2 * mantissa, mantissa)
    z = (mantissa - 1) / (mantissa + 1)
    # 2 artanh(z); |z| < 0.172, so that the first term left out is below 1e-17
    series = _polynomial(tuple(2 / (2 * n + 1) for n in reversed(range(11))), z * z)
    result: np.ndarray = (exponent - low) * 0.6931471805599453 + z * series
    return result


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """Highest power first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


# Wichura, "The percentage points of the normal distribution", Applied Statistics 37 (1988): numerators
# and denominators, highest power first
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_NEAR = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
     1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0,
     4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
     1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0,
     2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3,
     2.65321895265761230930e-2, 2.96560571828504891230e-1, 1.78482653991729133580e0,
     5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5,
     7.86869131145613259100e-4, 1.48753612908506148525e-2, 1.36929880922735805310e-1,
     5.99832206555887937690e-1, 1.0),
)  # fmt: skip
