"""Orbax checkpoints: finding the ``params`` a user means, listing its arrays, reading them.

Read with TensorStore and our own walk of the OCDBT index; Orbax itself is not needed, nor jax.
What the directory holds is described in Orbax's checkpoint format guide; the accepted forms are
OCDBT or one zarr directory an array, zarr 2 or 3, any chunk grid, written by one process or many.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import Problem, SourceRefused, printable, refuse_if
from bridge.formats import Format, Slab, Spent, chunks, stream, zstd
from bridge.formats.location import Location, open_regular, tensorstore_context
from bridge.formats.ocdbt import RECOPY, Extent, check_files, contained, index, whole_file
from bridge.formats.orbax_writing import create
from bridge.formats.stamps import Stamp, take
from bridge.formats.zarr import MAX_TEXT, ZarrArray, parse_v2, parse_v3
from bridge.specs import Spec, box
from bridge.strict_json import parse_object, shown

ITEM = "params"
UNFINISHED = ".orbax-checkpoint-tmp"
LFS = b"version https://git-lfs.github.com/spec/"
#: what tools leave where a download was cut off
PARTIAL = (".gstmp", ".incomplete", ".part", ".partial", ".crdownload", ".aria2")
#: bytes of ``_METADATA``; 100,000 leaves take 35 MB
MAX_METADATA = 64 << 20
MAX_NAME = 1024
V2, V3 = ".zarray", "zarr.json"

_MARKS = {"_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA", ITEM, "train_state"}


@dataclass(frozen=True)
class Stored:
    """One array: its metadata, its path in the store, and its chunks, where the index tells."""

    path: str
    array: ZarrArray
    chunks: tuple[Extent | None, ...] | None
    """None for zarr 3; None in the place of a chunk that was left out."""
    sparse: bool = False
    """Whether chunks that hold only zeros were left out when it was saved."""

    @property
    def keys(self) -> Iterator[str]:
        """The chunks' keys in the store, in C order of the grid."""
        return (f"{self.path}/{key}" for _, key in self.array.chunk_keys())


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
        # a bucket's chunk is fetched whole
        fetched = 0 if self.location.local or not stored.chunks else max(e.length for e in stored.chunks if e)
        if self._streams(name):
            slab = Spec(stream.slab_shape(array), array.spec.dtype).nbytes
            return slab + 4 * stream.READ_BYTES + fetched
        # decoded chunks beside the rows copied out of them
        return 2 * row * (array.chunks[0] if array.chunks else 1) + fetched

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
                value = bytes(_store(self.location, True).read(key).result().value)
            else:
                value = (self.location / key).read_bytes(_longest(stored.array)) or b""
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
            "kvstore": _store_spec(self.location, self.ocdbt) | {"path": f"{stored.path}/"}
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


def _store_spec(location: Location, ocdbt: bool) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": location.kvstore()} if ocdbt else location.kvstore()


def _store(location: Location, ocdbt: bool) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(_store_spec(location, ocdbt), context=tensorstore_context()).result()


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
    tree, sparse = _tree(params)
    ocdbt = (params / "manifest.ocdbt").is_file()
    if not ocdbt and any(name.startswith("ocdbt.process_") for name in params.names()):
        raise SourceRefused(
            Problem(
                f"{params}: manifest.ocdbt is missing: the save was not finished, or not copied whole",
                "convert an earlier step, or copy the checkpoint again",
            )
        )
    arrays = _arrays(params, ocdbt, tree, sparse)
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


