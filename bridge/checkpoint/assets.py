"""The files that travel beside the weights: whatever the family says belongs to a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bridge.errors import Problem, SourceRefused
from bridge.formats.disk.location import Location, is_safe_path
from bridge.formats.disk.stamps import Stamp, take_stamps
from bridge.rules.family import Family

MAX_BYTES = 64 << 20
#: of a trained model there are a few
MAX_FILES = 200_000


@dataclass(frozen=True)
class Assets:
    """Files by their path beside the weights, and notes about them."""

    files: Mapping[str, bytes]
    paths: tuple[str, ...] = ()
    """Of all files, those that were not read among them, below their directory."""
    notes: tuple[str, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """The files as they were before they were read."""


def read_assets(root: Location, family: Family, wanted: Callable[[str], bool] | None = None) -> Assets:
    """Read the files that a family's models have beside their weights.

    Args:
        root: of the checkpoint.
        family: whose assets they are.
        wanted: which of them to read, by path beside the weights; all by default.

    Raises:
        SourceRefused: one cannot be read, leads out of the checkpoint by its name or a link, or they are too large.
    """
    if family.assets is None:
        return Assets({})
    name = family.assets.directory
    directory = root / name
    files: dict[str, bytes] = {}
    notes: list[str] = []
    left = MAX_BYTES
    listed = directory.files()
    if len(listed) > MAX_FILES:
        raise SourceRefused(
            Problem(
                f"{directory} contains {len(listed)} files, more than {MAX_FILES}",
                f"move what does not belong to the {family.noun} elsewhere",
            )
        )
    paths = [path for path in listed if wanted is None or wanted(f"{name}/{path}")]
    stamps = take_stamps(directory.local / path for path in paths) if directory.local is not None else {}
    for path in paths:
        # in a bucket, a name may be anything; here it becomes a path
        if not is_safe_path(path):
            raise SourceRefused(
                Problem(f"{directory} contains an unsafe path: {path!r}", "do not trust this checkpoint")
            )
        file = directory / path
        data = file.read_bytes(MAX_BYTES)
        if data is None:
            raise SourceRefused(Problem(f"{file} was removed while bridge was reading", "run again"))
        left -= len(data)
        if left < 0:
            raise SourceRefused(
                Problem(
                    f"{directory} contains more than {MAX_BYTES >> 20} MB",
                    f"move what does not belong to the {family.noun} elsewhere",
                )
            )
        files[f"{name}/{path}"] = data
    if family.assets.notes is not None:
        notes += family.assets.notes(str(directory), files)
    return Assets(files, tuple(listed), tuple(notes), stamps)
