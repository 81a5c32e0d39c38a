"""Arrays that are filled box by box, and given out in cells as soon as they are whole.

What is read comes in slabs of the source's order, what is written goes out in runs of the
output's. Between the two lie the cells: a whole tensor where the axes change places, a run of
rows where they do not. Only cells that are filled in part are in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

Part = tuple[tuple[slice, ...], np.ndarray, tuple[int, ...]]
"""Of a box: which part of it, the place in a cell it goes to, and the cell."""


class Gather:
    """One array being filled.

    Args:
        shape: of the array.
        cell: shape of its cells; those at the edge are smaller.
        dtype: of both.
        spare: buffers of finished cells, shared between arrays of one step.
    """

    def __init__(
        self, shape: tuple[int, ...], cell: tuple[int, ...], dtype: np.dtype, spare: list[np.ndarray]
    ) -> None:
        self._shape, self._cell, self._dtype, self._spare = shape, cell, dtype, spare
        self._open: dict[tuple[int, ...], np.ndarray] = {}
        self._left: dict[tuple[int, ...], int] = {}

    @property
    def is_done(self) -> bool:
        """Whether no cell is filled in part."""
        return not self._open

    def parts(self, at: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Part]:
        """Cut a box at the borders of the cells; call :meth:`filled` after each part is filled."""
        spans = [range(a // c, (a + n - 1) // c + 1) for a, n, c in zip(at, shape, self._cell, strict=True)]
        for number in itertools.product(*spans):
            begin = tuple(n * c for n, c in zip(number, self._cell, strict=True))
            buffer = self._buffer(begin)
            first = [max(a, b) for a, b in zip(at, begin, strict=True)]
            last = [min(a + n, b + c) for a, n, b, c in zip(at, shape, begin, buffer.shape, strict=True)]
            of_box = tuple(slice(f - a, e - a) for f, e, a in zip(first, last, at, strict=True))
            of_cell = tuple(slice(f - b, e - b) for f, e, b in zip(first, last, begin, strict=True))
            yield of_box, buffer[of_cell], begin

    def filled(self, begin: tuple[int, ...], count: int) -> np.ndarray | None:
        """Note that ``count`` elements of a cell were filled; the cell, once it is whole.

        A cell is valid until :meth:`release`.
        """
        self._left[begin] -= count
        return self._open[begin] if not self._left[begin] else None

    def release(self, begin: tuple[int, ...]) -> None:
        """Take back the buffer of a whole cell."""
        del self._left[begin]
        self._spare.append(self._open.pop(begin).reshape(-1))

    def _buffer(self, begin: tuple[int, ...]) -> np.ndarray:
        if begin not in self._open:
            shape = tuple(min(c, n - b) for b, c, n in zip(begin, self._cell, self._shape, strict=True))
            size = math.prod(shape)
            fits = next((i for i, spare in enumerate(self._spare) if spare.size >= size), None)
            flat = np.empty(size, self._dtype) if fits is None else self._spare.pop(fits)[:size]
            self._open[begin] = flat.reshape(shape)
            self._left[begin] = size
        return self._open[begin]
