"""Making a plan: opens the source, finds its model, a route and the scales, and refuses with every fault found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from bridge import converters
from bridge.arrays import BFLOAT16, FLOAT32
from bridge.checkpoint.assets import Assets, read_assets
from bridge.checkpoint.checkpoint import Checkpoint, open_source, understand
from bridge.checkpoint.scales import Scale, scales
from bridge.conversion.job import Plan
from bridge.conversion.options import Options, option_problems
from bridge.conversion.outputs import Output, leaf_output, tensor_output
from bridge.errors import CheckpointRefused, OutputRefused, Problem, Refusal, RouteRefused, refuse_if
from bridge.formats.contract import Source
from bridge.formats.disk.location import Location
from bridge.graph import Loss, Route, State, route
from bridge.publish.preflight import check_apart, check_destination, check_kept, check_space, check_twins
from bridge.rules.model import Facts, Layout
from bridge.stream.inputs import Inputs, shape_problems, size_problems


def plan(
    src: str | Path,
    dst: str | Path | None,
    *,
    to: str,
    from_: str | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    rslora: bool = False,
    layout: str = "openpi",
    action_horizon: int | None = None,
    keep_alpha: bool = False,
    rank: int | Mapping[str, int] | None = None,
    with_base: bool = False,
    base_name: str | None = None,
    modules_to_save: bool = False,
    fold: bool = False,
    value_suffix: bool = False,
    lossy: bool = False,
    overwrite: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Plan a conversion. Nothing is written, and no tensor data is read but where said.

    Args:
        src: a step directory, its ``params``, a directory of steps, a bucket's URL of these, or a
            directory of PyTorch weights or of an adapter.
        dst: the directory to make; None plans without one.
        to: the format asked for, such as ``"torch-merged"``.
        from_: the source's format, where it does not tell itself.
        base: the checkpoint an adapter applies to. With ``to="peft-adapter"`` the weights beside
            the factors are compared with it, which reads both.
        dtype: ``keep``, ``float32``, ``bfloat16`` or ``float16``; by default bfloat16, or float32
            when LoRA is folded, or the source's own for ``torch-base`` and adapters.
        lora_alpha: alpha of the LoRA training config, for all experts or by name.
        rslora: the run used rank-stabilised LoRA (alpha / sqrt(rank)).
        layout: names of the weights: ``openpi``, ``lerobot`` or ``transformers``.
        action_horizon: length of an action chunk, for ``config.json``; no weight tells it.
        keep_alpha: write an adapter's factors as they are and the scale as alpha.
        rank: to an adapter, the rank its modules are compressed to, by SVD (reads the factors); to
            ``orbax``, the rank of the LoRA leaves, for all experts or by name.
        with_base: write the base an adapter applies to into ``dst/base``.
        base_name: an adapter's ``base_model_name_or_path``.
        modules_to_save: put the weights that differ from ``base`` into the adapter.
        fold: to ``orbax``, sum the adapter into the weights instead of writing LoRA leaves.
        value_suffix: end leaf paths in ``value``, as openpi's training saves them.
        lossy: approximate, by SVD, an adapter's factors that do not fit openpi's rank.
        overwrite: replace an output that bridge has written.
        workers: steps at once.
        progress: called while ``base`` is compared.

    Raises:
        Refusal: with every problem found.
    """
    if dst is not None and "://" in str(dst):
        raise OutputRefused(Problem(f"{dst}: outputs are written to local disk", "name a local path"))
    options = Options(
        dtype, layout, action_horizon, keep_alpha, rank, with_base, base_name, modules_to_save,
        fold, value_suffix, lossy,
    )  # fmt: skip
    destination = None if dst is None else Path(dst).expanduser().absolute()
    checkpoint = understand(open_source(Location.parse(src), from_))
    problems = list(checkpoint.problems)
    if destination is not None:
        problems += check_destination(destination, checkpoint.source.root.local, overwrite=overwrite)
    way = _route(checkpoint, to, fold, base is not None, problems)
    target = way[-1].target
    reference = None if base is None else _base(base, checkpoint, target)
    inputs = Inputs(checkpoint, reference if checkpoint.state is converters.PEFT else None)
    if reference is not None:
        problems += reference.problems
        if destination is not None:
            problems += check_apart(destination, reference.source.root.local)
    problems += option_problems(options, checkpoint.state, target, base)
    if reference is not None and not problems:
        problems += _reference_problems(inputs, reference)
    ranks, alphas, found = _scales(inputs, target, options, lora_alpha, rslora)
    problems += found
    if target.format == converters.ORBAX_BASE.format:
        problems += size_problems(inputs)
    chosen = inputs.model.layout(layout)
    if chosen is None:
        have = ", ".join(known.name for known in inputs.model.layouts)
        problems.append(Problem(f"{inputs.model.name} has no layout {layout}", f"use one of {have}"))
    if problems or chosen is None:
        raise (CheckpointRefused if checkpoint.problems else Refusal)(*dict.fromkeys(problems))

    # before the work that some outputs are
    assets = read_assets(checkpoint.source.root)
    if inputs.base is not None and not assets.files:
        assets = read_assets(inputs.base.source.root)
    outputs, loss, notes = _outputs(
        inputs, reference, way, chosen, alphas, ranks, options, destination, progress
    )
    outputs, said = _with_files(inputs, outputs, assets, options)
    stamps = dict(assets.stamps)
    for each in (*inputs.sources.values(), *((reference.source,) if reference is not None else ())):
        stamps.update(each.stamps)
    made = Plan(
        inputs,
        destination,
        way,
        loss,
        alphas,
        outputs,
        (*checkpoint.source.notes, *_elsewhere(checkpoint.source), *notes, *said),
        options,
        overwrite,
        max(1, workers),
        stamps,
    )
    if destination is not None:
        problems = check_kept(destination, stamps)
        for output in outputs:
            problems += check_twins(destination / output.where, (*output.specs, *output.files))
        refuse_if(problems, OutputRefused)
        refuse_if(check_space(destination, made.bytes_written), OutputRefused)
    return made


