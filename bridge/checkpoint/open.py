"""From a path to a checkpoint: which format it is, and which model it contains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.leaves import understand_tree
from bridge.checkpoint.peft_set import understand_adapter
from bridge.checkpoint.weights import understand_weights
from bridge.errors import Problem, SourceRefused
from bridge.formats.contract import Source, format_named, formats, states
from bridge.formats.disk.location import Location
from bridge.formats.safetensors.header import pickle_problem
from bridge.formats.safetensors.torch import pickles
from bridge.graph import Form

_UNDERSTAND: Mapping[Form, Callable[[Source], Checkpoint]] = {
    Form.PYTREE: understand_tree,
    Form.STATE_DICT: understand_weights,
    Form.ADAPTER: understand_adapter,
}


def open_source(path: str | Path | Location, format: str | None = None) -> Source:
    """Open whatever lies at a path; formats recognize themselves unless one is named.

    Raises:
        SourceRefused: nothing is there, no format claims it, or several do.
    """
    location = Location.parse(path)
    known = {known.name: known for known in formats()}
    if format is not None:
        name = next((state.format for state in states() if state.name == format), format)
        if name not in known:
            raise SourceRefused(
                Problem(f"no format is named {format}", f"use one of {', '.join(sorted(known))}")
            )
        return known[name].open(location)
    if not location.exists():
        raise SourceRefused(Problem(f"{location} does not exist", "check the path"))
    claiming = [format for format in known.values() if format.claims(location)]
    if len(claiming) > 1:
        names = ", ".join(format.name for format in claiming)
        raise SourceRefused(
            Problem(
                f"{location} matches more than one format: {names}",
                f"choose one with --from, such as --from {claiming[0].states[0].name}",
            )
        )
    if not claiming:
        if pickled := pickles(location):
            raise SourceRefused(
                pickle_problem(str(location if pickled[0] == location.name else location / pickled[0]))
            )
        inside = ", ".join(location.names()[:6])
        what = "a file" if location.is_file() else f"contains {inside}" if inside else "empty directory"
        raise SourceRefused(
            Problem(
                f"{location} is not a checkpoint bridge recognizes ({what})",
                "give a step directory, its params/, or a directory with model.safetensors",
            )
        )
    return claiming[0].open(location)


def understand(source: Source) -> Checkpoint:
    """Work out which model a source contains.

    Raises:
        CheckpointRefused: no family's model fits even half of its names.
    """
    return _UNDERSTAND[format_named(source.format).form](source)


def open_checkpoint(path: str | Path | Location, format: str | None = None) -> Checkpoint:
    """Open a path and work out which model it contains. Raises Refusal."""
    return understand(open_source(path, format))


def adapter_of(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """An adapter as one of its base's model, where several models have the paths of its modules."""
    known = adapter.model.name == base.model.name
    return adapter if known else understand_adapter(adapter.source, base.model.name)
