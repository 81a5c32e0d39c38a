"""Orbax checkpoints: finding the ``params`` a user means, listing its arrays, reading them.

Read with TensorStore and our own walk of the OCDBT index; Orbax itself is not needed, nor jax.
What the directory holds is described in Orbax's checkpoint format guide; the accepted forms are
OCDBT or one zarr directory an array, zarr 2 or 3, any chunk grid, written by one process or many.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.formats import Format, Slab, Spent, stream
from bridge.formats.location import Location, tensorstore_context
from bridge.formats.ocdbt import RECOPY, Extent, check_files, contained, index, whole_file
from bridge.formats.orbax_writing import create
from bridge.formats.stamps import Stamp, take
from bridge.formats.zarr import ZarrArray, parse_v2, parse_v3
from bridge.specs import Spec

ITEM = "params"
UNFINISHED = ".orbax-checkpoint-tmp"
LFS = b"version https://git-lfs.github.com/spec/"

_MARKS = {"_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA", ITEM, "train_state"}


@dataclass(frozen=True)
class Stored:
    """One array: its metadata, its path in the store, and its chunks, where the index tells."""

    path: str
    array: ZarrArray
    chunks: tuple[Extent, ...] | None
    sparse: bool = False
    """Whether chunks that hold only zeros were left out when it was saved."""


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
        return sum(extent.length for extent in stored.chunks)

    def how(self, name: str) -> str:
        return "streamed" if self._streams(name) else "tensorstore"

    def buffered_bytes(self, name: str) -> int:
        array = self.arrays[name].array
        if self._streams(name):
            return Spec(stream.slab_shape(array), array.spec.dtype).nbytes + 4 * stream.READ_BYTES
        row = array.spec.nbytes // max(array.spec.shape[0] if array.spec.shape else 1, 1)
        # decoded chunks beside the rows copied out of them
        return 2 * row * (array.chunks[0] if array.chunks else 1)

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        store = self._tensorstore(name)
        at: Any = rows
        if isinstance(rows, slice):
            start, stop, step = rows.indices(store.shape[0])
            if step != 1:
                raise IndexError(f"rows of {name} are read in order: no step {step}")
            at = slice(start, max(start, stop))
        elif rows is not None:
            at = range(store.shape[0])[rows]
        try:
            return np.asarray((store if at is None else store[at]).read().result())
        except (ValueError, OSError, IndexError) as error:
            raise self._damaged(name, error) from error

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Spent | None = None
    ) -> Iterator[Slab]:
        stored = self.arrays[name]
        own = stored.array.spec.shape
        if shape not in (None, own):
            # no leaf is read by another shape than its own as a rule; one that is, is read whole
            yield (0,) * len(shape or ()), self.read(name).reshape(shape or ())
            return
        if self._streams(name):
            assert stored.chunks is not None and self.location.local is not None
            root = self.location.local
            files = [(None if e.inline is not None else contained(root, e.file), e) for e in stored.chunks]
            yield from stream.slabs(stored.array, files, name, spent or Spent())
            return
        if not own:
            yield (), self.read(name)
            return
        store = self._tensorstore(name)
        step, total = stored.array.chunks[0], own[0]
        for start in range(0, total, step):
            began = time.perf_counter()
            try:
                # TensorStore does not clip: the last chunk may reach beyond the array
                rows = np.asarray(store[start : min(start + step, total)].read().result())
            except (ValueError, OSError) as error:
                raise self._damaged(name, error) from error
            if spent is not None:
                # reading and decoding are one call
                spent.decode += time.perf_counter() - began
            yield (start, *(0,) * (len(own) - 1)), rows

    def _streams(self, name: str) -> bool:
        stored = self.arrays[name]
        return bool(
            stored.chunks is not None and self.location.local is not None and stream.streamable(stored.array)
        )

    def _tensorstore(self, name: str) -> Any:
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
            return ts.open(spec, open=True, read=True, context=tensorstore_context()).result()
        except (ValueError, OSError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> SourceRefused:
        return SourceRefused(
            Problem(f"{self.location}: {name} cannot be read: {str(error).splitlines()[0][:300]}", RECOPY)
        )


def _store_spec(location: Location, ocdbt: bool) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": location.kvstore()} if ocdbt else location.kvstore()


def claims(location: Location) -> bool:
    """Whether the path looks like Orbax at any level: a run's directory, a step, its params."""
    names = location.names()
    return (
        UNFINISHED in location.url
        or any(name in _MARKS or name.startswith("ocdbt.process_") or UNFINISHED in name for name in names)
        or any(_step(name) is not None and claims(location / name) for name in names)
    )