def _tree(params: Location) -> tuple[dict[str, str], bool]:
    """Read ``_METADATA``: path in the tree (``/``-joined) -> path in the store (``.``-joined).

    The second value says whether chunks of zeros may be absent: Orbax before
    ``store_array_data_equal_to_fill_value`` did not store them.
    """
    file = params / "_METADATA"
    text = file.read_bytes(MAX_METADATA)
    if text is None:
        raise SourceRefused(
            Problem(
                f"{file} is missing: the save was not finished, or not copied whole",
                "convert an earlier step, or copy the checkpoint again",
            )
        )
    try:
        described = parse_object(text)
        sparse = not described.get("store_array_data_equal_to_fill_value", False)
        keys = [
            tuple(_key(key["key"]) for key in entry["key_metadata"])
            for entry in described["tree_metadata"].values()
            if entry["value_metadata"].get("value_type") not in ("None", "Dict", "List")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceRefused(Problem(f"{file} is damaged: {error!r}", RECOPY)) from error
    tree: dict[str, str] = {}
    taken: set[str] = set()
    problems = []
    for path in keys:
        stored = ".".join(path)
        if not all(path) or any("." in key or "/" in key for key in path) or not path or stored in taken:
            problems.append(
                Problem(f"{file}: the tree path {'/'.join(path)!r} cannot be told from others", RECOPY)
            )
        if len(stored) > MAX_NAME or not stored.isprintable():
            problems.append(Problem(f"{file}: the tree path {shown('/'.join(path))} is not safe", RECOPY))
        taken.add(stored)
        tree["/".join(path)] = stored
    refuse_if(problems, SourceRefused)
    return tree, sparse


def _key(key: object) -> str:
    """One key of a tree path: a name, or a number in a list."""
    if not isinstance(key, str) and type(key) is not int:
        raise TypeError(f"a key is {shown(key)}")
    return str(key)


def _arrays(params: Location, ocdbt: bool, tree: Mapping[str, str], sparse: bool) -> dict[str, Stored]:
    extents = index(params) if ocdbt else None
    if extents is not None:
        check_files(params, extents)
    keys = set(extents) if extents is not None else set(params.files())
    inside: dict[str, set[str]] = {}
    for key in keys:
        # chunk keys may have a `/` of their own; tree paths have none
        inside.setdefault(key.split("/", 1)[0], set()).add(key)
    metadata = {
        path: [f"{path}/{name}" for name in (V2, V3) if f"{path}/{name}" in among]
        for path, among in inside.items()
    }
    stored = set(tree.values())
    problems = [
        Problem(f"{params}: {name} is listed in _METADATA, and the store has no such array", RECOPY)
        for name, path in tree.items()
        if not metadata.get(path)
    ]
    problems += [
        Problem(f"{params}: the store holds {path}, which _METADATA does not list", RECOPY)
        for path in sorted(path for path, found in metadata.items() if found and path not in stored)
    ]
    problems += [
        Problem(f"{params}: {path} is described twice, by {V2} and {V3}", RECOPY)
        for path in sorted(path for path, found in metadata.items() if len(found) > 1)
    ]
    refuse_if(problems, SourceRefused)

    arrays: dict[str, Stored] = {}
    for name, path in tree.items():
        (key,) = metadata[path]
        try:
            text = _description(params, ocdbt, key, extents)
            array = parse_v2(text) if key.endswith(V2) else parse_v3(text)
        except (ValueError, OSError) as error:
            problems.append(Problem(f"{params}: the description of {name} is damaged: {error}", RECOPY))
            continue
        found, trouble = _chunks_of(params, array, name, path, inside[path] - {key}, extents, sparse)
        problems += trouble
        if found is not None:
            arrays[name] = found
    refuse_if(problems, SourceRefused)
    return arrays


def _description(params: Location, ocdbt: bool, key: str, extents: Mapping[str, Extent] | None) -> bytes:
    """A ``.zarray`` or ``zarr.json``."""
    if extents is None:
        return (params / key).read_bytes(MAX_TEXT) or b""
    extent = extents[key]
    if extent.length > MAX_TEXT:
        raise ValueError(f"it has {extent.length} bytes")
    if extent.inline is not None:
        return extent.inline
    return bytes(_store(params, ocdbt).read(key).result().value)


def _chunks_of(
    params: Location,
    array: ZarrArray,
    name: str,
    path: str,
    keys: set[str],
    extents: Mapping[str, Extent] | None,
    sparse: bool,
) -> tuple[Stored | None, list[Problem]]:
    """An array whose chunks are all there, or what is wrong with them."""
    count = math.prod(array.grid)
    if count > len(keys) and not sparse:
        missing = count - len(keys)
        return None, [Problem(f"{params}: {name} lacks {missing} of {count} chunks", RECOPY)]
    expected = [f"{path}/{key}" for _, key in array.chunk_keys()]
    missing = sum(key not in keys for key in expected)
    if missing and not sparse:
        return None, [Problem(f"{params}: {name} lacks {missing} of {count} chunks", RECOPY)]
    if beyond := keys - set(expected) - {f"{path}/.zattrs"}:
        cause = f"{params}: {name} has no place for {len(beyond)} of its chunks (the first: {min(beyond)})"
        return None, [Problem(cause, RECOPY)]
    chunks = tuple(
        None if key not in keys else extents[key] if extents is not None else _file_extent(params, key, array)
        for key in expected
    )
    found = Stored(path, array, None if array.plain is None else chunks, sparse=bool(missing))
    return found, [
        Problem(f"{params}: {name} {why} (chunk {key})", RECOPY)
        for key, extent in zip(expected, chunks, strict=True)
        if extent is not None and (why := _misfit(array, extent))
    ]


def _file_extent(params: Location, key: str, array: ZarrArray) -> Extent:
    """A chunk that is a file of its own; how long it is in a bucket is not known before it is read."""
    return Extent(_chunk_bytes(array), file=key) if params.local is None else whole_file(params.local, key)


def _misfit(array: ZarrArray, extent: Extent) -> str:
    """Why a chunk of these many bytes cannot hold what its shape needs."""
    size = _chunk_bytes(array)
    if array.plain == "raw":
        if extent.length < size:
            return f"ends {size - extent.length} bytes too soon"
        return "holds more bytes than its shape" if extent.length > size else ""
    if array.plain == "zstd" and extent.length * zstd.RATIO < size:
        return f"cannot be read: {extent.length} bytes of zstd do not decode to {size}"
    if extent.length > _longest(array):
        return f"cannot be read: it takes {extent.length} bytes to hold {size}"
    return ""


def _chunk_bytes(array: ZarrArray) -> int:
    return math.prod(array.chunks) * array.spec.dtype.itemsize


def _longest(array: ZarrArray) -> int:
    """Bytes that a chunk takes at most: zstd adds some to what it cannot compress, zarr 3 an index of parts."""
    return (2 if array.plain is not None else 32) * _chunk_bytes(array) + 1024


FORMAT = Format(name="orbax", claims=claims, open=open_orbax, create=create)
