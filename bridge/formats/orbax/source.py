"""Orbax checkpoints: finding the ``params`` a user means, listing its arrays, reading them.

Read with TensorStore and our own walk of the OCDBT index; Orbax itself is not needed, nor jax.
What the directory holds is described in Orbax's checkpoint format guide; the accepted forms are
OCDBT or one zarr directory an array, zarr 2 or 3, any chunk grid, written by one process or many.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import Spec, box
from bridge.errors import Problem, SourceRefused, printable
from bridge.formats.contract import Format, Slab, Spent
from bridge.formats.disk.location import Location, open_regular, tensorstore_context
from bridge.formats.disk.readahead import buffered_bytes
from bridge.formats.disk.stamps import Stamp, take
from bridge.formats.orbax import chunks, stream
from bridge.formats.orbax.listing import (
    Stored,
    list_arrays,
    longest,
    open_store,
    read_tree_metadata,
    store_spec,
)
from bridge.formats.orbax.ocdbt import RECOPY, Extent, contained
from bridge.formats.orbax.sink import create
from bridge.graph import Form, State

ITEM = "params"
UNFINISHED = ".orbax-checkpoint-tmp"
LFS = b"version https://git-lfs.github.com/spec/"
#: what tools leave where a download was cut off
PARTIAL = (".gstmp", ".incomplete", ".part", ".partial", ".crdownload", ".aria2")

_MARKS = {"_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA", ITEM, "train_state"}


@dataclass(frozen=True)
class OrbaxSource:
    """An Orbax pytree checkpoint opened for reading. Names are ``/``-joined paths in the tree."""

    location: Location
    root: Location
    ocdbt: bool
    arrays: Mapping[str, Stored]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    format: str = "orbax"
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {name: stored.array.spec for name, stored in self.arrays.items()}

    def stored_bytes(self, name: str) -> int:
        stored = self.arrays[name]
        if stored.chunks is None:
            return stored.array.spec.nbytes
        return sum(extent.length for extent in stored.chunks if extent is not None)

    def how(self, name: str) -> str:
        if self.arrays[name].chunks is None:
            return "tensorstore"
        return "streamed" if self._streams(name) else "chunk by chunk"

    def buffered_bytes(self, name: str) -> int:
        stored = self.arrays[name]
        array = stored.array
        row = array.spec.nbytes // max(array.spec.shape[0] if array.spec.shape else 1, 1)
        longest = max((extent.length for extent in stored.chunks or () if extent), default=0)
        # a bucket's chunk is fetched whole
        ahead = longest if self.location.local is None else buffered_bytes(longest)
        if self._streams(name):
            slab = Spec(stream.slab_shape(array), array.spec.dtype).nbytes
            return slab + 4 * stream.READ_BYTES + ahead
        # decoded chunks beside the rows copied out of them
        return 2 * row * (array.chunks[0] if array.chunks else 1) + ahead

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        shape = self.arrays[name].array.spec.shape
        if rows is None or not shape:
            return self._rows(name, range(shape[0] if shape else 1)).reshape(shape)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(shape[0])
            if step != 1:
                raise IndexError(f"rows of {name} are read in order: no step {step}")
            return self._rows(name, range(start, max(start, stop)))
        at = range(shape[0])[rows]
        one: np.ndarray = self._rows(name, range(at, at + 1))[0]
        return one

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Spent | None = None
    ) -> Iterator[Slab]:
        array = self.arrays[name].array
        own = array.spec.shape
        if shape not in (None, own):
            # no leaf is read by another shape than its own as a rule; one that is, is read whole
            yield (0,) * len(shape or ()), self.read(name).reshape(shape or ())
            return
        if self._streams(name):
            yield from stream.slabs(array, self._chunks(name), name, spent or Spent())
            return
        if not own:
            yield (), self.read(name)
            return
        for start in range(0, own[0], array.chunks[0]):
            began = time.perf_counter()
            rows = self._rows(name, range(start, min(start + array.chunks[0], own[0])))
            if spent is not None:
                # reading and decoding are one call
                spent.decode += time.perf_counter() - began
            yield (start, *(0,) * (len(own) - 1)), rows

    def _rows(self, name: str, rows: range) -> np.ndarray:
        stored = self.arrays[name]
        array = stored.array
        if stored.chunks is None:
            store = self._tensorstore(name)
            try:
                part = store[rows.start : rows.stop] if array.spec.shape else store
                read = np.asarray(part.read().result())
            except (ValueError, OSError, IndexError) as error:
                raise self._damaged(name, error) from error
            return read if array.spec.shape else read.reshape(1)
        if not self._streams(name):
            return chunks.read(array, lambda number: self._chunk(name, number), rows, name)
        result = np.empty((len(rows), *array.spec.shape[1:]), array.spec.dtype)
        for at, values in stream.slabs(array, self._chunks(name), name, Spent()):
            if not at:
                result[0] = values
                continue
            low, high = max(at[0], rows.start), min(at[0] + len(values), rows.stop)
            if low < high:
                rest = box(at[1:], values.shape[1:])
                result[(slice(low - rows.start, high - rows.start), *rest)] = values[
                    low - at[0] : high - at[0]
                ]
            elif at[0] >= rows.stop:
                break
        return result

    def _chunks(self, name: str) -> Iterator[tuple[Path | None, Extent]]:
        for number in range(len(self.arrays[name].chunks or ())):
            found = self._chunk(name, number)
            assert found is not None
            yield found

    def _chunk(self, name: str, number: int) -> tuple[Path | None, Extent] | None:
        """Where a chunk lies: a range of a file, or bytes. A bucket's is fetched."""
        stored = self.arrays[name]
        assert stored.chunks is not None
        extent = stored.chunks[number]
        if extent is None or extent.inline is not None:
            return None if extent is None else (None, extent)
        if self.location.local is not None:
            return contained(self.location.local, extent.file), extent
        key = next(itertools.islice(stored.keys, number, None))
        try:
            if self.ocdbt:
                value = bytes(open_store(self.location, True).read(key).result().value)
            else:
                value = (self.location / key).read_bytes(longest(stored.array)) or b""
        except (ValueError, OSError) as error:
            raise self._damaged(name, error) from error
        return None, Extent(len(value), inline=value)

    def _streams(self, name: str) -> bool:
        stored = self.arrays[name]
        return bool(stored.chunks is not None and not stored.sparse and stream.streamable(stored.array))

    def _tensorstore(self, name: str) -> Any:
        """A zarr 3 array: TensorStore decodes it, chunk by chunk, into memory of the declared size."""
        import tensorstore as ts

        stored = self.arrays[name]
        spec = {
            "driver": stored.array.driver,
            "kvstore": store_spec(self.location, self.ocdbt) | {"path": f"{stored.path}/"}
            if self.ocdbt
            else (self.location / stored.path).kvstore(),
            # a missing chunk must be an error: the default reads it as zeros
            "fill_missing_data_reads": stored.sparse,
        }
        try:
            store = ts.open(spec, open=True, read=True, context=tensorstore_context()).result()
        except (ValueError, OSError) as error:
            raise self._damaged(name, error) from error
        seen = Spec(tuple(store.shape), np.dtype(store.dtype.numpy_dtype))
        if seen != stored.array.spec:
            raise self._damaged(name, ValueError(f"it is {seen}, and was {stored.array.spec}"))
        return store

    def _damaged(self, name: str, error: Exception) -> SourceRefused:
        return SourceRefused(
            Problem(f"{self.location}: {name} cannot be read: {str(error)[:300].split(chr(10))[0]}", RECOPY)
        )


