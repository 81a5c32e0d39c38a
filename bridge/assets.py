"""The files that belong to a policy and are not weights: ``assets/<asset_id>/norm_stats.json``.

Without its normalisation statistics a policy moves the robot wrongly and nothing says so;
they always travel (openpi, training/checkpoints.py, ``load_norm_stats``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bridge.errors import Problem, SourceRefused
from bridge.formats.location import Location
from bridge.formats.stamps import Stamp, take

DIRECTORY = "assets"
NORM_STATS = "norm_stats.json"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Assets:
    """Files by their path beside the weights, and what to say of them."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """The files as they were before they were read."""


def read_assets(root: Location) -> Assets:
    """Read the assets beside a checkpoint's weights."""
    directory = root / DIRECTORY
    files: dict[str, bytes] = {}
    paths = directory.files()
    stamps = take(directory.local / path for path in paths) if directory.local is not None else {}
    for path in paths:
        data = (directory / path).read_bytes()
        if data is not None:
            files[f"{DIRECTORY}/{path}"] = data
        if sum(map(len, files.values())) > MAX_BYTES:
            raise SourceRefused(
                Problem(
                    f"{directory} holds more than {MAX_BYTES >> 20} MB",
                    "norm stats are small: move what does not belong to the policy elsewhere",
                )
            )
    if not any(path.endswith(f"/{NORM_STATS}") for path in files):
        return Assets(
            files,
            (
                f"no {NORM_STATS} under {directory}: the policy needs its own to run, copy them beside the output",
            ),
            stamps,
        )
    return Assets(files, stamps=stamps)
