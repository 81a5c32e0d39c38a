"""The files that belong to a policy and are not weights: ``assets/<asset_id>/norm_stats.json``.

Without its normalisation statistics a policy moves the robot wrongly and nothing says so;
they always travel (openpi, training/checkpoints.py, ``load_norm_stats``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge.errors import Problem, SourceRefused, printable
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import Stamp, take

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
    notes: list[str] = []
    left = MAX_BYTES
    paths = directory.files()
    stamps = take(directory.local / path for path in paths) if directory.local is not None else {}
    for path in paths:
        # in a bucket, a name may be anything; here it becomes a path
        if path.startswith("/") or {"", ".", ".."} & set(path.split("/")) or "\0" in path:
            raise SourceRefused(
                Problem(f"{directory} holds a file named {path!r}", "do not trust this checkpoint")
            )
        file = directory / path
        data = file.read_bytes(MAX_BYTES)
        if data is None:
            raise SourceRefused(Problem(f"{file} was there, and is not", "run again"))
        left -= len(data)
        if left < 0:
            raise SourceRefused(
                Problem(
                    f"{directory} holds more than {MAX_BYTES >> 20} MB",
                    "norm stats are small: move what does not belong to the policy elsewhere",
                )
            )
        files[f"{DIRECTORY}/{path}"] = data
        notes += _link_notes(root, file)
    if not any(path.endswith(f"/{NORM_STATS}") for path in files):
        notes.append(
            f"no {NORM_STATS} under {directory}: the policy needs its own to run, copy them beside the output"
        )
    return Assets(files, tuple(notes), stamps)


def _link_notes(root: Location, file: Location) -> list[str]:
    """What to say of a file that is a link out of the checkpoint: its content will be published.

    The Hugging Face cache is made of such links, into the ``blobs`` beside its snapshots.
    """
    if root.local is None:
        return []
    real, home = os.path.realpath(str(file)), os.path.realpath(str(root))
    cache = Path(home).parents[1] / "blobs" if len(Path(home).parents) > 1 else None
    if Path(home) in Path(real).parents or Path(real).parent == cache:
        return []
    return [printable(f"{file} is a link to {real}: that file's content is copied")]
