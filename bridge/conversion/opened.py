"""The first stage of a plan: its source and base, opened and checked, and the route to the format asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bridge.checkpoint.adapter_base import Based, base_of
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.identity import identity_problems
from bridge.checkpoint.inputs import Inputs, shape_problems
from bridge.checkpoint.leave_out import unmatched
from bridge.checkpoint.open import adapter_of, open_checkpoint
from bridge.checkpoint.opening import Opening, opening_of
from bridge.checkpoint.options import alphas_of
from bridge.compare.base import misfits
from bridge.conversion.converters import Edge, converters
from bridge.conversion.options import Options
from bridge.conversion.resizing import resized
from bridge.conversion.settings import option_problems
from bridge.errors import CheckpointRefused, Problem, RouteRefused
from bridge.formats.disk.location import Location
from bridge.graph import Form, State, route
from bridge.publish.preflight import check_apart, check_destination


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a conversion reads from, and its route."""

    inputs: Inputs
    reference: Checkpoint | None
    """The base: that of an adapter, or weights to compare the source with."""
    route: tuple[Edge, ...]
    options: Options
    """As given; with the base of an adapter, where its own files named it."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def target(self) -> State:
        return self.route[-1].target


def open_inputs(src: str | Path, to: str, options: Options, destination: Path | None) -> Opened:
    """Open the source and its base, and find a route.

    Problems are collected. Raises Refusal where there is nothing to go on with: a checkpoint that cannot be
    opened, no route, a base of another kind.
    """
    opening = opening_of(options, alphas_of(options), options["rslora"])
    checkpoint = open_checkpoint(src, options["from_"], opening)
    problems: list[Problem] = []
    if destination is not None:
        problems += check_destination(
            destination,
            checkpoint.source.root.local,
            Location.parse(src).local,
            overwrite=options["overwrite"],
        )
    based = base_of(checkpoint, options["base"])
    way = _route(checkpoint, to, options["fold"], based, [*checkpoint.problems, *problems])
    target = way[-1].target
    if based.origin and not _is_needed(way, checkpoint, options):
        based = Based()
    if based.origin:
        options = {**options, "base": str(based.path)}
    reference = None if not based.here else _reference(based, opening, checkpoint, target)
    if reference is not None and checkpoint.state.form is Form.ADAPTER:
        checkpoint = adapter_of(reference, checkpoint)
    checkpoints = (checkpoint,) if reference is None else (checkpoint, reference)
    problems = [*checkpoint.problems, *problems]
    problems += unmatched(opening, (each.left_out for each in checkpoints))
    if reference is None and _is_open(checkpoint):
        problems.append(
            Problem(
                f"{checkpoint.source.location} is an adapter of {checkpoint.model_name}: neither its names nor the "
                "files beside it tell which",
                "add --base PATH, which does",
            )
        )
    if reference is not None:
        problems += reference.problems
        if destination is not None and based.path is not None:
            given = Location.parse(based.path).local
            problems += check_apart(destination, reference.source.root.local, given)
    inputs = Inputs(checkpoint, reference if checkpoint.state.form is Form.ADAPTER else None)
    problems += option_problems(options, inputs.weights.family, checkpoint.state, target)
    inputs = resized(inputs, options)
    notes = [f"its base is {based.description}"] if based.origin else []
    if reference is not None and not problems:
        trouble, far = _fit(inputs, reference, options)
        problems += trouble
        notes += far
    return Opened(
        inputs=inputs,
        reference=reference,
        route=way,
        options=options,
        problems=tuple(problems),
        notes=(*notes, *checkpoint.source.notes, *_base_notes(inputs)),
    )


def _route(
    checkpoint: Checkpoint, to: str, fold: bool, based: Based, problems: list[Problem]
) -> tuple[Edge, ...]:
    """The way to the format asked for. Raises with what is wrong with the source, where there is none."""
    contents = (
        "base"
        if fold and any(e.target.name == to and e.target.form is Form.PYTREE for e in converters())
        else None
    )
    try:
        return route(converters(), checkpoint.state, to, {"base"} if based.here else (), contents)
    except RouteRefused as refused:
        problems = [*problems, *refused.problems]
        if based.named and based.missing is not None and _needs_base(to):
            problems[-1] = based.missing
        # a checkpoint that lost its factors has no route: what it lost must be said as well
        kind = CheckpointRefused if checkpoint.problems else RouteRefused
        raise kind(*problems) from None


def _needs_base(to: str) -> bool:
    return any("base" in edge.needs and edge.target.name == to for edge in converters())


def _is_needed(way: tuple[Edge, ...], checkpoint: Checkpoint, options: Options) -> bool:
    """Whether a base that was not asked for is of use."""
    return any("base" in edge.needs for edge in way) or options["with_base"] or _is_open(checkpoint)


def _is_open(checkpoint: Checkpoint) -> bool:
    """Whether it may be of several models."""
    return checkpoint.model_name != checkpoint.model.name


def _reference(based: Based, opening: Opening, checkpoint: Checkpoint, target: State) -> Checkpoint:
    """The base of an adapter, or the reference that weights are compared with. Raises Refusal."""
    reference = based.open(opening)
    where = reference.source.location
    if reference.has_lora and target.form is not Form.ADAPTER:
        raise CheckpointRefused(
            Problem(
                f"{where} has LoRA factors of its own", "make its base first: bridge convert --to torch-base"
            )
        )
    if checkpoint.state.form is not Form.ADAPTER and reference.model.name != checkpoint.model.name:
        raise CheckpointRefused(
            Problem(
                f"{checkpoint.source.location} is {checkpoint.model.name} but {where} is {reference.model.name}",
                "give a base of the same model",
            )
        )
    return reference


def _fit(inputs: Inputs, reference: Checkpoint, options: Options) -> tuple[list[Problem], list[str]]:
    """Why a base does not fit the source; a note instead where another than its own is allowed."""
    if inputs.base is None:
        return misfits(inputs.source, reference), []
    if trouble := shape_problems(inputs):
        return trouble, []
    return identity_problems(inputs, allowed=options["base_differs"])


def _base_notes(inputs: Inputs) -> list[str]:
    """What was chosen when the base was opened, where it is no part of the source itself."""
    if inputs.base is None:
        return []
    return [f"base: {note}" for note in inputs.base.source.notes if note not in inputs.source.source.notes]
