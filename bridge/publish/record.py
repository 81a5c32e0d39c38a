"""``bridge.json``, the record in every output: the conversion, and the checksum of everything written.

Composed by :mod:`bridge.conversion.provenance`; read and checked here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bridge.arrays import raw
from bridge.errors import Problem, SourceRefused
from bridge.formats.contract import Source
from bridge.formats.disk.location import Location, is_safe_path
from bridge.strict_json import parse_object, shown

RECORD = "bridge.json"
#: bytes; it takes 15 MB for 100,000 tensors
MAX_RECORD = 64 << 20
#: bytes of a file beside the weights
MAX_FILE = 128 << 20
CHANGED = "checksum mismatch: changed since bridge wrote it"
RESTORE = "if this was not intended, restore it from a copy, or convert again"


def combined(sums: Mapping[str, str]) -> str:
    """One checksum of many: xxh3-128 over ``name checksum`` lines in order of name."""
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    return xxhash.xxh3_128(lines.encode()).hexdigest()


def self_checksum(record: Mapping[str, Any]) -> str:
    """The checksum of a record without its own entry, ``record``."""
    rest = {key: value for key, value in record.items() if key != "record"}
    return xxhash.xxh3_128(json.dumps(rest, indent=2).encode()).hexdigest()


def files_in(directory: Path) -> set[str]:
    """Relative paths of the files in an output, without its record and the outputs nested in it."""
    paths = set()
    for root, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not Path(root, name, RECORD).is_file()]
        links = [name for name in directories if Path(root, name).is_symlink()]
        paths |= {os.path.relpath(Path(root, name), directory) for name in (*files, *links)}
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


def check_whole(root: Location) -> list[Problem]:
    """Check that a directory contains exactly the files in its record."""
    if root.local is None or not (root / RECORD).is_file():
        return []
    record = read_record(root)
    if record.get("record") != self_checksum(record) or not _well_formed(record):
        return [Problem(f"{root / RECORD}: {CHANGED}", RESTORE)]
    expected = {*record["files"], *record["container"]}
    present = files_in(root.local)
    problems = [Problem(f"{root / name} is missing", RESTORE) for name in sorted(expected - present)]
    problems += [
        Problem(f"{root / name} is not listed in {RECORD}", "move it elsewhere")
        for name in sorted(present - expected)
    ]
    for where in record["outputs"]:
        if not (root / where / RECORD).is_file():
            problems.append(Problem(f"{root / where / RECORD} is missing", RESTORE))
    return problems
