"""Orbax checkpoints: resolving a path to its ``params``, listing the arrays, reading them.

Neither Orbax nor jax is needed: arrays are read with TensorStore and our own walk of the OCDBT
index. Orbax's checkpoint format guide describes the files. Supported are OCDBT or one zarr
directory per array, zarr 2 or 3, any chunk grid, written by one process or many.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import Spec, box
from bridge.display import counted, printable
from bridge.errors import Problem, SourceRefused
from bridge.formats.contract import Format, Slab, Timings
from bridge.formats.disk import lfs
from bridge.formats.disk.location import Location, open_regular, tensorstore_context
from bridge.formats.disk.readahead import buffered_bytes
from bridge.formats.disk.stamps import Stamp, take_stamps
from bridge.formats.orbax import chunks, stream
from bridge.formats.orbax.listing import (
    StoredArray,
    list_arrays,
    max_chunk_bytes,
    open_store,
    read_tree_metadata,
    store_spec,
)
from bridge.formats.orbax.ocdbt import RECOPY, Extent, contained
from bridge.formats.orbax.sink import create
from bridge.graph import Form, State

ITEM = "params"
#: entries of a step that are looked into
MAX_ITEMS = 64
#: an item with the state of the optimizer; whether the weights are in it depends on the trainer
TRAINING = "train_state"
UNFINISHED = ".orbax-checkpoint-tmp"
#: suffixes of interrupted downloads
PARTIAL = (".gstmp", ".incomplete", ".part", ".partial", ".crdownload", ".aria2")

#: bytes of an array that is read whole where its beginning cannot be read alone
SAMPLED_WHOLE = 4 << 20

_MARKS = {"_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA", ITEM, TRAINING}


@dataclass(frozen=True)
class OrbaxSource:
    """An Orbax pytree checkpoint open for reading. Names are ``/``-joined paths in the tree."""

    location: Location
    root: Location
    ocdbt: bool
    arrays: Mapping[str, StoredArray]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    format: str = "orbax"
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @cached_property
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
        largest = max((extent.length for extent in stored.chunks or () if extent), default=0)
        # chunks of a bucket are fetched whole
        ahead = largest if self.location.local is None else buffered_bytes(largest)
        if self._streams(name):
            slab = Spec(stream.slab_shape(array), array.spec.dtype).nbytes
            return slab + 4 * stream.READ_BYTES + ahead
        # a decoded chunk, and the rows copied out of it
        return 2 * row * (array.chunks[0] if array.chunks else 1) + ahead

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        shape = self.arrays[name].array.spec.shape
        if rows is None or not shape:
            return self._rows(name, range(shape[0] if shape else 1)).reshape(shape)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(shape[0])
            if step != 1:
                raise IndexError(f"rows of {name} must be contiguous: step {step} is not supported")
            return self._rows(name, range(start, max(start, stop)))
        at = range(shape[0])[rows]
        row: np.ndarray = self._rows(name, range(at, at + 1))[0]
        return row

    def sample(self, name: str, at: np.ndarray) -> np.ndarray | None:
        stored = self.arrays[name]
        array = stored.array
        if stored.chunks is None or array.plain is None or not array.spec.shape:
            return self.read(name)[tuple(at.T)] if array.spec.nbytes <= SAMPLED_WHOLE else None
        numbers = np.ravel_multi_index(tuple((at // array.chunks).T), array.grid)
        inside = np.ravel_multi_index(tuple((at % array.chunks).T), array.chunks)
        values = np.zeros(len(at), array.spec.dtype)
        for number in np.unique(numbers).tolist():
            extent = stored.chunks[number]
            # chunks of a bucket are fetched whole
            if self.location.local is None and extent is not None and extent.length > SAMPLED_WHOLE:
                return None
            chunk = self._chunk(name, number)
            if chunk is not None:  # else it is one of zeros
                here = numbers == number
                first = stream.beginning(array, *chunk, name, int(inside[here].max()) + 1)
                values[here] = first[inside[here]]
        return values

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Timings | None = None
    ) -> Iterator[Slab]:
        array = self.arrays[name].array
        own = array.spec.shape
        if shape not in (None, own):
            # rare, so read whole: rules slice a leaf by its own shape
            yield (0,) * len(shape or ()), self.read(name).reshape(shape or ())
            return
        if self._streams(name):
            yield from stream.slabs(array, self._chunks(name), name, spent or Timings())
            return
        if not own:
            yield (), self.read(name)
            return
        for start in range(0, own[0], array.chunks[0]):
            began = time.perf_counter()
            rows = self._rows(name, range(start, min(start + array.chunks[0], own[0])))
            if spent is not None:
                # TensorStore reads and decodes in one call
                spent.decode += time.perf_counter() - began
            yield (start, *(0,) * (len(own) - 1)), rows

    def _rows(self, name: str, rows: range) -> np.ndarray:
        stored = self.arrays[name]
        array = stored.array
        if stored.chunks is None:
            store = self._tensorstore(name)
            try:
                part = store[rows.start : rows.stop] if array.spec.shape else store
                read = np.asarray(self.location.wait(part.read(), array.spec.nbytes))
            except (ValueError, OSError, IndexError) as error:
                raise self._damaged(name, error) from error
            return read if array.spec.shape else read.reshape(1)
        if not self._streams(name):
            return chunks.read(array, lambda number: self._chunk(name, number), rows, name)
        result = np.empty((len(rows), *array.spec.shape[1:]), array.spec.dtype)
        for at, values in stream.slabs(array, self._chunks(name), name, Timings()):
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
            chunk = self._chunk(name, number)
            assert chunk is not None
            yield chunk

    def _chunk(self, name: str, number: int) -> tuple[Path | None, Extent] | None:
        """The file and extent of a chunk. In a bucket, it is fetched, and becomes an inline extent."""
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
                read = open_store(self.location, True).read(key)
                value = bytes(self.location.wait(read, extent.length).value)
            else:
                value = (self.location / key).read_bytes(max_chunk_bytes(stored.array)) or b""
        except (ValueError, OSError) as error:
            raise self._damaged(name, error) from error
        return None, Extent(len(value), inline=value)

    def _streams(self, name: str) -> bool:
        stored = self.arrays[name]
        return bool(stored.chunks is not None and not stored.sparse and stream.streamable(stored.array))

    def _tensorstore(self, name: str) -> Any:
        """A zarr 3 array, opened in TensorStore."""
        import tensorstore as ts

        stored = self.arrays[name]
        spec = {
            "driver": stored.array.driver,
            "kvstore": store_spec(self.location, self.ocdbt) | {"path": f"{stored.path}/"}
            if self.ocdbt
            else (self.location / stored.path).kvstore(),
            # a missing chunk is an error: by default it is read as zeros
            "fill_missing_data_reads": stored.sparse,
        }
        try:
            opening = ts.open(spec, open=True, read=True, context=tensorstore_context())
            store = self.location.wait(opening)
        except (ValueError, OSError) as error:
            raise self._damaged(name, error) from error
        opened = Spec(tuple(store.shape), np.dtype(store.dtype.numpy_dtype))
        if opened != stored.array.spec:
            raise self._damaged(name, ValueError(f"it is {opened}, and was {stored.array.spec}"))
        return store

    def _damaged(self, name: str, error: Exception) -> SourceRefused:
        return SourceRefused(
            Problem(f"{self.location}: {name} cannot be read: {str(error)[:300].split(chr(10))[0]}", RECOPY)
        )


def claims(location: Location) -> bool:
    """Whether the path looks like Orbax at any level: a run, a step, its params."""
    names = location.names()
    return (
        UNFINISHED in location.url
        or _marked(names)
        or bool(_items(location, names))
        # one level only: symlinks may form loops
        or any(
            _marked(inner) or _items(location / name, inner)
            for name in names
            if _step(name) is not None
            for inner in [(location / name).names()]
        )
    )


def _marked(names: list[str]) -> bool:
    return any(name in _MARKS or name.startswith("ocdbt.process_") or UNFINISHED in name for name in names)


def _items(location: Location, names: list[str]) -> list[str]:
    """The items of a step, of any name: directories that have the metadata of a tree in them."""
    if location.local is None or len(names) > MAX_ITEMS:
        return [name for name in names if name == ITEM]  # listing a bucket takes long
    return [name for name in names if (location / name / "_METADATA").is_file()]


def _listed_items(location: Location) -> dict[str, list[str]]:
    """In a bucket, the items of a step (under ``""``) and those of each step of a run, by one listing of it."""
    items: dict[str, list[str]] = {}
    for path in location.files() if location.local is None else ():
        *above, item, file = ("", *path.split("/"))
        if file == "_METADATA" and len(above) in (1, 2):
            items.setdefault(above[-1], []).append(item)
    return items


def open_orbax(location: Location) -> OrbaxSource:
    """Open the ``params`` of a path: every array is listed, none is read.

    Raises:
        SourceRefused: the path is at the wrong level, the save is unfinished, or the index, the
            metadata and the store disagree.
    """
    params, root, notes = resolve(location)
    files = params.files() if params.local is not None else []
    stamps = take_stamps(params.local / file for file in files) if params.local is not None else {}
    _refuse_leftovers(params, files)
    tree, sparse = read_tree_metadata(params)
    ocdbt = (params / "manifest.ocdbt").is_file()
    if not ocdbt and any(name.startswith("ocdbt.process_") for name in params.names()):
        raise SourceRefused(
            Problem(
                f"{params}: manifest.ocdbt is missing: the save did not finish, or the copy is incomplete",
                "convert an earlier step, or copy the checkpoint again",
            )
        )
    arrays = list_arrays(params, ocdbt, tree, sparse)
    if zeros := [name for name, stored in arrays.items() if stored.sparse]:
        notes += (
            f"{counted(len(zeros), 'array')} with chunks of zeros omitted, as this version of Orbax does",
        )
    return OrbaxSource(params, root, ocdbt, arrays, notes, stamps=stamps)


def resolve(location: Location) -> tuple[Location, Location, tuple[str, ...]]:
    """Resolve a user's path: (the params directory, the directory with its assets, notes).

    The path may be a params directory, a step that contains one, or a directory of steps, of which
    the latest complete step is used and a note says so.
    """
    names = location.names()
    if not names:
        what = "is empty" if location.exists() else "does not exist"
        raise SourceRefused(Problem(f"{location} {what}", "give the directory of a checkpoint"))
    if UNFINISHED in location.url:
        raise SourceRefused(Problem(f"{location} is an unfinished save", "convert the latest complete step"))
    if (
        "_METADATA" in names
        or "manifest.ocdbt" in names
        or any(n.startswith("ocdbt.process_") for n in names)
    ):
        return location, location.parent if _is_item(location) else location, ()
    if ITEM in names:
        return location / ITEM, location, ()
    listed = _listed_items(location)
    if items := [name for name in listed.get("", _items(location, names)) if name != TRAINING]:
        return _only_item(location, items)
    steps = sorted((number, name) for name in names if (number := _step(name)) is not None)
    complete = [name for _, name in steps if (location / name / ITEM / "_METADATA").is_file()]
    others = [
        name
        for _, name in steps
        if (name in listed if location.local is None else _items(location / name, (location / name).names()))
    ]
    if others and not complete:
        params, root, notes = resolve((location / others[-1]).entered())
        return (
            params,
            root,
            (printable(f"using step {others[-1]}, the latest complete step of {location}"), *notes),
        )
    if complete:
        skipped = [name for _, name in steps if name not in complete] + [n for n in names if UNFINISHED in n]
        note = f"using step {complete[-1]}, the latest complete step of {location}"
        if skipped:
            note += f" (incomplete: {', '.join(skipped)})"
        # steps are often kept on another disk, and linked to
        step = (location / complete[-1]).entered()
        return step / ITEM, step, (printable(note),)
    if steps or any(UNFINISHED in name for name in names):
        raise SourceRefused(
            Problem(
                f"{location} has no complete step ({', '.join(n for n in names)})",
                "let the save finish, or convert another run",
            )
        )
    if TRAINING in names:
        raise SourceRefused(
            Problem(
                f"{location} contains {TRAINING} but no {ITEM}/",
                f"copy {ITEM}/ from the training machine as well; weights that are in {TRAINING} itself are read "
                f"with --item {TRAINING}",
            )
        )
    if ITEM in location.parent.names():
        raise SourceRefused(
            Problem(f"{location} is beside {ITEM}/, one level too deep", f"give {location.parent}")
        )
    raise SourceRefused(
        Problem(
            f"{location} is not a checkpoint (contains {', '.join(names[:6])})",
            f"give the step directory that contains {ITEM}/",
        )
    )


def _is_item(location: Location) -> bool:
    """Whether a directory is one of the items of a step, beside which assets are."""
    return location.name == ITEM or (
        location.local is not None and (location.parent / "_CHECKPOINT_METADATA").is_file()
    )


def _only_item(location: Location, items: list[str]) -> tuple[Location, Location, tuple[str, ...]]:
    """The item of a step that has one, of whatever name."""
    if len(items) > 1:
        raise SourceRefused(
            Problem(
                f"{location} has several items: {', '.join(items)}",
                f"choose one: --item {' or '.join(items)}",
            )
        )
    return location / items[0], location, (printable(f"using item {items[0]}, the only one of {location}"),)


def _step(name: str) -> int | None:
    """The number of a step: Orbax names step directories by number, with an optional prefix."""
    tail = name.rsplit("_", 1)[-1]
    return int(tail) if tail.isascii() and tail.isdigit() and len(tail) < 20 else None


def _refuse_leftovers(params: Location, files: list[str]) -> None:
    """Refuse files that were not fetched: git-lfs pointers and interrupted downloads."""
    pointers = []
    for file in files:
        if file.endswith(PARTIAL):
            raise SourceRefused(Problem(f"{params / file} is an interrupted download", RECOPY))
        assert params.local is not None
        path = params.local / file
        try:
            if path.stat().st_size < 1024:
                with open_regular(path) as opened:
                    if lfs.is_pointer(opened.read(len(lfs.POINTER))):
                        pointers.append(file)
        except OSError as error:
            raise SourceRefused(
                Problem(f"{path}: {error.strerror}", "check the path and its permissions")
            ) from error
    if pointers:
        raise SourceRefused(lfs.pointer_problem(params / pointers[0], len(pointers)))


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