def claims(location: Location) -> bool:
    """Whether the path looks like Orbax at any level: a run's directory, a step, its params."""
    names = location.names()
    return (
        UNFINISHED in location.url
        or _marked(names)
        # one level: links can make directories without end
        or any(_step(name) is not None and _marked((location / name).names()) for name in names)
    )


def _marked(names: list[str]) -> bool:
    return any(name in _MARKS or name.startswith("ocdbt.process_") or UNFINISHED in name for name in names)


def open_orbax(location: Location) -> OrbaxSource:
    """Open the ``params`` that a path means, with every array listed and none read.

    Raises:
        SourceRefused: the path is at the wrong level, the save is unfinished, or index,
            metadata and store disagree.
    """
    params, root, notes = resolve(location)
    files = params.files() if params.local is not None else []
    stamps = take(params.local / file for file in files) if params.local is not None else {}
    _refuse_leftovers(params, files)
    tree, sparse = read_tree_metadata(params)
    ocdbt = (params / "manifest.ocdbt").is_file()
    if not ocdbt and any(name.startswith("ocdbt.process_") for name in params.names()):
        raise SourceRefused(
            Problem(
                f"{params}: manifest.ocdbt is missing: the save was not finished, or not copied whole",
                "convert an earlier step, or copy the checkpoint again",
            )
        )
    arrays = list_arrays(params, ocdbt, tree, sparse)
    if zeros := [name for name, stored in arrays.items() if stored.sparse]:
        notes += (f"{len(zeros)} arrays lack chunks that hold only zeros, as this Orbax saved them",)
    return OrbaxSource(params, root, ocdbt, arrays, notes, stamps=stamps)


