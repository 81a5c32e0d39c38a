"""A conversion, planned: every read, every write, every shape and byte, before the first is read.

Making a plan opens the source, finds its model, a route and the scales, and refuses with every
fault it finds. Printing it is the dry run; running it streams (:mod:`bridge.runner`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge import converters
from bridge.assets import read_assets
from bridge.checkpoint import Checkpoint, open_source, understand, weight_names
from bridge.errors import CheckpointRefused, OutputRefused, Problem, Refusal, refuse_if
from bridge.formats import Source
from bridge.formats.location import Location
from bridge.graph import Loss, Route, route
from bridge.model import Facts, Layout, Part
from bridge.publish import check_destination, check_space
from bridge.rule import Rule
from bridge.scales import Scale, scales
from bridge.specs import BFLOAT16, FLOAT32, WEIGHT_DTYPES, Spec
from bridge.step import Leaf, Step

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from bridge.runner import Progress, Result

DTYPES = ("keep", *WEIGHT_DTYPES)

#: what the interpreter with numpy, TensorStore and zstandard takes
RESIDENT = 90 << 20


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do. Made by :func:`plan`."""

    checkpoint: Checkpoint
    destination: Path | None
    """The directory to make; None for a plan that is only carried out in memory."""
    route: Route
    loss: Loss
    layout: Layout
    dtype: str
    scales: Mapping[str, Scale]
    steps: tuple[Step, ...]
    specs: Mapping[str, Spec]
    """Every tensor of the output."""
    zeros: Mapping[str, str]
    """Tensors that are zeros -> the reason."""
    header: Mapping[str, str]
    files: Mapping[str, bytes]
    """Files written beside the tensors."""
    notes: tuple[str, ...]
    overwrite: bool = False
    workers: int = 2
    format: str = "torch"

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source, as stored."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_decoded(self) -> int:
        """Bytes of the source's arrays once decoded."""
        source = self.checkpoint.source
        return sum(source.specs[name].nbytes for step in self.steps for name in step.leaf.names)

    @property
    def bytes_written(self) -> int:
        """Bytes written; tensors of zeros are a hole and take none."""
        return sum(step.bytes_written for step in self.steps) + sum(len(data) for data in self.files.values())

    @property
    def memory_budget(self) -> int:
        """Bytes that steps running at once may take: the largest decides, small ones share."""
        largest = max((step.memory for step in self.steps), default=0)
        return max(largest, 256 << 20)

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
    dtype: str | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    rslora: bool = False,
    layout: str = "openpi",
    action_horizon: int | None = None,
    overwrite: bool = False,
    workers: int = 2,
) -> Plan:
    """Plan a conversion. Nothing is written, and no tensor data is read.

    Args:
        src: a step directory, its ``params``, a directory of steps, or a bucket's URL of these.
        dst: the directory to make; None plans without one.
        to: the format asked for, such as ``"torch-merged"``.
        from_: the source's format, where it does not tell itself.
        dtype: ``keep``, ``float32``, ``bfloat16`` or ``float16``; by default bfloat16, or float32
            when LoRA is folded, or the source's own for ``torch-base``.
        lora_alpha: alpha of the LoRA training config, for all experts or by name.
        rslora: the run used rank-stabilised LoRA (alpha / sqrt(rank)).
        layout: names of the weights: ``openpi``, ``lerobot`` or ``transformers``.
        action_horizon: length of an action chunk, for ``config.json``; no weight tells it.
        overwrite: replace an output that bridge has written.
        workers: steps at once.

    Raises:
        Refusal: with every problem found.
    """
    destination = None if dst is None else Path(dst).expanduser().absolute()
    source = open_source(Location.parse(src), from_)
    checkpoint = understand(source)
    problems = list(checkpoint.problems)
    if destination is not None:
        problems += check_destination(destination, source.root.local, overwrite=overwrite)

    way = route(converters.CONVERTERS, checkpoint.state, to)
    target = way[-1].target
    fold = any(edge.fold for edge in way)
    given = (
        {}
        if lora_alpha is None
        else {"": lora_alpha}
        if isinstance(lora_alpha, (int, float))
        else dict(lora_alpha)
    )
    alphas: dict[str, Scale] = {}
    if fold or given or rslora:
        alphas, scale_problems = scales(checkpoint, given, rslora)
        problems += scale_problems
    chosen = checkpoint.model.layout(layout)
    if chosen is None:
        have = ", ".join(known.name for known in checkpoint.model.layouts)
        problems.append(Problem(f"{checkpoint.model.name} has no layout {layout}", f"use one of {have}"))
    if dtype is not None and dtype not in DTYPES:
        problems.append(Problem(f"{dtype} is no dtype for weights", f"use one of {', '.join(DTYPES)}"))
    if problems or chosen is None:
        raise (CheckpointRefused if checkpoint.problems else Refusal)(*problems)

    dtype = dtype or ("keep" if target is converters.TORCH_BASE else "float32" if fold else "bfloat16")
    steps = tuple(
        _step(checkpoint, part, rule, chosen, dtype, alphas.get(part.name), fold=fold)
        for part in checkpoint.model.parts
        for rule in part.rules
    )
    specs, header = _targets(checkpoint, chosen, steps)
    zeros = _zeros(checkpoint, chosen, specs)
    most = Counter(spec.dtype.name for spec in specs.values()).most_common(1)[0][0]
    assets = read_assets(source.root)
    files, notes = dict(assets.files), [*source.notes, *assets.notes]
    if checkpoint.adapter.companions is not None:
        made = checkpoint.adapter.companions(
            Facts(
                checkpoint.model,
                checkpoint.sizes,
                chosen,
                most,
                {"action_horizon": action_horizon},
                assets.files,
            )
        )
        files.update(made.files)
        notes += made.notes
    loss = max(edge.loss for edge in way)
    if _narrows(checkpoint, steps):
        loss = max(loss, Loss.ROUND)
    if destination is not None:
        refuse_if(check_space(destination, sum(step.bytes_written for step in steps)), OutputRefused)
    return Plan(
        checkpoint=checkpoint,
        destination=destination,
        route=way,
        loss=loss,
        layout=chosen,
        dtype=dtype,
        scales=alphas,
        steps=steps,
        specs={name: specs[name] for name in sorted(specs)},
        zeros=zeros,
        header=header,
        files=files,
        notes=tuple(notes),
        overwrite=overwrite,
        workers=max(1, workers),
        format=target.format,
    )


