"""What equations and factors mean, written apart from the package: the oracle of its own arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from bridge.rules.equation import Equation


def restore(equation: Equation, weight: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The part of a leaf that one weight is, with the leaf's axes: element by element, by arithmetic alone."""
    axes = equation.of_weight.left
    part = np.empty([sizes[axis] for axis in axes], weight.dtype)
    for numbers in itertools.product(*(range(sizes[axis]) for axis in axes)):
        at = dict(zip(axes, numbers, strict=True))
        place = []
        for group in equation.right:
            position = 0
            for axis in group:  # the last axis of a group runs fastest
                position = position * sizes[axis] + at[axis]
            place.append(position)
        part[numbers] = weight[tuple(place)]
    return part


def openpi_change(equation: Equation, lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """The change of a leaf that openpi's two einsums make, before any scale, with the leaf's axes.

    The last two axes are factored. An axis of the input that both factors have is contracted by each
    einsum alone, so that the second factor counts by its sum over it (openpi, models/lora.py).
    """
    *shared, inner, outer = equation.left
    letters = {axis: chr(ord("a") + number) for number, axis in enumerate(equation.left)}
    summed = [axis for axis in shared if axis in equation.right[1]]
    first, second = (
        "".join(letters[axis] for axis in shared),
        "".join(letters[axis] for axis in shared if axis not in summed),
    )
    whole = lora_b.sum(axis=tuple(shared.index(axis) for axis in summed))
    a, b = f"{first}{letters[inner]}Z", f"{second}Z{letters[outer]}"
    return np.einsum(f"{a},{b}->{first}{letters[inner]}{letters[outer]}", lora_a, whole)
