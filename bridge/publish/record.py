"""``bridge.json``, the record in every output: the conversion, and the checksum of everything written.

Composed by :mod:`bridge.conversion.provenance`; read and checked here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bridge.arrays import raw
from bridge.errors import Problem, SourceRefused
from bridge.formats.contract import Source
from bridge.formats.disk.location import Location, is_safe_path
from bridge.rules.names import grouped
from bridge.strict_json import parse_object, shown

RECORD = "bridge.json"
#: bytes; it takes 15 MB for 100,000 tensors
MAX_RECORD = 64 << 20
#: bytes of a file beside the weights
MAX_FILE = 128 << 20
CHANGED = "checksum mismatch: changed since bridge wrote it"
RESTORE = "if this was not intended, restore it from a copy, or convert again"
AS_IT_IS = f"{RESTORE}; if it was, add --no-check"


def combined(sums: Mapping[str, str]) -> str:
    """One checksum of many: xxh3-128 over ``name checksum`` lines in order of name."""
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    return xxhash.xxh3_128(lines.encode()).hexdigest()


def self_checksum(record: Mapping[str, Any]) -> str:
    """The checksum of a record without its own entry, ``record``."""
    rest = {key: value for key, value in record.items() if key != "record"}
    return xxhash.xxh3_128(json.dumps(rest, indent=2).encode()).hexdigest()


def files_in(directory: Path, nested: Collection[str] = ()) -> set[str]:
    """Relative paths of the files in an output, without its record and the outputs ``nested`` in it.

    A link to a directory counts as a file.

    Raises:
        OSError: a directory cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    paths = set()
    for root, directories, files in os.walk(directory, onerror=fail):
        inside = {name: os.path.relpath(Path(root, name), directory) for name in (*files, *directories)}
        directories[:] = [name for name in directories if inside[name] not in nested]
        links = [name for name in directories if Path(root, name).is_symlink()]
        paths |= {inside[name] for name in (*files, *links)}
    return paths - {RECORD}


def read_record(root: Location) -> dict[str, Any]:
    """The record in a directory; empty if there is none, or it cannot be parsed."""
    try:
        return parse_object((root / RECORD).read_bytes(MAX_RECORD) or b"{}")
    except ValueError:
        return {}


def check_record(
    source: Source, known: Mapping[str, str] | None = None
) -> tuple[dict[str, bool], list[Problem]]:
    """Check every checksum in a ``bridge.json``: each tensor, and the files beside them.

    Args:
        source: the checkpoint in the directory of the record.
        known: checksums of arrays that have been read already; all others are read here.
    """
    record = read_record(source.root)
    tensors, files = record.get("tensors"), record.get("files")
    if not isinstance(tensors, dict) or not isinstance(files, dict):
        return {}, []
    problems: list[Problem] = []
    for name, entry in tensors.items():
        if name not in source.specs:
            problems.append(Problem(f"{source.root}: {RECORD} lists {name}, which is missing", RESTORE))
            continue
        recorded = entry.get("checksum") if isinstance(entry, dict) else None
        read = (known or {}).get(name) if recorded != "zeros" else None
        try:
            same = read == recorded if read is not None else _matches(source, name, recorded)
        except SourceRefused as refused:
            problems += refused.problems
            continue
        if not same:
            problems.append(Problem(f"{source.root}: {name}: {CHANGED}", RESTORE))
    problems += [
        Problem(f"{source.root}: {name} is not listed in {RECORD}", "convert again")
        for name in sorted(set(source.specs) - set(tensors))
    ]
    for name, checksum in files.items():
        if not is_safe_path(name):
            problems.append(
                Problem(
                    f"{source.root / RECORD} lists an unsafe path: {shown(name)}",
                    "do not trust this checkpoint",
                )
            )
            continue
        data = (source.root / name).read_bytes(MAX_FILE)
        if data is None:
            problems.append(Problem(f"{source.root / name} is missing", RESTORE))
        elif xxhash.xxh3_128(data).hexdigest() != checksum:
            problems.append(Problem(f"{source.root / name}: {CHANGED}", RESTORE))
    return {str(source.root / RECORD): not problems}, problems


