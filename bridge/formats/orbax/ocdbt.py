"""The index of an OCDBT store: where in which file each value is stored.

TensorStore decodes the index (``ts.ocdbt.dump``). Walking it here gives, before any data is read,
the stored size of every array and whether every file is complete, and lets a reader stream a chunk
that TensorStore could only decode whole. TensorStore trusts what it decodes, so the path and the
decoded size of every node are checked first.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.formats.disk.location import Location, is_safe_path, open_regular, tensorstore_context
from bridge.formats.orbax import zstd

RECOPY = "copy the checkpoint again: this copy is incomplete or damaged"
MANIFEST = "manifest.ocdbt"

MAX_NODES = 1 << 16
#: bytes of the manifest and of all nodes, decoded; an index of 100,000 arrays takes 60 MB
MAX_INDEX = 256 << 20


@dataclass(frozen=True)
class Extent:
    """The bytes of one value: in the index itself (``inline``), or a range of a file."""

    length: int
    inline: bytes | None = None
    file: str = ""
    offset: int = 0


class _Node(NamedTuple):
    reference: str
    prefix: bytes
    height: int


def index(location: Location) -> dict[str, Extent]:
    """Every key of the store at ``location``, and the extent of its value.

    Raises:
        SourceRefused: the manifest or a node is missing, damaged or too large, or a path in the
            index leads out of the checkpoint.
    """
    import tensorstore as ts

    try:
        store = location.wait(ts.KvStore.open(location.kvstore(), context=tensorstore_context()))
        text = (location / MANIFEST).read_bytes(MAX_INDEX) or b""
        left = MAX_INDEX - _decoded_size(text, MANIFEST, MAX_INDEX)
        manifest = location.wait(ts.ocdbt.dump(store))
        versions = manifest.get("versions") or []
        if not versions:
            # very long histories move the newest version out of the manifest; Orbax writes only one
            raise ValueError("the manifest lists no version")
        extents: dict[str, Extent] = {}
        walked: set[Extent] = set()
        root = versions[-1]["root"].get("location")
        # an empty store has no root
        pending = [] if root is None else [_Node(str(root), b"", int(versions[-1]["root_height"]))]
        while pending:
            node = pending.pop()
            extent = _extent(node.reference, "btreenode")
            if extent in walked:
                raise ValueError(f"the B-tree is not a tree: node {node.reference} is reached twice")
            if len(walked) == MAX_NODES:
                raise ValueError(f"the B-tree has more than {MAX_NODES} nodes")
            walked.add(extent)
            left -= _decoded_size(_node_text(location, store, extent, left), extent.file, left)
            decoded = location.wait(ts.ocdbt.dump(store, node.reference), extent.length)
            pending += _read_node(decoded, node, extents)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
        raise SourceRefused(
            Problem(f"{location}/{MANIFEST}: the index cannot be read: {_short(error)}", RECOPY)
        ) from error
    return extents


def _read_node(decoded: Any, node: _Node, extents: dict[str, Extent]) -> list[_Node]:
    """Add the values of a leaf node to ``extents``, or return the children of an inner node."""
    if decoded["height"] != node.height:
        raise ValueError(f"node {node.reference} is at height {decoded['height']}; expected {node.height}")
    children = []
    last: bytes | None = None
    for entry in decoded["entries"]:
        own = _bytes(entry.get("key", b""))
        if last is not None and own <= last:
            raise ValueError(f"the keys of node {node.reference} are not in order")
        last = own
        key = node.prefix + own
        if "inline_value" in entry:
            value = _bytes(entry["inline_value"])
            extent = Extent(len(value), inline=value)
        elif "indirect_value" in entry:
            extent = _extent(str(entry["indirect_value"]), "value")
        else:
            if node.height < 1:
                raise ValueError(f"node {node.reference} is a leaf but has children")
            stem = node.prefix + _bytes(entry.get("subtree_common_prefix", b""))
            children.append(_Node(str(entry["location"]), stem, node.height - 1))
            continue
        if extents.setdefault(key.decode(), extent) is not extent:
            raise ValueError(f"duplicate key {key.decode()}")
    return children


def _decoded_size(text: bytes, file: str, at_most: int) -> int:
    """Decoded size of a manifest or a node. Its content is TensorStore's to check.

    Layout: magic (4 bytes), length (8), version and compression (varints of one byte each so far),
    content, CRC-32C (4). See "OCDBT storage format" in TensorStore's documentation.

    Raises:
        ValueError: it is more than ``at_most``, or it cannot be decoded.
    """
    size = len(text)
    if size > 18 and text[13] == 1:
        import zstandard

        size = 0
        try:
            with zstd.reader(text[14:-4], 1 << 20) as stream:
                while size <= at_most and (piece := stream.read(1 << 20)):
                    size += len(piece)
        except zstandard.ZstdError as error:
            raise ValueError(f"{file}: {error}") from error
    if size > at_most:
        raise ValueError(f"{file} decodes to more than {at_most} bytes")
    return size


def _node_text(location: Location, store: Any, extent: Extent, at_most: int) -> bytes:
    """The stored bytes of a node."""
    if extent.length > at_most:
        raise ValueError(f"{extent.file} has {extent.length} bytes")
    if location.local is None:
        end = extent.offset + extent.length
        read = store.read(extent.file, byte_range=slice(extent.offset, end))
        return bytes(location.wait(read, extent.length).value)
    with io.BufferedReader(open_regular(contained(location.local, extent.file))) as file:
        file.seek(extent.offset)
        return file.read(extent.length)


def check_files(location: Location, extents: Mapping[str, Extent]) -> None:
    """Refuse a store with a file that is missing or shorter than the index says."""
    root = location.local
    if root is None:
        return
    ends: dict[str, int] = {}
    for extent in extents.values():
        if extent.inline is None:
            ends[extent.file] = max(ends.get(extent.file, 0), extent.offset + extent.length)
    problems = []
    for file, end in sorted(ends.items()):
        path = contained(root, file)
        if not path.is_file():
            problems.append(Problem(f"{path} is missing, but the index points to it", RECOPY))
        elif (size := path.stat().st_size) < end:
            problems.append(Problem(f"{path} has {size} bytes, but the index points to byte {end}", RECOPY))
    refuse_if(problems, SourceRefused)


def whole_file(root: Path, file: str) -> Extent:
    """The extent of a value that is a whole file, as in a store that is a plain directory."""
    return Extent((root / file).stat().st_size, file=file)


def contained(root: Path, file: str) -> Path:
    """``root / file``, refused if it is not below ``root``."""
    if not is_safe_path(file):
        raise SourceRefused(
            Problem(f"{root}: the index points to an unsafe path: {file!r}", "do not trust this checkpoint")
        )
    return root / file


def _extent(text: str, expected: str) -> Extent:
    """Parse ``kind:<base>:<file>:<offset>:<length>``; base, a directory, and file are percent-encoded."""
    from urllib.parse import unquote

    kind, base, file, offset, length = text.split(":")
    if kind != expected or not (offset.isdigit() and length.isdigit()):
        raise ValueError(f"unknown reference {text[:200]!r}")
    return Extent(int(length), file=unquote(base) + unquote(file), offset=int(offset))


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _short(error: Exception) -> str:
    return str(error).split(" [source locations")[0].split("\n")[0][:300]