def _route(checkpoint: Checkpoint, to: str, fold: bool, has_base: bool, problems: list[Problem]) -> Route:
    """The way to the format asked for. Raises with what is wrong with the source, where there is none."""
    try:
        return route(
            converters.CONVERTERS,
            checkpoint.state,
            to,
            {"base"} if has_base else (),
            converters.ORBAX_BASE.holds if fold and to == converters.ORBAX_BASE.name else None,
        )
    except RouteRefused as refused:
        # a checkpoint that lost its factors has no route: what it lost must be said as well
        kind = CheckpointRefused if checkpoint.problems else RouteRefused
        raise kind(*problems, *refused.problems) from None


def _reference_problems(inputs: Inputs, reference: Checkpoint) -> list[Problem]:
    """Why an adapter does not fit its base, or weights cannot be compared with a reference's."""
    if inputs.base is not None:
        return shape_problems(inputs)
    from bridge.compare.base import misfits

    return misfits(inputs.source, reference)


def _scales(
    inputs: Inputs,
    target: State,
    options: Options,
    lora_alpha: float | Mapping[str, float] | None,
    rslora: bool,
) -> tuple[dict[str, int], dict[str, Scale], list[Problem]]:
    """By part: the ranks of LoRA leaves to be written, and what openpi multiplies products by."""
    if lora_alpha is None or isinstance(lora_alpha, Mapping):
        given = dict(lora_alpha or {})
    else:
        given = {"": float(lora_alpha)}
    if target is converters.ORBAX_LORA:
        from bridge.conversion.from_peft import joined_scales

        return joined_scales(inputs, options, given, rslora)
    carries = inputs.source.state is converters.ORBAX_LORA and target is not converters.TORCH_BASE
    if not (given or rslora or carries):
        return {}, {}, []
    return {}, *scales(inputs.source, given, rslora)


