"""Where the tensors of a checkpoint lie: which bytes of which file.

Found here without bridge, so that what it is measured against does not depend on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Range:
    """Consecutive bytes of a file that are one chunk of an array, or one tensor."""

    path: Path
    offset: int
    length: int
    zstd: bool


Tensors = dict[str, list[Range]]
"""By name, as bridge names them; what is stored inside an index is left out."""


def tensors(checkpoint: Path) -> Tensors:
    """Every tensor of an Orbax step directory, or of a directory of safetensors."""
    params = checkpoint / "params"
    if params.is_dir():
        return _ocdbt(params) if (params / "manifest.ocdbt").is_file() else _zarr(params)
    found: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= _safetensors(path)
    return found


def files(ranges: Iterable[Range]) -> list[Path]:
    return sorted({one.path for one in ranges})


def size(ranges: Iterable[Range]) -> int:
    return sum(one.length for one in ranges)


def overlap(path: Path, start: int, stop: int, ranges: Iterable[Range]) -> int:
    """How many bytes of a read of ``path`` belong to the ranges."""
    return sum(
        max(0, min(stop, one.offset + one.length) - max(start, one.offset))
        for one in ranges
        if one.path == path
    )


def _safetensors(path: Path) -> Tensors:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    found: Tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            found[name] = [Range(path, 8 + length + start, stop - start, False)]
    return found


def _zarr(params: Path) -> Tensors:
    """From one directory of chunks an array, as bridge writes them."""
    found: Tensors = {}
    for described in sorted(params.glob("*/.zarray")):
        zstd = json.loads(described.read_bytes())["compressor"] is not None
        chunks = [path for path in sorted(described.parent.iterdir()) if path != described]
        name = described.parent.name.replace(".", "/")
        found[name] = [Range(path, 0, path.stat().st_size, zstd) for path in chunks]
    return found


def _ocdbt(params: Path) -> Tensors:
    """From the index of an OCDBT store, as TensorStore dumps it."""
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "file", "path": f"{params}/"}).result()
    pending = [(ts.ocdbt.dump(store).result()["versions"][-1]["root"]["location"], b"")]
    found: Tensors = {}
    compressed: dict[str, bool] = {}
    while pending:
        node, prefix = pending.pop()
        for entry in ts.ocdbt.dump(store, node).result()["entries"]:
            key = (prefix + bytes(entry.get("key", b""))).decode()
            name, _, chunk = key.rpartition("/")
            if "location" in entry:
                pending.append((entry["location"], prefix + bytes(entry.get("subtree_common_prefix", b""))))
            elif chunk == ".zarray":
                compressed[name] = json.loads(bytes(entry["inline_value"]))["compressor"] is not None
            elif "indirect_value" in entry:
                _, base, file, offset, length = entry["indirect_value"].split(":")
                lies = Range(params / (base + file).replace("%2F", "/"), int(offset), int(length), False)
                found.setdefault(name, []).append(lies)
    return {
        name.replace(".", "/"): [Range(r.path, r.offset, r.length, compressed[name]) for r in ranges]
        for name, ranges in found.items()
    }