def stale_files(source: Source, files: Mapping[str, bytes]) -> tuple[list[Problem], list[str]]:
    """What has changed beside the weights since bridge wrote them, where it did.

    Args:
        source: the checkpoint.
        files: that travel with it, by path, and their contents.

    Returns:
        Problems: the record, or a file that travels. Notes: a config, which is edited by hand at times.
    """
    record = read_record(source.root)
    if "record" not in record:
        return [], []
    if own_record(source.root) is None:
        return [Problem(f"{source.root / RECORD}: {CHANGED}", AS_IT_IS)], []
    problems = [
        Problem(f"{source.root / name}: {CHANGED}", AS_IT_IS)
        for name, data in files.items()
        if record["files"].get(name, checksum := xxhash.xxh3_128(data).hexdigest()) != checksum
    ]
    notes = [
        f"{name} has changed since bridge wrote it"
        for name in sorted(record["files"].keys() & source.metadata.keys())
        if xxhash.xxh3_128((source.root / name).read_bytes(MAX_FILE) or b"").hexdigest()
        != record["files"][name]
    ]
    return problems, notes


def stale_arrays(source: Source, read: Mapping[str, str]) -> list[Problem]:
    """Arrays that are not what bridge wrote, by the record beside them.

    Args:
        source: the checkpoint.
        read: checksums of arrays that have been read.
    """
    record = read_record(source.root)
    tensors = record.get("tensors") if "record" in record else None
    if not isinstance(tensors, dict):
        return []
    changed = []
    for name, checksum in read.items():
        entry = tensors.get(name)
        recorded = entry.get("checksum") if isinstance(entry, dict) else None
        if recorded == "zeros":
            recorded = _zeros(source.specs[name].nbytes)
        if recorded not in (None, checksum):
            changed.append(name)
    return [Problem(f"{source.root}: {name}: {CHANGED}", AS_IT_IS) for name in grouped(sorted(changed))]


def _zeros(nbytes: int) -> str:
    """The checksum of so many zeros."""
    digest, block = xxhash.xxh3_128(), bytes(min(nbytes, 1 << 20))
    for start in range(0, nbytes, 1 << 20):
        digest.update(block[: nbytes - start])
    return digest.hexdigest()


def _matches(source: Source, name: str, recorded: object) -> bool:
    """Whether a tensor has the recorded checksum, or is all zeros if ``zeros`` is recorded."""
    digest = xxhash.xxh3_128()
    zeros = True
    for _, values in source.slabs(name):
        data = raw(values)
        if recorded == "zeros":
            zeros = zeros and not np.frombuffer(data, np.uint8).any()
        else:
            digest.update(data)
    return zeros if recorded == "zeros" else digest.hexdigest() == recorded


def _well_formed(record: Mapping[str, Any]) -> bool:
    """Whether the lists in a record contain safe paths only: its checksum is no proof against forgery."""
    files, container, outputs = (record.get(key) for key in ("files", "container", "outputs"))
    return (
        isinstance(files, dict)
        and isinstance(container, list)
        and isinstance(outputs, list)
        and all(isinstance(name, str) and is_safe_path(name) for name in (*files, *container, *outputs))
    )


def own_record(root: Location) -> dict[str, Any] | None:
    """The record in a directory, as bridge wrote it; None if there is none, or it has been changed."""
    record = read_record(root)
    return record if record.get("record") == self_checksum(record) and _well_formed(record) else None


def check_whole(root: Location) -> list[Problem]:
    """Check that a directory contains exactly the files in its record."""
    if root.local is None or not (root / RECORD).is_file():
        return []
    record = own_record(root)
    if record is None:
        return [Problem(f"{root / RECORD}: {CHANGED}", RESTORE)]
    expected = {*record["files"], *record["container"]}
    present = files_in(root.local, record["outputs"])
    problems = [Problem(f"{root / name} is missing", RESTORE) for name in sorted(expected - present)]
    problems += [
        Problem(f"{root / name} is not listed in {RECORD}", "move it elsewhere")
        for name in sorted(present - expected)
    ]
    for where in record["outputs"]:
        if not (root / where / RECORD).is_file():
            problems.append(Problem(f"{root / where / RECORD} is missing", RESTORE))
    return problems
