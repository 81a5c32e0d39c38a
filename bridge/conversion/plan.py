"""Making a plan: opens the source, finds its model, a route and the scales, and refuses with every problem."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path
from typing import Unpack

from bridge.arrays import BFLOAT16, FLOAT32
from bridge.checkpoint.adapter_base import Based, base_of
from bridge.checkpoint.assets import Assets
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.identity import identity_problems
from bridge.checkpoint.inputs import Inputs, shape_problems, size_problems
from bridge.checkpoint.known import Beside, read_beside
from bridge.checkpoint.leave_out import unmatched
from bridge.checkpoint.open import adapter_of, open_checkpoint
from bridge.checkpoint.opening import Opening, opening_of
from bridge.checkpoint.options import alphas_of
from bridge.compare.base import misfits
from bridge.conversion.converters import Edge, converters, no_scales
from bridge.conversion.job import Job
from bridge.conversion.options import Options
from bridge.conversion.render import head, plan_text
from bridge.conversion.request import Built, Request
from bridge.conversion.resizing import cut_problems, resize_notes, resized
from bridge.conversion.run import Result, run
from bridge.conversion.settings import option_problems, read_options, settings_of
from bridge.errors import (
    CheckpointRefused,
    OutputRefused,
    Problem,
    Refusal,
    RouteRefused,
    SourceRefused,
    refuse_if,
)
from bridge.facts.resolve import Known
from bridge.formats.disk.location import Location
from bridge.graph import Form, Loss, State, route
from bridge.publish.preflight import (
    check_apart,
    check_destination,
    check_kept,
    check_space,
    check_twins,
    destination_at,
)
from bridge.publish.record import stale_files
from bridge.rules.family import Facts
from bridge.rules.model import Layout
from bridge.stream.output import Output, narrows
from bridge.stream.workers import Progress


class Plan(Job):
    """A conversion before it is carried out. Printing it is the dry run. Made by :func:`bridge.plan`."""

    def __str__(self) -> str:
        return self.text()

    def headline(self) -> list[str]:
        """Source, route, loss, scales and notes: what a user must know before it runs."""
        return list(head(self))

    def text(self, width: int = 200) -> str:
        """The whole plan, for a terminal of this width."""
        return plan_text(self, width)

    def run(self, progress: Progress | None = None, executor: Executor | None = None) -> Result:
        """Carry it out: see :func:`bridge.run`."""
        return run(self, progress, executor)


def plan(
    src: str | Path,
    dst: str | Path | None,
    *,
    to: str,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Plan a conversion: every read, every write, every shape, dtype and byte count. Nothing is written.

    Names, shapes and dtypes are read, and of tensor data a few values of every leaf where an adapter is made
    or meets its base; more only where an option says so: ``base`` and ``rank`` to an adapter, and the factors
    of an adapter that are too large for the LoRA leaves.

    Args:
        src (`str` or `Path`): a step directory, its ``params``, a directory of steps, the URL of a bucket
            that has one of these, a directory of PyTorch weights or of an adapter, a trainer's run with such
            directories in it, or a repository's folder in the hub's cache.
        dst (`str`, `Path` or `None`): the directory to make; None plans without one.
        to (`str`): the format asked for: ``"torch-merged"``, ``"torch-base"``, ``"peft-adapter"`` or ``"orbax"``.
        progress (`Callable[[int, int], None]`, *optional*): called with the bytes compared with ``base``, and
            their total.
        **options: the fields of :class:`bridge.Options`, and the options of families by their keywords
            (for type checkers: in ``settings``, by their keywords).

    Returns:
        `Plan`: print it to see what a conversion will do; :meth:`Plan.run` carries it out.

    Raises:
        Refusal: with every problem.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> plan = bridge.plan(sample, None, to="torch-merged", lora_alpha=8)
        >>> plan.dtype, len(plan.specs)
        ('float32', 107)
        >>> [scale.value for scale in plan.scales.values()]  # alpha / rank, by part
        [2.0, 1.0]
    """
    if dst is not None and "://" in str(dst):
        raise OutputRefused(Problem(f"{dst}: outputs are written to local disk", "name a local path"))
    options = read_options(options)
    destination = None if dst is None else destination_at(dst)
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
    if based.origin:
        if not (any("base" in edge.needs for edge in way) or options["with_base"] or _is_open(checkpoint)):
            based = Based()
        else:
            options["base"] = str(based.path)
    reference = None if not based.here else _base(based, opening, checkpoint, target)
    if reference is not None and checkpoint.state.form is Form.ADAPTER:
        checkpoint = adapter_of(reference, checkpoint)
    problems = [*checkpoint.problems, *problems]
    opened = (checkpoint, *((reference,) if reference is not None else ()))
    problems += unmatched(opening, (each.left_out for each in opened))
    if reference is None and _is_open(checkpoint):
        problems.append(
            Problem(
                f"{checkpoint.source.location} is an adapter of {checkpoint.model_name}: neither its names nor the "
                "files beside it tell which",
                "add --base PATH, which does",
            )
        )
    inputs = Inputs(checkpoint, reference if checkpoint.state.form is Form.ADAPTER else None)
    family = inputs.weights.family
    if reference is not None:
        problems += reference.problems
        if destination is not None and based.path is not None:
            given = Location.parse(based.path).local
            problems += check_apart(destination, reference.source.root.local, given)
    problems += option_problems(options, family, checkpoint.state, target)
    inputs = resized(inputs, options)
    base_notes = [f"its base is {based.description}"] if based.origin else []
    if reference is not None and not problems:
        problems += shape_problems(inputs) if inputs.base is not None else misfits(checkpoint, reference)
    if inputs.base is not None and not problems:
        trouble, far = identity_problems(inputs, allowed=options["base_differs"])
        problems += trouble
        base_notes += far
    scaling = next((edge.scaling for edge in way if edge.scaling is not no_scales), no_scales)
    ranks, scales, trouble = scaling(inputs, options)
    problems += trouble
    if target.form is Form.PYTREE:
        problems += size_problems(inputs)
    name = options["layout"]
    layout = inputs.model.written[0] if name is None else inputs.model.layout(name)
    if layout is None:
        have = ", ".join(known.name for known in inputs.model.written)
        problems.append(Problem(f"{inputs.model.name} has no layout {name}", f"use one of {have}"))
    if problems or layout is None:
        raise (CheckpointRefused if checkpoint.problems else Refusal)(*dict.fromkeys(problems))

    # before the work that some outputs are
    beside = read_beside(inputs, settings_of(family, options))
    stale, edited = _stale(inputs, beside.assets, options)
    refuse_if(stale, SourceRefused)
    refuse_if((*beside.known.problems, *_layout_problems(beside, layout, target)), CheckpointRefused)
    refuse_if(cut_problems(inputs, options, beside.assets), Refusal)
    folds = any(edge.fold for edge in way)
    exported = checkpoint.in_jax and _is_whole(target)
    usual = family.fold_dtype if folds else family.export_dtype if exported else "keep"
    request = Request(
        inputs=inputs,
        reference=reference,
        target=target,
        fold=folds,
        layout=layout,
        dtype=options["dtype"] or usual,
        scales=scales,
        ranks=ranks,
        options=options,
        destination=destination,
        progress=progress,
    )
    built = way[-1].build(request)
    outputs, notes = _with_files(request, built.outputs, beside)
    stamps = {**beside.assets.stamps, **beside.known.stamps}
    for source in (*inputs.sources.values(), *((reference.source,) if reference is not None else ())):
        stamps.update(source.stamps)
    planned = Plan(
        inputs=inputs,
        destination=destination,
        route=way,
        loss=Loss.LOSSY if inputs.cut else _loss(way, built),
        scales=scales,
        facts=beside.known.facts,
        outputs=outputs,
        notes=(
            *base_notes,
            *checkpoint.source.notes,
            *_base_notes(inputs),
            *edited,
            *(note for each in inputs.checkpoints.values() for note in each.reports()),
            *resize_notes(inputs, options, beside.assets),
            *built.notes,
            *notes,
        ),
        options=options,
        read_scales=built.read_scales,
        prover=built.prover,
        overwrite=options["overwrite"],
        workers=options["workers"],
        stamps=stamps,
    )
    if destination is not None:
        problems = check_kept(destination, stamps)
        for output in outputs:
            problems += check_twins(destination / output.where, (*output.specs, *output.files))
        refuse_if(problems, OutputRefused)
        refuse_if(check_space(destination, planned.bytes_written), OutputRefused)
    return planned


