"""The third stage of a plan: its outputs, with the files that their loaders want beside the tensors."""

from __future__ import annotations

from dataclasses import replace

from bridge.arrays import BFLOAT16, FLOAT32
from bridge.conversion.decided import Decided
from bridge.conversion.opened import Opened
from bridge.conversion.request import Built
from bridge.conversion.settings import settings_of
from bridge.graph import Form, Loss
from bridge.rules.family import Facts
from bridge.stream.output import Output, narrows


def build(opened: Opened, decided: Decided) -> Built:
    """What the route's last edge makes, complete; its loss is that of the whole route. Raises Refusal."""
    built = opened.route[-1].build(decided.request)
    outputs, notes = _with_files(decided, built.outputs)
    return replace(built, outputs=outputs, notes=(*built.notes, *notes), loss=_loss(opened, built))


def _loss(opened: Opened, built: Built) -> Loss:
    if opened.inputs.cut:
        return Loss.LOSSY
    loss = max(built.loss, *(edge.loss for edge in opened.route))
    if any(narrows(output, FLOAT32, BFLOAT16) for output in built.outputs):
        loss = max(loss, Loss.ROUNDED)
    return loss


def _with_files(decided: Decided, outputs: tuple[Output, ...]) -> tuple[tuple[Output, ...], list[str]]:
    """Add to every output what its loader wants beside the tensors, and the assets."""
    request, assets, known = decided.request, decided.beside.assets, decided.beside.known
    inputs, family = request.inputs, request.inputs.weights.family
    leaving = () if decided.files_stay else known.leaving
    notes = [*assets.notes, *known.notes, *known.remarks, *leaving]
    complete = []
    for output in outputs:
        files = dict(assets.files)
        if family.companions is not None:
            companions = family.companions(
                Facts(
                    model=inputs.model,
                    sizes=inputs.sizes,
                    layout=output.layout,
                    contents=output.state.contents,
                    dtype=output.main_dtype,
                    settings=settings_of(family, request.options),
                    assets=assets.files,
                    in_jax=output.state.form is Form.PYTREE,
                    known=known.facts,
                    kept=known.kept if decided.files_stay else {},
                )
            )
            files = {**(files if companions.assets is None else companions.assets), **companions.files}
            notes += [note for note in companions.notes if note not in notes]
        complete.append(output.with_files(files))
    return tuple(complete), notes