def _step(
    checkpoint: Checkpoint,
    part: Part,
    rule: Rule,
    layout: Layout,
    dtype: str,
    scale: Scale | None,
    *,
    fold: bool,
) -> Step:
    source, stored = checkpoint.source, checkpoint.stored
    sizes = checkpoint.model.local_sizes(part.name, checkpoint.sizes)
    leaf = Leaf(stored[rule.leaf])
    if fold and checkpoint.has_lora(rule):
        assert rule.factor_leaves is not None and rule.lora is not None
        leaf = Leaf(leaf.w, *(stored[name] for name in rule.factor_leaves))
    scaled = leaf.a is not None and rule.lora is not None and rule.lora.scaled
    source_spec = source.specs[leaf.w]
    spec = Spec(rule.equation.weight_shape(sizes), _dtype(rule, source_spec, dtype))
    weights = tuple(
        (index, _written_names(checkpoint, layout, name)) for index, name in weight_names(rule, sizes)
    )
    return Step(
        rule=rule,
        part=part.name,
        leaf=leaf,
        scale=scale.value if scaled and scale is not None else 1.0,
        weights=weights,
        source_spec=source_spec,
        spec=spec,
        bytes_read=sum(source.stored_bytes(name) for name in leaf.names),
        bytes_written=sum(len(names) for _, names in weights) * spec.nbytes,
        memory=_memory(source, rule, leaf, spec),
    )


def _dtype(rule: Rule, source: Spec, dtype: str) -> Any:
    wanted = source.dtype if dtype == "keep" else WEIGHT_DTYPES[dtype]
    held = WEIGHT_DTYPES[rule.hold] if rule.hold is not None else wanted
    return held if dtype != "keep" and held.itemsize > wanted.itemsize else wanted


def _memory(source: Source, rule: Rule, leaf: Leaf, spec: Spec) -> int:
    """Bytes that a step has in memory at its fullest."""
    factors = sum(source.specs[name].nbytes for name in leaf.names[1:])
    if not rule.equation.streams:
        whole = source.specs[leaf.w].nbytes
        return 2 * whole + 2 * spec.nbytes
    block = source.buffered_bytes(leaf.w)
    if not rule.equation.placeholders:
        return 3 * block + factors
    one = spec.size
    folded = 2 * one * FLOAT32.itemsize if leaf.a is not None else 0
    return block + factors + folded + 2 * spec.nbytes


def _written_names(checkpoint: Checkpoint, layout: Layout, name: str) -> tuple[str, ...]:
    """The names a weight is written under: its own, and its aliases where the layout does not tie."""
    aliases = () if layout.ties else tuple(a for a, of in checkpoint.model.tied.items() if of == name)
    return tuple(dict.fromkeys(layout.rename(each) for each in (name, *aliases)))


def _targets(
    checkpoint: Checkpoint, layout: Layout, steps: tuple[Step, ...]
) -> tuple[dict[str, Spec], dict[str, str]]:
    """Every tensor of the output, each once, and the header's metadata."""
    specs: dict[str, Spec] = {}
    for step in steps:
        for _, names in step.weights:
            for name in names:
                if name in specs:
                    raise ValueError(f"model {checkpoint.model.name}: two rules write {name}")
                specs[name] = step.spec
    # as safetensors' save_model records a tensor that is stored under another name
    header = {"format": "pt"}
    for alias, of in checkpoint.model.tied.items():
        if layout.rename(alias) not in specs:
            header[layout.rename(alias)] = layout.rename(of)
    return specs, header


def _zeros(checkpoint: Checkpoint, layout: Layout, specs: dict[str, Spec]) -> dict[str, str]:
    """Add the weights that nothing uses, as zeros, in the dtype of what they stand beside."""
    zeros = {}
    for unused in checkpoint.model.unused:
        name = layout.rename(unused.weight)
        canonical = [checkpoint.model.canonical.get(axis, axis) for axis in unused.axes]
        shape = tuple(checkpoint.sizes[axis] for axis in canonical)
        narrow = min((spec.dtype for spec in specs.values()), key=lambda dtype: (dtype.itemsize, dtype.name))
        specs[name] = Spec(shape, narrow)
        zeros[name] = unused.reason
    return zeros


def _narrows(checkpoint: Checkpoint, steps: tuple[Step, ...]) -> bool:
    """Whether some weight is written in a dtype that cannot hold all values of its leaf's."""
    return any(
        step.spec.dtype != step.source_spec.dtype
        and not (step.spec.dtype == FLOAT32 and step.source_spec.dtype.itemsize == BFLOAT16.itemsize)
        for step in steps
    )
