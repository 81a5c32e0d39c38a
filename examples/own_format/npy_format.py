"""A container of one's own: a directory of ``.npy`` files and an index. Nothing of bridge is edited.

``arrays.json`` lists every array by name, with its shape and dtype; the n-th lies in ``n.npy``, which
numpy opens in place. numpy knows no bfloat16: such an array is stored as the 16-bit numbers it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge import Form, Format, Location, Problem, SourceRefused, Spec, State, Timings
from bridge.arrays import WEIGHT_DTYPES, box, cells, run_shape
from bridge.formats.disk.stamps import take_stamps

INDEX = "arrays.json"
MAX_INDEX = 64 << 20
#: bytes read at a time
SLAB = 8 << 20


@dataclass(frozen=True)
class NpySource:
    """A directory of arrays, open for reading."""

    location: Location
    specs: Mapping[str, Spec]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stamps: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    format: str = "npy"
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> Location:
        return self.location

    def stored_bytes(self, name: str) -> int:
        return self.specs[name].nbytes

    def how(self, name: str) -> str:
        return "in place"

    def buffered_bytes(self, name: str) -> int:
        return min(SLAB, self.specs[name].nbytes)

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        if isinstance(rows, slice) and rows.step not in (None, 1):
            raise IndexError(f"rows of {name} are read in order: no step {rows.step}")
        array = self._open(name)
        return np.array(array if rows is None else array[rows])

    def sample(self, name: str, at: np.ndarray) -> np.ndarray:
        return np.array(self._open(name)[tuple(at.T)])

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Timings | None = None
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        spec = Spec(self.specs[name].shape if shape is None else shape, self.specs[name].dtype)
        array = self._open(name).reshape(spec.shape)
        for at, size in cells(spec.shape, run_shape(spec, SLAB)):
            began = time.perf_counter()
            values = np.array(array[box(at, size)])
            if spent is not None:
                spent.read += time.perf_counter() - began
            yield at, values

    def _open(self, name: str) -> np.ndarray:
        assert self.location.local is not None
        spec = self.specs[name]
        path = self.location.local / _file(list(self.specs).index(name))
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise SourceRefused(
                Problem(f"{path}: {name} cannot be read: {error}", "copy it again")
            ) from error
        if (array.shape, array.dtype) != (spec.shape, _stored(spec.dtype)):
            raise SourceRefused(Problem(f"{path} is not {name}, {spec}", "copy the checkpoint again"))
        values: np.ndarray = array.view(spec.dtype)
        return values


@dataclass(frozen=True)
class NpySink:
    """A directory of arrays of their final size, filled in place."""

    directory: Path
    specs: Mapping[str, Spec]
    index: str

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        path = self.directory / _file(list(self.specs).index(name))
        mapped = np.load(path, mmap_mode="r+")
        mapped[box(at or (0,) * array.ndim, array.shape)] = array.view(mapped.dtype)
        mapped.flush()

    def finish(self) -> None:
        # last: a directory without it is not finished
        with open(self.directory / INDEX, "w") as file:
            file.write(self.index)
            file.flush()
            os.fsync(file.fileno())


def claims(location: Location) -> bool:
    return INDEX in location.names()


def open_npy(location: Location) -> NpySource:
    """Open a directory, with every array listed and none read."""
    if location.local is None:
        raise SourceRefused(Problem(f"{location}: read from local disk only", "copy it here first"))
    local = location.local
    stamps = take_stamps([local / INDEX])
    text = (location / INDEX).read_bytes(MAX_INDEX)
    try:
        described = json.loads(text or b"")
        specs = {
            str(each["name"]): Spec(tuple(map(int, each["shape"])), WEIGHT_DTYPES[each["dtype"]])
            for each in described["arrays"]
        }
        metadata = dict(described["metadata"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceRefused(
            Problem(f"{location / INDEX} is damaged: {error!r}", "copy the checkpoint again")
        ) from error
    stamps |= take_stamps(local / _file(number) for number in range(len(specs)))
    return NpySource(location, specs, metadata, stamps)


def create(
    directory: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], zeros: Collection[str]
) -> NpySink:
    """Lay out every file in its final size; one that nobody writes to stays zeros."""
    for number, spec in enumerate(specs.values()):
        np.lib.format.open_memmap(
            directory / _file(number), mode="w+", dtype=_stored(spec.dtype), shape=spec.shape
        )
    arrays = [
        {"name": name, "shape": list(spec.shape), "dtype": spec.dtype.name} for name, spec in specs.items()
    ]
    return NpySink(
        directory, dict(specs), json.dumps({"arrays": arrays, "metadata": dict(metadata)}, indent=1)
    )


def _file(number: int) -> str:
    return f"{number}.npy"


def _stored(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype.name == "bfloat16" else dtype


FORMAT = Format(
    name="npy",
    states=tuple(
        State(name="npy", contents=contents, format="npy", form=Form.PYTREE)
        for contents in ("base", "base+lora")
    ),
    claims=claims,
    open=open_npy,
    create=create,
)
