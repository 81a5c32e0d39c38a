"""A source and a sink in memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bridge.arrays import Spec, box, cells, run_shape
from bridge.formats.contract import Slab, Timings
from bridge.formats.disk.location import Location

#: a few elements: every array comes in several slabs
SLAB_BYTES = 40


class Arrays:
    """A source in memory."""

    format = "memory"
    location = Location("/nowhere")
    root = location
    metadata: Mapping[str, Any] = {}
    notes = ()

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {name: Spec(array.shape, array.dtype) for name, array in self.arrays.items()}

    def stored_bytes(self, name: str) -> int:
        return self.arrays[name].nbytes

    def buffered_bytes(self, name: str) -> int:
        return self.arrays[name].nbytes

    def how(self, name: str) -> str:
        return "memory"

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        return self.arrays[name] if rows is None else self.arrays[name][rows]

    def sample(self, name: str, at: np.ndarray) -> np.ndarray:
        values: np.ndarray = self.arrays[name][tuple(at.T)]
        return values

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Timings | None = None
    ) -> Iterator[Slab]:
        array = self.arrays[name]
        for at, part in cells(array.shape, run_shape(self.specs[name], SLAB_BYTES)):
            yield at, array[box(at, part)]


class Kept:
    """A sink that keeps what is written."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.arrays = {name: np.full(spec.shape, np.nan, spec.dtype) for name, spec in specs.items()}

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        self.arrays[name][box(at or (0,) * array.ndim, array.shape)] = array

    def finish(self) -> None:
        pass
