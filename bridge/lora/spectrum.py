"""What a LoRA product does, in directions: its singular values, and how many of them count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bridge.arrays import all_finite
from bridge.compare.sides import Held
from bridge.lora.algebra import singular_values
from bridge.rules.equation import Equation


def spectrum(one: Equation, held: Held) -> tuple[float, ...]:
    """Singular values of the scaled product of a weight's factors, largest first.

    Empty without factors, and where they are not finite. The product is never formed.
    """
    change = held.change(one)
    if change is None or not (all_finite(change.a) and all_finite(change.b)):
        return ()
    return tuple(float(value) for value in singular_values(change.a, change.b) * abs(change.scale))


def effective_rank(values: Sequence[float]) -> float | None:
    """exp of the entropy of the squared singular values: how many directions a product uses.

    None where there is none, or the values are not finite.
    """
    found = np.asarray(values, np.float64)
    largest = found.max(initial=0.0)
    if not 0 < largest < math.inf:
        return None
    # over the largest, as squares may leave what a float holds
    power = np.square(found / largest)
    share = power[power > 0] / power.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