def open_orbax(location: Location) -> OrbaxSource:
    """Open the ``params`` that a path means, with every array listed and none read.

    Raises:
        SourceRefused: the path is at the wrong level, the save is unfinished, or index,
            metadata and store disagree.
    """
    params, root, notes = resolve(location)
    stamps = take(params.local / file for file in params.files()) if params.local is not None else {}
    _refuse_pointers(params)
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
        return location / finished[-1] / ITEM, location / finished[-1], (note,)
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
    return int(tail) if tail.isascii() and tail.isdigit() else None


def _refuse_pointers(params: Location) -> None:
    """Git LFS leaves a short text where a file should be when the file was not fetched."""
    if params.local is None:
        return
    pointers = []
    for file in params.files():
        path = params.local / file
        if path.stat().st_size < 1024:
            with path.open("rb") as opened:
                if opened.read(len(LFS)) == LFS:
                    pointers.append(file)
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
    text = file.read_bytes()
    if text is None:
        raise SourceRefused(
            Problem(
                f"{file} is missing: the save was not finished, or not copied whole",
                "convert an earlier step, or copy the checkpoint again",
            )
        )
    try:
        described = json.loads(text)
        sparse = not described.get("store_array_data_equal_to_fill_value", False)
        entries = described["tree_metadata"].values()
        keys = [
            tuple(str(key["key"]) for key in entry["key_metadata"])
            for entry in entries
            if entry["value_metadata"].get("value_type") not in ("None", "Dict", "List")
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceRefused(Problem(f"{file} is damaged: {error!r}", RECOPY)) from error
    tree: dict[str, str] = {}
    problems = []
    for path in keys:
        stored = ".".join(path)
        if "/" in stored or not all(path) or "." in "".join(path) or stored in tree.values():
            problems.append(
                Problem(f"{file}: the tree path {'/'.join(path)!r} cannot be told from others", RECOPY)
            )
        tree["/".join(path)] = stored
    refuse_if(problems, SourceRefused)
    return tree, sparse


def _arrays(params: Location, ocdbt: bool, tree: Mapping[str, str], sparse: bool) -> dict[str, Stored]:
    import tensorstore as ts

    extents = index(params) if ocdbt else None
    if extents is not None:
        check_files(params, extents)
    keys = set(extents) if extents is not None else set(params.files())
    paths = {key.rsplit("/", 1)[0]: key for key in keys if key.endswith(("/.zarray", "/zarr.json"))}
    problems = [
        Problem(f"{params}: {name} is listed in _METADATA, and the store has no such array", RECOPY)
        for name, path in tree.items()
        if path not in paths
    ]
    problems += [
        Problem(f"{params}: the store holds {path}, which _METADATA does not list", RECOPY)
        for path in sorted(paths.keys() - set(tree.values()))
    ]
    refuse_if(problems, SourceRefused)

    store = ts.KvStore.open(_store_spec(params, ocdbt), context=tensorstore_context()).result()
    texts = {name: store.read(paths[path]) for name, path in tree.items()}
    arrays: dict[str, Stored] = {}
    for name, path in tree.items():
        parse = parse_v2 if paths[path].endswith("/.zarray") else parse_v3
        try:
            array = parse(bytes(texts[name].result().value))
        except (ValueError, OSError) as error:
            problems.append(Problem(f"{params}: the description of {name} is damaged: {error}", RECOPY))
            continue
        chunk_keys = [f"{path}/{key}" for _, key in array.chunk_keys()]
        missing = [key for key in chunk_keys if key not in keys]
        if missing and sparse:
            arrays[name] = Stored(path, array, None, sparse=True)
        elif missing:
            problems.append(
                Problem(f"{params}: {name} lacks {len(missing)} of {len(chunk_keys)} chunks", RECOPY)
            )
        elif extents is not None:
            arrays[name] = Stored(path, array, tuple(extents[key] for key in chunk_keys))
        elif params.local is not None:
            arrays[name] = Stored(path, array, tuple(whole_file(params.local, key) for key in chunk_keys))
        else:
            arrays[name] = Stored(path, array, None)
    refuse_if(problems, SourceRefused)
    return arrays


FORMAT = Format(name="orbax", claims=claims, open=open_orbax, create=create)