def _base_notes(inputs: Inputs) -> list[str]:
    """What was chosen when the base was opened, where it is no part of the source itself."""
    if inputs.base is None:
        return []
    return [f"base: {note}" for note in inputs.base.source.notes if note not in inputs.source.source.notes]


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


def _is_open(checkpoint: Checkpoint) -> bool:
    """Whether it may be of several models."""
    return checkpoint.model_name != checkpoint.model.name


def _is_whole(target: State) -> bool:
    """Whether a target is a model's weights, ready to run."""
    return target.form is Form.STATE_DICT and not target.stripped


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


def _loss(way: tuple[Edge, ...], built: Built) -> Loss:
    loss = max(built.loss, *(edge.loss for edge in way))
    if any(narrows(output, FLOAT32, BFLOAT16) for output in built.outputs):
        loss = max(loss, Loss.ROUNDED)
    return loss


def _base(based: Based, opening: Opening, checkpoint: Checkpoint, target: State) -> Checkpoint:
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


def _stays(known: Known, layout: Layout, target: State) -> bool:
    """Whether the source's own files belong to the layout that is written."""
    return target.form is not Form.PYTREE and known.layout == layout.name


def _layout_problems(beside: Beside, layout: Layout, target: State) -> tuple[Problem, ...]:
    """What the source's files state and another layout cannot."""
    return () if _stays(beside.known, layout, target) else beside.known.inexpressible


def _with_files(
    request: Request, outputs: tuple[Output, ...], beside: Beside
) -> tuple[tuple[Output, ...], list[str]]:
    """Add to every output what its loader wants beside the tensors, and the assets."""
    family, inputs, known = request.inputs.weights.family, request.inputs, beside.known
    stays = _stays(known, request.layout, request.target)
    notes = [*beside.assets.notes, *known.notes, *known.remarks, *(() if stays else known.leaving)]
    complete = []
    for output in outputs:
        files = dict(beside.assets.files)
        if family.companions is not None:
            companions = family.companions(
                Facts(
                    model=inputs.model,
                    sizes=inputs.sizes,
                    layout=output.layout,
                    contents=output.state.contents,
                    dtype=output.main_dtype,
                    settings=settings_of(family, request.options),
                    assets=beside.assets.files,
                    in_jax=output.state.form is Form.PYTREE,
                    known=known.facts,
                    kept=known.kept if stays else {},
                )
            )
            files = {**(files if companions.assets is None else companions.assets), **companions.files}
            notes += [note for note in companions.notes if note not in notes]
        complete.append(output.with_files(files))
    return tuple(complete), notes
