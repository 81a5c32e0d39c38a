"""The second stage of a plan: scales, ranks, layout and dtype of what is written, and the facts beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bridge.checkpoint.assets import Assets
from bridge.checkpoint.inputs import Inputs, size_problems
from bridge.checkpoint.known import Beside, read_beside
from bridge.conversion.converters import no_scales
from bridge.conversion.opened import Opened
from bridge.conversion.options import Options
from bridge.conversion.request import Request
from bridge.conversion.resizing import cut_problems, resize_notes
from bridge.conversion.settings import settings_of
from bridge.errors import CheckpointRefused, Problem, Refusal, SourceRefused, refuse_if
from bridge.formats.disk.stamps import Stamp
from bridge.graph import Form, State
from bridge.publish.record import stale_files
from bridge.stream.workers import Progress


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Everything that the outputs follow from."""

    request: Request
    beside: Beside
    edited: tuple[str, ...]
    """Notes of what has changed beside the weights."""

    @property
    def files_stay(self) -> bool:
        """Whether the source's own files belong to the layout that is written."""
        request = self.request
        return request.target.form is not Form.PYTREE and self.beside.known.layout == request.layout.name

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """Every local file that a plan depends on, as it was when it was opened."""
        stamps = {**self.beside.assets.stamps, **self.beside.known.stamps}
        for source in self.request.inputs.sources.values():
            stamps.update(source.stamps)
        if self.request.reference is not None:
            stamps.update(self.request.reference.source.stamps)
        return stamps

    @property
    def notes(self) -> list[str]:
        """What a user must know of how the inputs are read."""
        inputs = self.request.inputs
        return [
            *self.edited,
            *(note for each in inputs.checkpoints.values() for note in each.reports()),
            *resize_notes(inputs, self.request.options, self.beside.assets),
        ]


def decide(opened: Opened, destination: Path | None, progress: Progress | None) -> Decided:
    """Raises Refusal: with every problem there is until here; else with those of the files beside the weights."""
    inputs, options, target = opened.inputs, opened.options, opened.target
    scaling = next((edge.scaling for edge in opened.route if edge.scaling is not no_scales), no_scales)
    ranks, scales, trouble = scaling(inputs, options)
    problems = [*opened.problems, *trouble]
    if target.form is Form.PYTREE:
        problems += size_problems(inputs)
    name = options["layout"]
    layout = inputs.model.written[0] if name is None else inputs.model.layout(name)
    if layout is None:
        have = ", ".join(known.name for known in inputs.model.written)
        problems.append(Problem(f"{inputs.model.name} has no layout {name}", f"use one of {have}"))
    if problems or layout is None:
        raise (CheckpointRefused if inputs.source.problems else Refusal)(*dict.fromkeys(problems))

    fold = any(edge.fold for edge in opened.route)
    request = Request(
        inputs=inputs,
        reference=opened.reference,
        target=target,
        fold=fold,
        layout=layout,
        dtype=options["dtype"] or _usual_dtype(inputs, target, fold=fold),
        scales=scales,
        ranks=ranks,
        options=options,
        destination=destination,
        progress=progress,
    )
    # before the work that some outputs are
    beside = read_beside(inputs, settings_of(inputs.weights.family, options))
    stale, edited = _stale(inputs, beside.assets, options)
    decided = Decided(request=request, beside=beside, edited=tuple(edited))
    refuse_if(stale, SourceRefused)
    lost = () if decided.files_stay else beside.known.inexpressible
    refuse_if((*beside.known.problems, *lost), CheckpointRefused)
    refuse_if(cut_problems(inputs, options, beside.assets), Refusal)
    return decided


def _usual_dtype(inputs: Inputs, target: State, *, fold: bool) -> str:
    """What is written where no dtype is asked for."""
    family = inputs.weights.family
    if fold:
        return family.fold_dtype
    is_whole = target.form is Form.STATE_DICT and not target.stripped
    return family.export_dtype if inputs.source.in_jax and is_whole else "keep"


def _stale(inputs: Inputs, assets: Assets, options: Options) -> tuple[list[Problem], list[str]]:
    """What has changed beside the weights since bridge wrote them; problems and notes."""
    if options["no_check"]:
        return [], []
    found = []
    for source in inputs.sources.values():
        # an adapter's files, where it has any, stand in for its base's
        own = {name: data for name, data in assets.files.items() if str(source.root / name) in assets.stamps}
        found.append(stale_files(source, own))
    return [each for problems, _ in found for each in problems], [
        each for _, notes in found for each in notes
    ]
