"""The index of an OCDBT store: which bytes of which file hold each value.

TensorStore decodes the index (``ts.ocdbt.dump``); walking it here tells, before any data is
read, how many bytes each array takes and whether every file is there in full, and lets a reader
stream a chunk that TensorStore could only decode whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.formats.location import Location, tensorstore_context

RECOPY = "the copy is incomplete or damaged: copy the checkpoint again"


@dataclass(frozen=True)
class Extent:
    """Where one value lies: in the index itself (``inline``), or a range of a file."""

    length: int
    inline: bytes | None = None
    file: str = ""
    offset: int = 0


def index(location: Location) -> dict[str, Extent]:
    """Every key of the store at ``location`` and where its value lies.

    Raises:
        SourceRefused: the manifest or a node is missing or damaged, or a path in the index
            leads out of the checkpoint.
    """
    import tensorstore as ts

    try:
        store = ts.KvStore.open(location.kvstore(), context=tensorstore_context()).result()
        manifest = ts.ocdbt.dump(store).result()
        versions = manifest.get("versions") or []
        if not versions:
            # very long histories move the newest version out of the manifest; Orbax writes one
            raise ValueError("the manifest names no version")
        found: dict[str, Extent] = {}
        walked = set()
        pending = [(versions[-1]["root"].get("location"), b"")]
        while pending:
            node, prefix = pending.pop()
            if node is None:  # an empty store
                continue
            if node in walked:
                raise ValueError(f"its node {node} lies below itself or in two places")
            walked.add(node)
            for entry in ts.ocdbt.dump(store, node).result()["entries"]:
                key = prefix + _bytes(entry.get("key", b""))
                if "inline_value" in entry:
                    value = _bytes(entry["inline_value"])
                    found[key.decode()] = Extent(len(value), inline=value)
                elif "indirect_value" in entry:
                    found[key.decode()] = _extent(str(entry["indirect_value"]))
                else:
                    stem = prefix + _bytes(entry.get("subtree_common_prefix", b""))
                    pending.append((entry["location"], stem))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SourceRefused(
            Problem(f"{location}/manifest.ocdbt: the index cannot be read: {_short(error)}", RECOPY)
        ) from error
    return found


def check_files(location: Location, extents: Mapping[str, Extent]) -> None:
    """Refuse when a file that the index points to is missing or shorter than the index says."""
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
            problems.append(Problem(f"{path}: the file is missing, and the index points to it", RECOPY))
        elif (size := path.stat().st_size) < end:
            problems.append(
                Problem(f"{path}: the file has {size} bytes, and the index points to {end}", RECOPY)
            )
    refuse_if(problems, SourceRefused)


def whole_file(root: Path, file: str) -> Extent:
    """A value that is a file of its own, as where a store is a plain directory."""
    return Extent((root / file).stat().st_size, file=file)


def contained(root: Path, file: str) -> Path:
    """``root / file``, refused when it is not below ``root``."""
    if file.startswith("/") or ".." in file.split("/"):
        raise SourceRefused(
            Problem(
                f"{root}: the index points to {file!r}, outside the checkpoint",
                "do not trust this checkpoint",
            )
        )
    return root / file


def _extent(text: str) -> Extent:
    """From ``value:<base>:<file>:<offset>:<length>``; the base is a directory, percent-encoded."""
    from urllib.parse import unquote

    kind, base, file, offset, length = text.split(":")
    if kind != "value":
        raise ValueError(f"unknown reference {text!r}")
    return Extent(int(length), file=unquote(base) + unquote(file), offset=int(offset))


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _short(error: Exception) -> str:
    return str(error).split(" [source locations")[0].splitlines()[0][:300]
