"""What an Orbax store lists: its tree, its arrays, and where their chunks lie, held against each other.

Metadata (``_METADATA``), descriptions (``.zarray``, ``zarr.json``) and store must agree before
anything is read: what one has and another lacks would be lost, or read as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.formats.disk.location import Location, tensorstore_context
from bridge.formats.orbax import zstd
from bridge.formats.orbax.ocdbt import RECOPY, Extent, check_files, index, whole_file
from bridge.formats.orbax.zarr import MAX_TEXT, ZarrArray, parse_v2, parse_v3
from bridge.strict_json import parse_object, shown

#: bytes of ``_METADATA``; 100,000 leaves take 35 MB
MAX_METADATA = 64 << 20
MAX_NAME = 1024
V2, V3 = ".zarray", "zarr.json"


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


def store_spec(location: Location, ocdbt: bool) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": location.kvstore()} if ocdbt else location.kvstore()


def open_store(location: Location, ocdbt: bool) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(store_spec(location, ocdbt), context=tensorstore_context()).result()


def read_tree_metadata(params: Location) -> tuple[dict[str, str], bool]:
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


def list_arrays(params: Location, ocdbt: bool, tree: Mapping[str, str], sparse: bool) -> dict[str, Stored]:
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
    return bytes(open_store(params, ocdbt).read(key).result().value)


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
    if extent.length > longest(array):
        return f"cannot be read: it takes {extent.length} bytes to hold {size}"
    return ""


def _chunk_bytes(array: ZarrArray) -> int:
    return math.prod(array.chunks) * array.spec.dtype.itemsize


def longest(array: ZarrArray) -> int:
    """Bytes that a chunk takes at most: zstd adds some to what it cannot compress, zarr 3 an index of parts."""
    return (2 if array.plain is not None else 32) * _chunk_bytes(array) + 1024
