"""Reading the facts of one directory: its small files and its record, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from bridge.errors import Problem, SourceRefused, reason
from bridge.formats.disk.lfs import is_pointer, pointer_problem
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import Stamp, take_stamps
from bridge.publish.record import RECORD, read_record
from bridge.rules.fact import Damage, Fact, FactTable, Reading
from bridge.rules.model import Model
from bridge.strict_json import shown

#: bytes of a small file
MAX_BYTES = 16 << 20
#: small files in one directory
MAX_FILES = 100


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one directory states."""

    root: Location
    own: Reading
    """By the files that other programs read."""
    recorded: Reading
    """By ``bridge.json``."""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)


def read_place(
    root: Location, table: FactTable, model: Model, assets: Mapping[str, bytes], given: Reading
) -> Place:
    """Read what a directory states.

    Args:
        root: of a checkpoint.
        table: of its family.
        model: of the checkpoint, or of the base that it applies to.
        assets: files that always travel with the weights, by path.
        given: by the user's options.

    Raises:
        SourceRefused: a file cannot be read, is too large, or is a git-lfs pointer.
    """
    files, stamps = _small_files(root, table)
    for path, data in (*files.items(), *assets.items()):
        if is_pointer(data):
            raise SourceRefused(pointer_problem(root / path))
    recorded = _recorded(root, table)
    chosen = {fact.kind.key: fact.value for fact in given.facts}
    own = table.read(model, {**assets, **files}, chosen)
    return Place(root=root, own=own, recorded=recorded, stamps=stamps)


def _small_files(root: Location, table: FactTable) -> tuple[dict[str, bytes], Mapping[str, Stamp]]:
    if root.local is None:
        # listing a bucket costs a request for each thousand chunks: only files of a known name
        names = [pattern for pattern in table.files if "*" not in pattern and "/" not in pattern]
    else:
        names = [name for name in root.names() if any(fnmatchcase(name, each) for each in table.files)]
    if len(names) > MAX_FILES:
        cause = f"{root} contains {len(names)} files like {names[0]}, more than {MAX_FILES}"
        raise SourceRefused(Problem(cause, "move what does not belong to the checkpoint elsewhere"))
    stamps = take_stamps(root.local / name for name in names) if root.local is not None else {}
    read = {name: (root / name).read_bytes(MAX_BYTES) for name in names}
    return {name: data for name, data in read.items() if data is not None}, stamps


def _recorded(root: Location, table: FactTable) -> Reading:
    """What ``bridge.json`` says of facts, if it does."""
    entries = read_record(root).get("facts")
    facts: list[Fact] = []
    damaged: list[Damage] = []
    for kind in table.kinds:
        entry = entries.get(kind.key) if isinstance(entries, dict) else None
        if entry is None:
            continue
        try:
            value = kind.decode(entry["value"])
        except (ValueError, TypeError, KeyError) as error:
            cause = f"{root / RECORD}: its {kind.title} is damaged: {shown(reason(error))[1:-1]}"
            damaged.append(Damage(kind, Problem(cause, "restore the file from a copy, or convert again")))
            continue
        facts.append(Fact(kind, value, RECORD, assumed=entry.get("assumed") is True))
    return Reading(facts=tuple(facts), damaged=tuple(damaged))
