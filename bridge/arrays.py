"""Shape and dtype of an array that may not have been read: what all planning is done with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

BFLOAT16: np.dtype = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

#: the dtypes a weight may have; anything else in a checkpoint is refused
WEIGHT_DTYPES = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array, uncompressed."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest weight dtype that holds all values of all of these."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else FLOAT32


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order. numpy lends no buffer of a bfloat16 array directly."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is an infinity or NaN. Any float dtype; never makes a wide copy."""
    if array.dtype == BFLOAT16:
        # ml_dtypes' isfinite goes element by element through float32; the exponent bits say it.
        exponent = np.uint16(0x7F80)
        return not bool(((array.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(array).all())


def run_shape(spec: Spec, limit: int) -> tuple[int, ...]:
    """Shape of the longest run of whole entries that takes at most ``limit`` bytes: (1, …, n, *rest).

    Runs follow each other in C order. At least one entry of the last axis, whatever its size.
    """
    shape = list(spec.shape)
    size = spec.nbytes
    for axis, length in enumerate(shape):
        if size <= limit or length == 0:
            break
        size //= length
        shape[axis] = max(1, limit // max(size, 1))
        if shape[axis] > 1:
            break
    return tuple(shape)


def cells(shape: tuple[int, ...], cell: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut an array into cells, in C order: the position of each, and its shape (smaller at the edge)."""
    for at in itertools.product(*(range(0, n, max(c, 1)) for n, c in zip(shape, cell, strict=True))):
        yield at, tuple(min(c, n - a) for a, n, c in zip(at, shape, cell, strict=True))


def box(at: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of an array that begins at a position and has a shape."""
    return tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))


def axes_by_stride(array: np.ndarray) -> list[int]:
    """The axes of an array, the one whose entries lie closest together first."""
    return sorted(
        range(array.ndim), key=lambda axis: (array.shape[axis] == 1, abs(array.strides[axis]), -axis)
    )
