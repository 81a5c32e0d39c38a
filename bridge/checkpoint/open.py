"""From a path to a checkpoint: which format it is, and which model it contains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.directories import find
from bridge.checkpoint.items import item_of, training_state
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.checkpoint.leaves import understand_tree
from bridge.checkpoint.opening import BARE, Opening
from bridge.checkpoint.peft_set import understand_adapter
from bridge.checkpoint.state_dict import understand_peft, understand_state_dict
from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.formats.contract import Format, Source, format_named, formats, states
from bridge.formats.disk.links import link_problems
from bridge.formats.disk.location import Location
from bridge.formats.safetensors.header import pickle_problem
from bridge.formats.safetensors.torch import pickles
from bridge.formats.view import View
from bridge.graph import Form

_UNDERSTAND: Mapping[Form, Callable[[Source, Opening], Checkpoint]] = {
    Form.PYTREE: understand_tree,
    Form.STATE_DICT: understand_state_dict,
    Form.ADAPTER: understand_peft,
}


def open_source(path: str | Path | Location, format: str | None = None, opening: Opening = BARE) -> Source:
    """Open whatever lies at a path; formats recognize themselves unless one is named.

    Args:
        path: of a checkpoint, or of a directory that one is found in: a run, a step, a hub's cache.
        format: its format, or a state of it.
        opening: of it, the item is used: a directory below the path, or a part of a training state.

    Raises:
        SourceRefused: nothing is there, no format claims it, or several do.
    """
    location, notes = find(
        Location.parse(path).waiting(opening.timeout),
        lambda place: any(known.claims(place) for known in formats()),
    )
    inner, below, chosen = item_of(location, opening.item)
    source = _open(inner, format)
    if notes := (*notes, *chosen):
        source = View.of(source, {name: name for name in source.specs}, *notes)
    return training_state(source, below)


def _open(location: Location, format: str | None) -> Source:
    known = {known.name: known for known in formats()}
    if format is not None:
        name = next((state.format for state in states() if state.name == format), format)
        if name not in known:
            raise SourceRefused(
                Problem(f"no format is named {format}", f"use one of {', '.join(sorted(known))}")
            )
        return _opened(known[name], location)
    if not location.exists():
        fix = (
            "check the path"
            if location.local is not None
            else "check the spelling of the bucket and the path"
        )
        raise SourceRefused(Problem(f"{location} does not exist", fix))
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
    return _opened(claiming[0], location)


def _opened(format: Format, location: Location) -> Source:
    source = format.open(location)
    # the formats that ship look at links before they read; those of others are held to the same
    files = set(source.stamps) - {str(location)}
    homes = {place.home or str(place) for place in (source.root, source.location, location)}
    for home in sorted(homes, key=len, reverse=True):
        inside = {file for file in files if file.startswith(f"{home}/")}
        refuse_if(link_problems(inside, home), SourceRefused)
        files -= inside
    return source


def understand(source: Source, opening: Opening = BARE) -> Checkpoint:
    """Work out which model a source contains.

    Raises:
        CheckpointRefused: no family's model fits even half of its names.
    """
    return _UNDERSTAND[format_named(source.format).form](source, opening)


def open_checkpoint(
    path: str | Path | Location, format: str | None = None, opening: Opening = BARE
) -> Checkpoint:
    """Open a path and work out which model it contains. Raises Refusal."""
    return understand(open_source(path, format, opening), opening)


def adapter_of(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """An adapter as one of its base's model, with all that the base's layers show to be missing."""
    if not isinstance(adapter, AdapterCheckpoint) or base is adapter.own_base:
        return adapter
    understood = understand_adapter(adapter.source, base)
    # of the alphas that no file has, only the user's words tell
    problems = (*(adapter.problems if adapter.alphas_given else ()), *understood.problems)
    return replace(
        understood,
        problems=tuple(dict.fromkeys(problems)),
        left_out=adapter.left_out,
        own_base=adapter.own_base,
        alphas_given=adapter.alphas_given,
    )
