"""What a checkpoint is, by names, shapes and dtypes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from bridge.arrays import WEIGHT_DTYPES
from bridge.checkpoint.adapter_base import base_of
from bridge.checkpoint.assets import Assets
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.given_sizes import flags
from bridge.checkpoint.identity import identity_problems, recorded
from bridge.checkpoint.inputs import Inputs, shape_problems
from bridge.checkpoint.known import Beside, read_beside
from bridge.checkpoint.leave_out import unmatched
from bridge.checkpoint.open import adapter_of, open_checkpoint
from bridge.checkpoint.opening import Opening, opening_of
from bridge.checkpoint.options import OpenOptions
from bridge.checkpoint.sizes import open_axes
from bridge.errors import Problem, Refusal, SourceRefused
from bridge.facts.resolve import Known
from bridge.graph import Form
from bridge.rules.model import Part
from bridge.rules.option import complete


@dataclass(frozen=True, kw_only=True)
class PartDescription:
    """One part of a model: a vision tower, a decoder."""

    name: str
    parameters: int
    dtypes: dict[str, int]
    """Parameters by dtype."""
    sizes: dict[str, int]
    lora: dict[str, Any] | None
    """Ranks by kind (by module for an adapter), stock alpha where the rank has one, and parameters of the factors."""
    trained: str
    """``"LoRA"``, ``"in full"``, ``"frozen"``, or why the dtypes do not show it."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """A checkpoint, described."""

    path: str
    format: str
    state: str
    model: str
    layout: str
    value_suffix: bool
    arrays: int
    parameters: int
    nbytes: int
    stored_bytes: int
    parts: tuple[PartDescription, ...]
    assets: tuple[str, ...]
    facts: dict[str, dict[str, Any]]
    """What is in no weight, by key: title, value, the value in words, and origin."""
    remarks: tuple[str, ...]
    """What looks wrong about the facts."""
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    base: str = ""
    """What is known of an adapter's base; empty for another checkpoint."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(path: str | Path, format: str | None = None, **options: Unpack[OpenOptions]) -> Description:
    """Describe a checkpoint from names, shapes and dtypes.

    No tensor data is read but a few values of an adapter's base, where that lies beside it.

    Args:
        path (`str` or `Path`): the checkpoint, as for :func:`bridge.plan`.
        format (`str`, *optional*): its format; detected by default.
        **options: the fields of :class:`bridge.OpenOptions`.

    Returns:
        `Description`: format, model, sizes of every part, ranks, dtypes, bytes, assets; what is wrong with a
        checkpoint that can be read is in :attr:`Description.problems`.

    Raises:
        Refusal: it cannot be opened, or it is not of a supported model.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> description = bridge.describe(sample)
        >>> description.state, description.parameters
        ('orbax[base+lora]', 483094)
    """
    opening = opening_of(complete(OpenOptions, options))
    checkpoint = open_checkpoint(path, format, opening)
    base, trouble = "", list[Problem]()
    if checkpoint.state.form is Form.ADAPTER:
        checkpoint, base, trouble = _on_its_base(checkpoint, opening)
    source = checkpoint.source
    specs = source.specs
    try:
        beside = read_beside(Inputs(checkpoint), facts_only=True)
        unread: tuple[Problem, ...] = ()
    except SourceRefused as refused:
        beside, unread = Beside(Assets({}), Known()), refused.problems
    known = beside.known
    return Description(
        path=str(source.location),
        format=source.format,
        state=str(checkpoint.state),
        model=checkpoint.model_name,
        layout=checkpoint.naming or checkpoint.layout.name,
        value_suffix=checkpoint.suffixed,
        arrays=len(specs),
        parameters=sum(spec.size for spec in specs.values()),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        stored_bytes=sum(source.stored_bytes(name) for name in specs),
        parts=tuple(_part(checkpoint, part) for part in checkpoint.model.parts),
        assets=tuple(beside.assets.paths),
        facts={
            key: {"title": fact.kind.title, "text": fact.text, **fact.as_json()}
            for key, fact in known.facts.items()
        },
        remarks=known.remarks,
        notes=(*source.notes, *_open_sizes(checkpoint), *known.notes),
        problems=tuple(
            problem.cause
            for problem in (
                *checkpoint.problems,
                *trouble,
                *unmatched(opening, [checkpoint.left_out]),
                *known.problems,
                *unread,
            )
        ),
        base=base,
    )


