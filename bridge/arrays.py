"""Shapes and dtypes of arrays that have not been read yet, which all planning works with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

BFLOAT16: np.dtype = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

#: the dtypes of a weight; any other in a checkpoint is refused
WEIGHT_DTYPES = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the array, uncompressed."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest weight dtype that represents every value of these dtypes."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else FLOAT32


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order. numpy exports no buffer of a bfloat16 array directly."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is infinite or NaN. Any float dtype; never makes a wider copy."""
    if array.dtype == BFLOAT16:
        # ml_dtypes' isfinite converts element by element to float32; the exponent bits suffice
        exponent = np.uint16(0x7F80)
        return not bool(((array.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(array).all())


def run_shape(spec: Spec, limit: int) -> tuple[int, ...]:
    """Shape of the longest contiguous run of at most ``limit`` bytes: (1, …, n, *rest).

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
    """The position and shape of each cell of a grid over an array, in C order; smaller at the edges."""
    for at in itertools.product(*(range(0, n, max(c, 1)) for n, c in zip(shape, cell, strict=True))):
        yield at, tuple(min(c, n - a) for a, n, c in zip(at, shape, cell, strict=True))


def box(at: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of the box with a position and a shape."""
    return tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))


def axes_by_stride(array: np.ndarray) -> list[int]:
    """The axes of an array, by increasing stride."""
    return sorted(
        range(array.ndim), key=lambda axis: (array.shape[axis] == 1, abs(array.strides[axis]), -axis)
    )
