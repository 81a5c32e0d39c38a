"""What a checkpoint is, told from names, shapes and dtypes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridge.arrays import WEIGHT_DTYPES
from bridge.checkpoint.checkpoint import Checkpoint, open_source, understand
from bridge.formats.disk.location import Location
from bridge.rules.model import Part
from bridge.rules.names import Template, skeleton


@dataclass(frozen=True)
class PartDescription:
    """One tower or expert."""

    name: str
    parameters: int
    dtypes: dict[str, int]
    """Parameters by dtype."""
    sizes: dict[str, int]
    lora: dict[str, Any] | None
    """Ranks by kind (by module for an adapter), stock alpha where the rank has one, and parameters of the factors."""
    trained: str
    """``"LoRA"``, ``"in full"``, ``"frozen"``, or why the dtypes do not tell."""


@dataclass(frozen=True)
class Description:
    """A checkpoint, for people and machines."""

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
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(path: str | Path, format: str | None = None) -> Description:
    """Describe a checkpoint without reading tensor data.

    Raises:
        Refusal: it cannot be opened, or no adapter knows it. Lesser faults are listed in the
            result's ``problems``.
    """
    source = open_source(Location.parse(path), format)
    checkpoint = understand(source)
    specs = source.specs
    directory = source.root / "assets"
    return Description(
        path=str(source.location),
        format=source.format,
        state=str(checkpoint.state),
        model=checkpoint.model.name,
        layout=checkpoint.layout.name if checkpoint.layout else "pytree",
        value_suffix=checkpoint.value_suffix,
        arrays=len(specs),
        parameters=sum(spec.size for spec in specs.values()),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        stored_bytes=sum(source.stored_bytes(name) for name in specs),
        parts=tuple(_part(checkpoint, part.name) for part in checkpoint.model.parts),
        assets=tuple(directory.files()),
        notes=source.notes,
        problems=tuple(problem.cause for problem in checkpoint.problems),
    )


def _part(checkpoint: Checkpoint, name: str) -> PartDescription:
    part = next(part for part in checkpoint.model.parts if part.name == name)
    specs, stored = checkpoint.source.specs, checkpoint.stored
    weights, factors = Counter[str](), 0
    ranks: dict[str, int] = {}
    factor_dtypes: set[str] = set()
    forms = {form for rule in part.rules for form, _ in rule.template.skeletons()}
    for rule in part.rules:
        for key in _stored_of(checkpoint, rule.leaf, rule.weight):
            spec = specs[key]
            weights[spec.dtype.name] += spec.size
        if checkpoint.has_lora(rule) and rule.lora is not None:
            for leaf in rule.factor_leaves or ():
                factors += specs[stored[leaf]].size
                factor_dtypes.add(specs[stored[leaf]].dtype.name)
            ranks["attention" if rule.lora.scaled else "feed-forward"] = checkpoint.rank(name, rule)
    for weight, module in checkpoint.modules.items():
        if skeleton(weight)[0] in forms:
            for tensor in (module.a, module.b):
                factors += specs[tensor].size
                factor_dtypes.add(specs[tensor].dtype.name)
            ranks[weight.split(".")[-2]] = module.rank
    lora = None
    if ranks:
        rank = ranks.get("attention")
        lora = {
            "ranks": ranks,
            "stock_alpha": part.stock_alpha.get(rank or 0),
            "parameters": factors,
            "dtypes": sorted(factor_dtypes),
        }
    return PartDescription(
        name=name,
        parameters=sum(weights.values()) + factors,
        dtypes=dict(sorted(weights.items())),
        sizes=_dimensions(checkpoint, part),
        lora=lora,
        trained=_trained(checkpoint, weights, has_lora=bool(ranks)),
    )


def _dimensions(checkpoint: Checkpoint, part: Part) -> dict[str, int]:
    """The sizes that tell one part from another: no rank, no k-or-v, no multiple of another size."""
    model = checkpoint.model
    derived = {model.qualified(*multiple.axis.split(".")) for multiple in model.multiples}
    found: dict[str, int] = {}
    named: set[str] = set()
    for rule in part.rules:
        for axis in rule.equation.left:
            qualified = model.qualified(part.name, axis)
            if qualified in named or qualified in derived or axis in rule.template.choices:
                continue
            if qualified in checkpoint.sizes and axis.isidentifier():
                named.add(qualified)
                found[axis] = checkpoint.sizes[qualified]
    return dict(sorted(found.items()))


def _stored_of(checkpoint: Checkpoint, leaf: str, weight: str) -> list[str]:
    """Names in the source of all arrays a rule covers (its factors aside)."""
    if checkpoint.layout is None:
        return [checkpoint.stored[leaf]] if leaf in checkpoint.stored else []
    forms = {form for form, _ in Template(weight).skeletons()}
    return [stored for name, stored in checkpoint.stored.items() if skeleton(name)[0] in forms]


def _trained(checkpoint: Checkpoint, weights: Counter[str], *, has_lora: bool) -> str:
    """openpi stores what a LoRA run freezes in bfloat16 and what it trains in float32."""
    if checkpoint.modules:
        return "LoRA" if has_lora else "not in the adapter"
    if checkpoint.layout is not None:
        return "not told by PyTorch files"
    if not any(checkpoint.lora_rules()):
        return "not told, no LoRA run"
    everywhere = {spec.dtype.name for spec in checkpoint.source.specs.values()}
    if len(everywhere & WEIGHT_DTYPES.keys()) < 2:
        return "LoRA; else not told, all one dtype" if has_lora else "not told, all one dtype"
    if set(weights) == {"float32"}:
        return "in full"
    return "LoRA" if has_lora else "frozen"