def _open_sizes(checkpoint: Checkpoint) -> list[str]:
    """A note about sizes that a conversion to JAX needs and that nothing tells."""
    if not checkpoint.choices:
        return []
    return [
        f"shapes do not determine {', '.join(open_axes(checkpoint.model, checkpoint.sizes))}: give "
        f"{flags(checkpoint.choices)} where they are needed"
    ]


def _on_its_base(adapter: Checkpoint, opening: Opening) -> tuple[Checkpoint, str, list[Problem]]:
    """An adapter as its base makes it known, what there is to say of that base, and what speaks against it."""
    based = base_of(adapter, None)
    if not based.here:
        return adapter, based.description, []
    said = based.description
    try:
        base = based.open(opening)
    except Refusal as refused:
        return adapter, f"{said}, cannot be opened: {refused.problems[0].cause}", []
    inputs = Inputs(adapter_of(base, adapter), base)
    if inputs.source.problems or base.problems:
        return inputs.source, said, list(base.problems)
    problems = shape_problems(inputs)
    if not problems:
        problems, _ = identity_problems(inputs, allowed=False)
    known = recorded(adapter.source) is not None and not problems
    return inputs.source, said + (", the one it was made for" if known else ""), problems


def _part(checkpoint: Checkpoint, part: Part) -> PartDescription:
    specs = checkpoint.source.specs
    by_dtype = Counter[np.dtype]()
    for stored in checkpoint.arrays_of(part):
        by_dtype[specs[stored].dtype] += specs[stored].size
    # numpy works a name out at each use
    weights = Counter({dtype.name: size for dtype, size in by_dtype.items()})
    factors = [specs[name] for name in checkpoint.factors_of(part)]
    ranks = checkpoint.ranks_of(part)
    parameters = sum(spec.size for spec in factors)
    lora = None
    if ranks:
        stock = (part.stock_alpha[rank] for rank in ranks.values() if rank in part.stock_alpha)
        lora = {
            "ranks": ranks,
            "stock_alpha": next(stock, None),
            "parameters": parameters,
            "dtypes": sorted({dtype.name for dtype in {spec.dtype for spec in factors}}),
        }
    return PartDescription(
        name=part.name,
        parameters=sum(weights.values()) + parameters,
        dtypes=dict(sorted(weights.items())),
        sizes=_dimensions(checkpoint, part),
        lora=lora,
        trained=_trained(checkpoint, weights, has_lora=bool(ranks)),
    )


def _dimensions(checkpoint: Checkpoint, part: Part) -> dict[str, int]:
    """The sizes that tell one part from another: no rank, no k-or-v, no multiple of another size."""
    model = checkpoint.model
    derived = {model.qualified(*multiple.axis.split(".")) for multiple in model.multiples}
    sizes: dict[str, int] = {}
    named: set[str] = set()
    for rule in part.rules:
        for axis in (*rule.path.axes, *rule.equation.left):
            qualified = model.qualified(part.name, axis)
            if qualified in named or qualified in derived or axis in rule.template.choices:
                continue
            if qualified in checkpoint.sizes and axis.isidentifier():
                named.add(qualified)
                sizes[axis] = checkpoint.sizes[qualified]
    return dict(sorted(sizes.items()))


def _trained(checkpoint: Checkpoint, weights: Counter[str], *, has_lora: bool) -> str:
    """What a LoRA run trained of a part, where the runtime saves that in another dtype than what it froze."""
    if checkpoint.modules:
        return "LoRA" if has_lora else "not in the adapter"
    if not checkpoint.in_jax:
        return "unknown (PyTorch files do not record it)"
    if not checkpoint.has_lora:
        return "unknown (not a LoRA run)"
    everywhere = {spec.dtype.name for spec in checkpoint.source.specs.values()}
    if checkpoint.family.frozen_dtype is None or len(everywhere & WEIGHT_DTYPES.keys()) < 2:
        return "LoRA; otherwise unknown (uniform dtype)" if has_lora else "unknown (uniform dtype)"
    if set(weights) == {"float32"}:
        return "in full"
    return "LoRA" if has_lora else "frozen"
