"""A conversion, planned: every read, every write, every shape and byte, before the first is read.

Making a plan opens the source, finds its model, a route and the scales, and refuses with every
fault it finds. Printing it is the dry run; running it streams (:mod:`bridge.runner`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bridge import converters
from bridge.assets import Assets, read_assets
from bridge.checkpoint import Checkpoint, open_source, understand
from bridge.destination import check_apart, check_destination, check_kept, check_space, check_twins
from bridge.errors import CheckpointRefused, OutputRefused, Problem, Refusal, RouteRefused, refuse_if
from bridge.formats import Source
from bridge.formats.location import Location
from bridge.formats.stamps import Stamp
from bridge.graph import Loss, Route, State, route
from bridge.inputs import Inputs, shape_problems, size_problems
from bridge.model import Facts, Layout
from bridge.outputs import Output, leaf_output, tensor_output
from bridge.scales import Scale, scales
from bridge.specs import BFLOAT16, FLOAT32, WEIGHT_DTYPES, Spec
from bridge.step import Step

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from bridge.runner import Progress, Result

DTYPES = ("keep", *WEIGHT_DTYPES)

#: what steps running at once may take together
MEMORY = 512 << 20

#: what the interpreter with numpy, TensorStore and zstandard takes
RESIDENT = 90 << 20


@dataclass(frozen=True)
class Options:
    """What the user chose, as given to :func:`plan`."""

    dtype: str | None = None
    layout: str = "openpi"
    action_horizon: int | None = None
    keep_alpha: bool = False
    rank: int | Mapping[str, int] | None = None
    with_base: bool = False
    base_name: str | None = None
    modules_to_save: bool = False
    fold: bool = False
    value_suffix: bool = False
    lossy: bool = False

    @property
    def compress_to(self) -> int | None:
        """The rank every module of an adapter is compressed to, if it is."""
        return self.rank if isinstance(self.rank, int) else None


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do. Made by :func:`plan`."""

    inputs: Inputs
    destination: Path | None
    """The directory to make; None for a plan that is only carried out in memory."""
    route: Route
    loss: Loss
    scales: Mapping[str, Scale]
    outputs: tuple[Output, ...]
    """The directories it makes, the destination itself first."""
    notes: tuple[str, ...]
    options: Options = Options()
    overwrite: bool = False
    workers: int = 2
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """Every local file that the plan depends on, as it was when it was opened."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.inputs.source

    @property
    def output(self) -> Output:
        """The destination itself."""
        return self.outputs[0]

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for output in self.outputs for step in output.steps)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor of the destination itself."""
        return self.output.specs

    @property
    def layout(self) -> Layout:
        return self.output.layout

    @property
    def dtype(self) -> str:
        return self.output.dtype

    @property
    def bytes_read(self) -> int:
        """Bytes read from the sources, as stored."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_decoded(self) -> int:
        """Bytes of the arrays read, once decoded."""
        return sum(self.inputs.spec(read).nbytes for step in self.steps for read in step.reads)

    @property
    def bytes_written(self) -> int:
        """Bytes written; tensors of zeros are a hole and take none."""
        return sum(output.bytes_written for output in self.outputs)

    @property
    def memory_budget(self) -> int:
        """Bytes that steps running at once may take together; a larger one runs alone."""
        largest = max((step.memory for step in self.steps), default=0)
        return max(largest, MEMORY)

    @property
    def memory(self) -> int:
        """Estimated peak memory of the process, in bytes."""
        biggest = sorted((step.memory for step in self.steps), reverse=True)[: self.workers]
        return RESIDENT + min(sum(biggest), self.memory_budget)

    def __str__(self) -> str:
        return self.text()

    def headline(self) -> list[str]:
        """Source, route, loss, scales and notes: what a user must know before it runs."""
        from bridge.text import head

        return list(head(self))

    def text(self, width: int = 200) -> str:
        """The whole plan, for a terminal of this width."""
        from bridge.text import plan_text

        return plan_text(self, width)

    def run(self, progress: Progress | None = None, executor: Executor | None = None) -> Result:
        """Carry it out: see :func:`bridge.runner.run`."""
        from bridge.runner import run

        return run(self, progress, executor)


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
    source = open_source(Location.parse(src), from_)
    checkpoint = understand(source)
    problems = list(checkpoint.problems)
    if destination is not None:
        problems += check_destination(destination, source.root.local, overwrite=overwrite)

    try:
        way = route(
            converters.CONVERTERS,
            checkpoint.state,
            to,
            {"base"} if base is not None else (),
            converters.ORBAX_BASE.holds if fold and to == converters.ORBAX_BASE.name else None,
        )
    except RouteRefused as refused:
        # a checkpoint that lost its factors has no route: what it lost must be said as well
        kind = CheckpointRefused if checkpoint.problems else RouteRefused
        raise kind(*problems, *refused.problems) from None
    target = way[-1].target
    reference = None if base is None else _base(base, checkpoint, target)
    inputs = Inputs(checkpoint, reference if checkpoint.state is converters.PEFT else None)
    if reference is not None:
        problems += reference.problems
        if destination is not None:
            problems += check_apart(destination, reference.source.root.local)
    problems += _option_problems(options, checkpoint.state, target, base)
    if inputs.base is not None and not problems:
        problems += shape_problems(inputs)
    elif reference is not None and not problems:
        from bridge.compare import misfits

        problems += misfits(checkpoint, reference)

    folds = any(edge.fold for edge in way)
    given = _alphas(lora_alpha)
    alphas: dict[str, Scale] = {}
    ranks: dict[str, int] = {}
    if target is converters.ORBAX_LORA:
        from bridge.join_plan import joined_scales

        ranks, alphas, scale_problems = joined_scales(inputs, options, given, rslora)
        problems += scale_problems
    elif (
        given or rslora or (checkpoint.state is converters.ORBAX_LORA and target is not converters.TORCH_BASE)
    ):
        alphas, scale_problems = scales(checkpoint, given, rslora)
        problems += scale_problems
    if target.format == converters.ORBAX_BASE.format:
        problems += size_problems(inputs)
    chosen = inputs.model.layout(layout)
    if chosen is None:
        have = ", ".join(known.name for known in inputs.model.layouts)
        problems.append(Problem(f"{inputs.model.name} has no layout {layout}", f"use one of {have}"))
    if problems or chosen is None:
        raise (CheckpointRefused if checkpoint.problems else Refusal)(*dict.fromkeys(problems))

    dtype = dtype or ("float32" if folds else "bfloat16" if target is converters.TORCH_MERGED else "keep")
    notes = [*source.notes, *_elsewhere(source)]
    approximated = options.compress_to is not None and target is converters.PEFT
    assets = read_assets(source.root)
    if inputs.base is not None and not assets.files:
        assets = read_assets(inputs.base.source.root)
    if target is converters.PEFT:
        from bridge.adapter_plan import adapter_outputs

        outputs, found = adapter_outputs(
            inputs, reference, target, chosen, dtype, alphas, options, destination, progress
        )
        notes += found
    elif target.format == converters.ORBAX_BASE.format:
        made_leaves = leaf_output(
            inputs,
            target,
            dtype,
            fold=folds,
            value_suffix=value_suffix,
            ranks=ranks,
            scales=alphas,
            lossy=lossy,
        )
        outputs = (made_leaves,)
        if ranks:
            from bridge.join_plan import fit_notes

            fitted = fit_notes(inputs, made_leaves)
            approximated = bool(fitted)
            notes += fitted
    else:
        outputs = (tensor_output(inputs, target, chosen, dtype, alphas, fold=folds),)
    outputs, found = _with_files(inputs, outputs, assets, options)
    notes += found

    loss = max(edge.loss for edge in way)
    if approximated or any(_narrows(output) for output in outputs):
        loss = max(loss, Loss.ROUND)
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
        tuple(notes),
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


def _alphas(given: float | Mapping[str, float] | None) -> dict[str, float]:
    if given is None:
        return {}
    return {"": float(given)} if isinstance(given, (int, float)) else dict(given)


def _option_problems(options: Options, source: State, target: State, base: object) -> list[Problem]:
    """Options that say nothing about the target asked for: they would be ignored in silence."""
    problems = []
    if options.dtype is not None and options.dtype not in DTYPES:
        problems.append(
            Problem(f"{options.dtype} is no dtype for weights", f"use one of {', '.join(DTYPES)}")
        )
    is_adapter, is_tree = target is converters.PEFT, target.format == converters.ORBAX_BASE.format
    for flag, given, fits in (
        ("--keep-alpha", options.keep_alpha, is_adapter),
        ("--with-base", options.with_base, is_adapter),
        ("--base-name", options.base_name is not None, is_adapter),
        ("--modules-to-save", options.modules_to_save, is_adapter),
        ("--base", base is not None, is_adapter or source is converters.PEFT),
        ("--rank", options.rank is not None, is_adapter or target is converters.ORBAX_LORA),
        ("--lossy", options.lossy, target is converters.ORBAX_LORA),
        ("--fold", options.fold, is_tree),
        ("--value-suffix", options.value_suffix, is_tree),
        ("--layout", options.layout != "openpi", not is_tree),
        ("--action-horizon", options.action_horizon is not None, not is_tree),
    ):
        if given and not fits:
            problems.append(Problem(f"{flag} says nothing about {target}", f"leave {flag} out"))
    if options.modules_to_save and is_adapter and base is None:
        problems.append(
            Problem(
                "--modules-to-save needs the base whose other weights the adapter should carry",
                "add --base PATH",
            )
        )
    if is_adapter and isinstance(options.rank, Mapping):
        problems.append(Problem("--rank is given by expert, and compresses all modules", "give one number"))
    ranks = options.rank.values() if isinstance(options.rank, Mapping) else (options.rank,)
    problems += [
        Problem(f"--rank is {rank}", "give a positive whole number")
        for rank in ranks
        if rank is not None and (rank < 1 or rank != int(rank))
    ]
    return problems


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