def resolve(location: Location) -> tuple[Location, Location, tuple[str, ...]]:
    """Find what a path means: (the params directory, the directory of its assets, notes).

    A params directory, a step that holds one, or a directory of steps, of which the newest
    finished one is taken and named in a note.
    """
    names = location.names()
    if not names:
        what = "is empty" if location.exists() else "does not exist"
        raise SourceRefused(Problem(f"{location} {what}", "give a checkpoint's directory"))
    if UNFINISHED in location.url:
        raise SourceRefused(
            Problem(f"{location}: Orbax did not finish this save", "convert the last step that was finished")
        )
    if (
        "_METADATA" in names
        or "manifest.ocdbt" in names
        or any(n.startswith("ocdbt.process_") for n in names)
    ):
        return location, location.parent if location.name == ITEM else location, ()
    if ITEM in names:
        return location / ITEM, location, ()
    steps = sorted((number, name) for name in names if (number := _step(name)) is not None)
    finished = [name for _, name in steps if (location / name / ITEM / "_METADATA").is_file()]
    if finished:
        skipped = [name for _, name in steps if name not in finished] + [n for n in names if UNFINISHED in n]
        note = f"step {finished[-1]} is the newest finished one of {location}"
        if skipped:
            note += f" (not finished: {', '.join(skipped)})"
        return location / finished[-1] / ITEM, location / finished[-1], (printable(note),)
    if steps or any(UNFINISHED in name for name in names):
        raise SourceRefused(
            Problem(
                f"{location}: none of its steps was finished ({', '.join(n for n in names)})",
                "let the save finish, or convert another run",
            )
        )
    if "train_state" in names:
        raise SourceRefused(
            Problem(
                f"{location} holds train_state and no {ITEM}/",
                "copy params/ from the training machine as well",
            )
        )
    if ITEM in location.parent.names():
        raise SourceRefused(
            Problem(f"{location} lies beside {ITEM}/, one level too deep", f"give {location.parent}")
        )
    raise SourceRefused(
        Problem(
            f"{location} holds no checkpoint ({', '.join(names[:6])})",
            f"give the step directory that holds {ITEM}/",
        )
    )


def _step(name: str) -> int | None:
    """A step's number: Orbax names step directories by number, with an optional prefix."""
    tail = name.rsplit("_", 1)[-1]
    return int(tail) if tail.isascii() and tail.isdigit() and len(tail) < 20 else None


def _refuse_leftovers(params: Location, files: list[str]) -> None:
    """Git LFS leaves a short text where a file was not fetched; downloads leave parts of files."""
    pointers = []
    for file in files:
        if file.endswith(PARTIAL):
            raise SourceRefused(
                Problem(f"{params / file} is what a download left when it was cut off", RECOPY)
            )
        assert params.local is not None
        path = params.local / file
        try:
            if path.stat().st_size < 1024:
                with open_regular(path) as opened:
                    if opened.read(len(LFS)) == LFS:
                        pointers.append(file)
        except OSError as error:
            raise SourceRefused(
                Problem(f"{path}: {error.strerror}", "check the path and its permissions")
            ) from error
    if pointers:
        raise SourceRefused(
            Problem(
                f"{params}: {len(pointers)} files are git-lfs pointers, not data (the first: {pointers[0]})",
                "fetch them with `git lfs pull` in the repository the checkpoint came from",
            )
        )


FORMAT = Format(
    name="orbax",
    states=(
        State(name="orbax", contents="base", format="orbax", form=Form.PYTREE),
        State(name="orbax", contents="base+lora", format="orbax", form=Form.PYTREE),
    ),
    claims=claims,
    open=open_orbax,
    create=create,
)
