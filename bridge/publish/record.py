"""``bridge.json``: what an output was made from, how, and the checksum of everything in it.

It holds no time and no path, so that the same conversion gives the same bytes.
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
from bridge.formats.disk.location import Location
from bridge.strict_json import parse_object, shown

RECORD = "bridge.json"

#: bytes; 100,000 tensors take 15 MB
MAX_RECORD = 64 << 20
#: bytes of a file beside the weights
MAX_FILE = 128 << 20
FIX = "convert again; where it stays, report it with the bridge.json"


def combined(sums: Mapping[str, str]) -> str:
    """One checksum of many: xxh3-128 over ``name checksum`` lines in order of name."""
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    return xxhash.xxh3_128(lines.encode()).hexdigest()


def self_checksum(record: Mapping[str, Any]) -> str:
    """Checksum of a record without its own entry."""
    rest = {key: value for key, value in record.items() if key != "record"}
    return xxhash.xxh3_128(json.dumps(rest, indent=2).encode()).hexdigest()


def files_in(place: Path) -> set[str]:
    """Paths of all that is in an output and is no directory, but for its record and outputs of their own."""
    found = set()
    for root, directories, files in os.walk(place):
        directories[:] = [name for name in directories if not Path(root, name, RECORD).is_file()]
        links = [name for name in directories if Path(root, name).is_symlink()]
        found |= {os.path.relpath(Path(root, name), place) for name in (*files, *links)}
    return found - {RECORD}


def read_record(root: Location) -> dict[str, Any]:
    """The record beside an output; empty where there is none, or none that can be read."""
    try:
        return parse_object((root / RECORD).read_bytes(MAX_RECORD) or b"{}")
    except ValueError:
        return {}


def check_record(
    source: Source, known: Mapping[str, str] | None = None
) -> tuple[dict[str, bool], list[Problem]]:
    """Every checksum in a ``bridge.json``: tensors one by one, and the files beside them.

    Args:
        source: the checkpoint beside which the record lies.
        known: checksums of arrays that were read already; the others are read here.
    """
    record = read_record(source.root)
    tensors, files = record.get("tensors"), record.get("files")
    if not isinstance(tensors, dict) or not isinstance(files, dict):
        return {}, []
    problems: list[Problem] = []
    for name, described in tensors.items():
        if name not in source.specs:
            problems.append(Problem(f"{source.root}: {name} is in {RECORD}, and not in the file", FIX))
            continue
        recorded = described.get("checksum") if isinstance(described, dict) else None
        read = (known or {}).get(name) if recorded != "zeros" else None
        try:
            same = read == recorded if read is not None else _holds(source, name, recorded)
        except SourceRefused as refused:
            problems += refused.problems
            continue
        if not same:
            problems.append(
                Problem(
                    f"{source.root}: {name} is not what was written: its checksum differs",
                    "restore it, or convert again",
                )
            )
    extra = sorted(set(source.specs) - set(tensors))
    problems += [Problem(f"{source.root}: {name} is in the file, and not in {RECORD}", FIX) for name in extra]
    for name, checksum in files.items():
        if not plain(name):
            problems.append(
                Problem(
                    f"{source.root / RECORD} lists {shown(name)}, outside its directory",
                    "do not trust this checkpoint",
                )
            )
            continue
        data = (source.root / name).read_bytes(MAX_FILE)
        if data is None or xxhash.xxh3_128(data).hexdigest() != checksum:
            what = "is missing" if data is None else "is not what was written: its checksum differs"
            problems.append(Problem(f"{source.root / name} {what}", "restore it, or convert again"))
    return {str(source.root / RECORD): not problems}, problems


def _holds(source: Source, name: str, recorded: object) -> bool:
    """Whether a tensor is what a record says: of this checksum, or all zeros."""
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
    """Whether the lists in a record are of plain names: whoever writes one can give it its checksum."""
    files, container, outputs = (record.get(key) for key in ("files", "container", "outputs"))
    return (
        isinstance(files, dict)
        and isinstance(container, list)
        and isinstance(outputs, list)
        and all(isinstance(name, str) and plain(name) for name in (*files, *container, *outputs))
    )


def plain(path: str) -> bool:
    """Whether a path is relative and stays below where it starts."""
    return not {"", ".", ".."} & set(path.split("/")) and "\0" not in path


def check_whole(root: Location) -> list[Problem]:
    """Whether a directory holds what its record says, no file more and no file less."""
    if root.local is None or not (root / RECORD).is_file():
        return []
    record = read_record(root)
    if record.get("record") != self_checksum(record) or not _well_formed(record):
        return [Problem(f"{root / RECORD} is not what was written", "restore it, or convert again")]
    expected = {*record["files"], *record["container"]}
    found = files_in(root.local)
    problems = [
        Problem(f"{root / name} is missing", "restore it, or convert again")
        for name in sorted(expected - found)
    ]
    problems += [
        Problem(f"{root / name} is not of the output: {RECORD} does not list it", "move it elsewhere")
        for name in sorted(found - expected)
    ]
    for where in record["outputs"]:
        if not (root / where / RECORD).is_file():
            problems.append(Problem(f"{root / where / RECORD} is missing", "restore it, or convert again"))
    return problems
