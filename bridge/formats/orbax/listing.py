"""The listing of an Orbax checkpoint: its tree, its arrays and their chunks, checked for consistency.

The tree (``_METADATA``), the arrays' metadata (``.zarray``, ``zarr.json``) and the store must agree
before anything is read: an array that only some of them list would be lost, or read as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.display import and_more, counted
from bridge.errors import Problem, SourceRefused, reason, refuse_if
from bridge.formats.disk.location import Location, tensorstore_context
from bridge.formats.dtypes import DEQUANTISE, ForeignDtype
from bridge.formats.orbax import zstd
from bridge.formats.orbax.ocdbt import RECOPY, Extent, check_files, index, whole_file
from bridge.formats.orbax.zarr import MAX_TEXT, ZarrArray, parse_v2, parse_v3
from bridge.strict_json import parse_object, shown

#: bytes of ``_METADATA``; it takes 35 MB for 100,000 leaves
MAX_METADATA = 64 << 20
MAX_NAME = 1024
V2, V3 = ".zarray", "zarr.json"


@dataclass(frozen=True)
class StoredArray:
    """One array: its path in the store, its metadata, and the extents of its chunks."""

    path: str
    array: ZarrArray
    chunks: tuple[Extent | None, ...] | None
    """In C order of the grid, None for an absent chunk; None altogether for zarr 3."""
    sparse: bool = False
    """Whether chunks of zeros were omitted when it was saved."""

    @property
    def keys(self) -> Iterator[str]:
        """The keys of the chunks in the store, in C order of the grid."""
        return (f"{self.path}/{key}" for _, key in self.array.chunk_keys())


def store_spec(location: Location, ocdbt: bool) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": location.kvstore()} if ocdbt else location.kvstore()


def open_store(location: Location, ocdbt: bool) -> Any:
    import tensorstore as ts

    return location.wait(ts.KvStore.open(store_spec(location, ocdbt), context=tensorstore_context()))


def read_tree_metadata(params: Location) -> tuple[dict[str, str], bool]:
    """Read ``_METADATA``.

    Returns:
        Path in the tree (``/``-joined) -> path in the store (``.``-joined), and whether chunks of
        zeros may be absent: Orbax before ``store_array_data_equal_to_fill_value`` omits them.
    """
    file = params / "_METADATA"
    text = file.read_bytes(MAX_METADATA)
    if text is None:
        raise SourceRefused(
            Problem(
                f"{file} is missing: the save did not finish, or the copy is incomplete",
                "convert an earlier step, or copy the checkpoint again",
            )
        )
    try:
        metadata = parse_object(text)
        sparse = not metadata.get("store_array_data_equal_to_fill_value", False)
        keys = [
            tuple(_key(key["key"]) for key in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
            if entry["value_metadata"].get("value_type") not in ("None", "Dict", "List")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceRefused(Problem(f"{file} is damaged: {reason(error)}", RECOPY)) from error
    tree: dict[str, str] = {}
    used: set[str] = set()
    problems = []
    for path in keys:
        stored = ".".join(path)
        if not all(path) or any("." in key or "/" in key for key in path) or not path or stored in used:
            problems.append(Problem(f"{file}: ambiguous tree path {'/'.join(path)!r}", RECOPY))
        if len(stored) > MAX_NAME or not stored.isprintable():
            problems.append(Problem(f"{file}: unsafe tree path {shown('/'.join(path))}", RECOPY))
        used.add(stored)
        tree["/".join(path)] = stored
    refuse_if(problems, SourceRefused)
    return tree, sparse


def _key(key: object) -> str:
    """One key of a tree path: a name, or a number in a list."""
    if not isinstance(key, str) and type(key) is not int:
        raise TypeError(f"a key is {shown(key)}")
    return str(key)


def list_arrays(
    params: Location, ocdbt: bool, tree: Mapping[str, str], sparse: bool
) -> dict[str, StoredArray]:
    extents = index(params) if ocdbt else None
    if extents is not None:
        check_files(params, extents)
    keys = set(extents) if extents is not None else set(params.files())
    inside: dict[str, set[str]] = {}
    for key in keys:
        # chunk keys may contain a `/`; paths of arrays do not
        inside.setdefault(key.split("/", 1)[0], set()).add(key)
    metadata = {
        path: [f"{path}/{name}" for name in (V2, V3) if f"{path}/{name}" in among]
        for path, among in inside.items()
    }
    stored = set(tree.values())
    problems = [
        Problem(f"{params}: _METADATA lists {name}, which is missing from the store", RECOPY)
        for name, path in tree.items()
        if not metadata.get(path)
    ]
    problems += [
        Problem(f"{params}: the store contains {path}, which _METADATA does not list", RECOPY)
        for path in sorted(path for path, files in metadata.items() if files and path not in stored)
    ]
    problems += [
        Problem(f"{params}: {path} has both {V2} and {V3}", RECOPY)
        for path in sorted(path for path, files in metadata.items() if len(files) > 1)
    ]
    refuse_if(problems, SourceRefused)

    arrays: dict[str, StoredArray] = {}
    others: dict[str, list[str]] = {}
    for name, path in tree.items():
        (key,) = metadata[path]
        try:
            text = _array_metadata(params, ocdbt, key, extents)
            array = parse_v2(text) if key.endswith(V2) else parse_v3(text)
        except ForeignDtype as foreign:
            others.setdefault(str(foreign), []).append(name)
            continue
        except (ValueError, OSError) as error:
            problems.append(Problem(f"{params}: the metadata of {name} is damaged: {error}", RECOPY))
            continue
        stored_array, faults = _chunks_of(params, array, name, path, inside[path] - {key}, extents, sparse)
        problems += faults
        if stored_array is not None:
            arrays[name] = stored_array
    problems += [
        Problem(f"{params}: {and_more(names)} {stored_as}", DEQUANTISE) for stored_as, names in others.items()
    ]
    refuse_if(problems, SourceRefused)
    return arrays


def _array_metadata(params: Location, ocdbt: bool, key: str, extents: Mapping[str, Extent] | None) -> bytes:
    """The text of a ``.zarray`` or ``zarr.json``."""
    if extents is None:
        return (params / key).read_bytes(MAX_TEXT) or b""
    extent = extents[key]
    if extent.length > MAX_TEXT:
        raise ValueError(f"it has {extent.length} bytes")
    if extent.inline is not None:
        return extent.inline
    return bytes(params.wait(open_store(params, ocdbt).read(key)).value)


def _chunks_of(
    params: Location,
    array: ZarrArray,
    name: str,
    path: str,
    keys: set[str],
    extents: Mapping[str, Extent] | None,
    sparse: bool,
) -> tuple[StoredArray | None, list[Problem]]:
    """An array with the extents of its chunks, or what is wrong with them."""
    count = math.prod(array.grid)
    if count > len(keys) and not sparse:
        missing = count - len(keys)
        return None, [Problem(f"{params}: {name} lacks {missing} of {count} chunks", RECOPY)]
    expected = [f"{path}/{key}" for _, key in array.chunk_keys()]
    missing = sum(key not in keys for key in expected)
    if missing and not sparse:
        return None, [Problem(f"{params}: {name} lacks {missing} of {count} chunks", RECOPY)]
    if beyond := keys - set(expected) - {f"{path}/.zattrs"}:
        cause = f"{params}: {name} has {counted(len(beyond), 'chunk')} outside its grid (the first: {min(beyond)})"
        return None, [Problem(cause, RECOPY)]
    chunks = tuple(
        None if key not in keys else extents[key] if extents is not None else _file_extent(params, key, array)
        for key in expected
    )
    stored = StoredArray(path, array, None if array.plain is None else chunks, sparse=bool(missing))
    return stored, [
        Problem(f"{params}: {name} {why} (chunk {key})", RECOPY)
        for key, extent in zip(expected, chunks, strict=True)
        if extent is not None and (why := _misfit(array, extent))
    ]


def _file_extent(params: Location, key: str, array: ZarrArray) -> Extent:
    """The extent of a chunk in its own file; in a bucket, its length is not known until it is read."""
    return Extent(_chunk_bytes(array), file=key) if params.local is None else whole_file(params.local, key)


def _misfit(array: ZarrArray, extent: Extent) -> str:
    """Why a chunk of this length cannot decode to its shape; empty if it can."""
    size = _chunk_bytes(array)
    if array.plain == "raw":
        if extent.length < size:
            return f"is truncated by {size - extent.length} bytes"
        return "has more bytes than its shape" if extent.length > size else ""
    if array.plain == "zstd" and extent.length * zstd.RATIO < size:
        return f"cannot be read: {extent.length} bytes of zstd do not decode to {size}"
    if extent.length > max_chunk_bytes(array):
        return f"cannot be read: {extent.length} bytes are too many for {size} decoded"
    return ""


def _chunk_bytes(array: ZarrArray) -> int:
    return math.prod(array.chunks) * array.spec.dtype.itemsize


def max_chunk_bytes(array: ZarrArray) -> int:
    """The most bytes a chunk may take: zstd adds some to incompressible data, zarr 3 a shard index."""
    return (2 if array.plain is not None else 32) * _chunk_bytes(array) + 1024