def _outputs(
    inputs: Inputs,
    reference: Checkpoint | None,
    way: Route,
    layout: Layout,
    alphas: Mapping[str, Scale],
    ranks: Mapping[str, int],
    options: Options,
    destination: Path | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[tuple[Output, ...], Loss, list[str]]:
    """What the route's target is made of, what is lost on the way, and what a user must know of it."""
    target, folds = way[-1].target, any(edge.fold for edge in way)
    usual = "float32" if folds else "bfloat16" if target is converters.TORCH_MERGED else "keep"
    dtype = options.dtype or usual
    notes: list[str] = []
    approximated = False
    if target is converters.PEFT:
        from bridge.conversion.to_peft import adapter_outputs

        approximated = options.compress_to is not None
        outputs, notes = adapter_outputs(
            inputs, reference, target, layout, dtype, alphas, options, destination, progress
        )
    elif target.format == converters.ORBAX_BASE.format:
        leaves = leaf_output(
            inputs,
            target,
            dtype,
            fold=folds,
            value_suffix=options.value_suffix,
            ranks=ranks,
            scales=alphas,
            lossy=options.lossy,
        )
        outputs = (leaves,)
        if ranks:
            from bridge.conversion.from_peft import fit_notes

            notes = fit_notes(inputs, leaves)
            approximated = bool(notes)
    else:
        outputs = (tensor_output(inputs, target, layout, dtype, alphas, fold=folds),)
    loss = max(edge.loss for edge in way)
    if approximated or any(_narrows(output) for output in outputs):
        loss = max(loss, Loss.ROUND)
    return outputs, loss, notes


def _elsewhere(source: Source) -> list[str]:
    """Files of a source that symlinks bring in from elsewhere, as a hub's cache does; said aloud."""
    root = os.path.realpath(str(source.root.local))
    real = {path: os.path.realpath(path) for path in source.stamps}
    out = [path for path, whence in real.items() if os.path.commonpath([root, whence]) != root]
    if not out:
        return []
    more = f", and {len(out) - 1} more" if len(out) > 1 else ""
    return [f"{out[0]} is a symlink to {real[out[0]]}{more}"]


def _base(base: str | Path, checkpoint: Checkpoint, target: State) -> Checkpoint:
    """The base an adapter applies to, or the reference that weights are compared with."""
    reference = understand(open_source(Location.parse(base)))
    where = reference.source.location
    if reference.state is converters.PEFT:
        raise CheckpointRefused(
            Problem(f"{where} is an adapter, not a base", "give the weights it applies to")
        )
    if reference.state is converters.ORBAX_LORA and target is not converters.PEFT:
        raise CheckpointRefused(
            Problem(
                f"{where} has LoRA factors of its own", "make its base first: bridge convert --to torch-base"
            )
        )
    if checkpoint.state is not converters.PEFT and reference.model.name != checkpoint.model.name:
        raise CheckpointRefused(
            Problem(
                f"{checkpoint.source.location} is {checkpoint.model.name}, and {where} is {reference.model.name}",
                "give a base of the same model",
            )
        )
    return reference


def _with_files(
    inputs: Inputs, outputs: tuple[Output, ...], assets: Assets, options: Options
) -> tuple[tuple[Output, ...], list[str]]:
    """Add to every output what its loader wants beside the tensors, and the assets."""
    notes = list(assets.notes)
    made = []
    for output in outputs:
        files = dict(assets.files)
        makes = inputs.weights.adapter.companions
        if makes is not None and output.state.format != converters.ORBAX_BASE.format:
            companions = makes(
                Facts(
                    inputs.model,
                    inputs.weights.sizes,
                    output.layout,
                    output.state.holds,
                    output.main_dtype,
                    {"action_horizon": options.action_horizon},
                    assets.files,
                )
            )
            files.update(companions.files)
            notes += [note for note in companions.notes if note not in notes]
        made.append(output.with_files(files))
    return tuple(made), notes


def _narrows(output: Output) -> bool:
    """Whether some weight is written in a dtype that cannot hold all values of its source's."""
    return any(
        step.writer.dtype != step.leaf_spec.dtype
        and not (step.writer.dtype == FLOAT32 and step.leaf_spec.dtype.itemsize == BFLOAT16.itemsize)
        for step in output.steps
    )
