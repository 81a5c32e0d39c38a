"""The facts of a checkpoint, or of an adapter on its base, from the files beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bridge.checkpoint.assets import Assets, read_assets
from bridge.checkpoint.inputs import Inputs
from bridge.errors import Problem, Refusal
from bridge.facts.read import MAX_BYTES, read_place
from bridge.facts.resolve import Known, resolve
from bridge.formats.disk.location import Location
from bridge.formats.safetensors.torch import file_bytes
from bridge.rules.fact import IN_WEIGHTS, FactTable, Reading
from bridge.rules.option import File


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights: the files that travel with them, and the facts."""

    assets: Assets
    known: Known


def read_beside(
    inputs: Inputs, settings: Mapping[str, Any] | None = None, *, facts_only: bool = False
) -> Beside:
    """Read what lies beside the weights.

    Args:
        inputs: a checkpoint, or an adapter with its base.
        settings: the family's options, by keyword.
        facts_only: read only those of the assets that state facts.

    Raises:
        SourceRefused: a file cannot be read.
    """
    family, table = inputs.weights.family, inputs.weights.family.facts
    given = table.given(inputs.model, _contents(settings, inputs)) if table and settings else Reading()
    places, carried = [], Assets({})
    for checkpoint in inputs.checkpoints.values():
        root = checkpoint.source.root
        assets = read_assets(root, family, _stating(table) if facts_only else None)
        # an adapter's own come first
        carried = carried if carried.files else assets
        if table is not None:
            inside = checkpoint.facts_inside()
            stating = {**assets.files, **({IN_WEIGHTS: file_bytes(inside)} if inside else {})}
            places.append(read_place(root, table, inputs.model, stating, given))
    if table is None:
        return Beside(carried, Known())
    return Beside(carried, resolve(table, inputs.model, inputs.weights.sizes, given, places))


def _stating(table: FactTable | None) -> Callable[[str], bool]:
    patterns = table.files if table is not None else ()
    return lambda path: any(fnmatchcase(path, pattern) for pattern in patterns)


def _contents(settings: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Options, with the bytes of those that are files."""
    declared = inputs.weights.family.options
    return {
        keyword: _bytes(value) if value is not None and isinstance(declared[keyword].kind, File) else value
        for keyword, value in settings.items()
    }


def _bytes(path: str | Path) -> bytes:
    data = Location.parse(path).read_bytes(MAX_BYTES)
    if data is None:
        raise Refusal(Problem(f"{path} does not exist", "check the path"))
    return data
