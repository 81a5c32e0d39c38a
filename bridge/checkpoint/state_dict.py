"""A state_dict as a trainer left it: a model's names behind wrappers, its LoRA in it, or other arrays beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.kinds import AdapterCheckpoint, WeightsCheckpoint
from bridge.checkpoint.leave_out import NOTHING, LeftOut, without
from bridge.checkpoint.match import Fit, fit_weights, known_weights, place_weights
from bridge.checkpoint.opening import BARE, Opening
from bridge.checkpoint.peft_set import understand_adapter
from bridge.checkpoint.scales import alpha_problems
from bridge.checkpoint.trainers import (
    FACTOR,
    Whole,
    adapter_names,
    common_prefixes,
    take_apart,
    unwrapped,
    without_prefix,
)
from bridge.checkpoint.weights import understand_weights
from bridge.display import counted
from bridge.errors import CheckpointRefused, Problem, SourceRefused
from bridge.formats.contract import Source
from bridge.formats.safetensors.peft import CONFIG, FILE, FORMAT, MAX_CONFIG
from bridge.formats.view import View
from bridge.peft.config import PREFIX, A, B, compose_config, module_of, targets_of
from bridge.rules.names import Names, Template
from bridge.strict_json import parse_object

#: what a whole model with LoRA consists of, for ``--item``
BASE, ADAPTER = "base", "adapter"


def understand_state_dict(source: Source, opening: Opening = BARE) -> Checkpoint:
    """Work out which model a state_dict is of.

    Returns:
        The weights; where LoRA factors are among them, the adapter with its base.

    Raises:
        CheckpointRefused: no family's model fits even half of its weights, or an array may not be left out.
    """
    source = unwrapped(source)
    source, left_out = _left_out(source, opening)
    whole = take_apart(source)
    if whole is None:
        _refuse_lost_adapter(source)
        weights, _ = _weights(source, opening)
        return replace(weights, left_out=left_out | weights.left_out)
    base, prefix = _weights(View.of(source, whole.weights), opening)
    base = replace(base, left_out=left_out | base.left_out)
    if opening.item == BASE:
        return replace(base, source=_noted(base.source, f"the base of {_counted(whole)}, as --item says"))
    if opening.item not in (None, ADAPTER):
        raise _no_item(source, opening)
    return _adapter(source, whole, prefix, base, opening)


def understand_peft(source: Source, opening: Opening = BARE) -> AdapterCheckpoint:
    """Work out which weights an adapter belongs to, as :func:`understand_adapter`, behind wrappers too."""
    source = adapter_names(unwrapped(source))

    def known(name: str) -> str:
        return "is LoRA, which an adapter is made of" if FACTOR.fullmatch(name) else ""

    source, left_out = without(source, opening.leave_out, known)
    return replace(understand_adapter(source), left_out=left_out)


def _weights(source: Source, opening: Opening) -> tuple[WeightsCheckpoint, str]:
    """Weights without the prefix that all their names share, where a model fits them better then, and the prefix."""
    names = Names.of(source.specs)
    fits, chosen = fit_weights(names), ""
    if _errors(fits):
        for prefix in common_prefixes(source.specs):
            other = fit_weights(names.without(prefix))
            if _errors(other) < _errors(fits):
                fits, chosen = other, prefix
    plain = without_prefix(source, chosen) if chosen else source
    kept, left_out = _left_out(plain, opening)
    weights = understand_weights(kept, opening, None if left_out.arrays else fits)
    return replace(weights, left_out=left_out), chosen


def _errors(fits: list[Fit]) -> float:
    return min((fit.errors for fit in fits), default=float("inf"))


def _left_out(source: Source, opening: Opening) -> tuple[Source, LeftOut]:
    """A source without what the user leaves out, by the names it has now."""
    if not opening.leave_out:
        return source, NOTHING
    fits = fit_weights(Names.of(source.specs))
    in_model = known_weights(fits)

    def known(name: str) -> str:
        if FACTOR.fullmatch(name):
            return f"is LoRA: --item {BASE} reads the model without it"
        if any(fit.layout.is_fact(name) for fit in fits):
            return "is a fact that the model needs to run"
        return f"{fits[0].model.name} has" if in_model(name) else ""

    return without(source, opening.leave_out, known)


def _adapter(
    source: Source, whole: Whole, prefix: str, base: WeightsCheckpoint, opening: Opening
) -> AdapterCheckpoint:
    """The adapter of a whole model, with its base."""
    named: dict[str, str] = {}
    for module, pair in whole.factors.items():
        for which, ending in (("a", A), ("b", B)):
            if which in pair:
                named[f"{PREFIX}{module.removeprefix(prefix)}{ending}"] = pair[which]
    named |= {PREFIX + name.removeprefix(prefix): stored for name, stored in whole.saved.items()}
    config, problems = _config_beside(source), list[Problem]()
    told = config is None
    if config is None:
        ranks = {module: _rank(source, pair) for module, pair in whole.factors.items()}
        ranks = {module.removeprefix(prefix): rank for module, rank in ranks.items()}
        saved = dict.fromkeys(module_of(name.removeprefix(prefix)) for name in whole.saved)
        config, problems = _config(ranks, saved, base, opening)
    view = View.of(
        source,
        named,
        *base.source.notes[len(source.notes) :],
        f"{_counted(whole)}: a base and its adapter in one file (--item {BASE} or --item {ADAPTER} takes one)",
        format=FORMAT.name,
        metadata={CONFIG: config},
    )
    adapter = understand_adapter(view, base)
    return replace(
        adapter,
        problems=(*problems, *adapter.problems),
        left_out=base.left_out,
        own_base=None if opening.item == ADAPTER else base,
        # those in PEFT's own file are the run's; the user's are what the JAX runtime shall have then
        alphas_given=told,
    )


def _rank(source: Source, pair: Mapping[str, str]) -> int:
    shape = source.specs[pair["a"]].shape if "a" in pair else ()
    return shape[0] if shape else 0


def _config(
    ranks: Mapping[str, int], saved: Iterable[str], base: WeightsCheckpoint, opening: Opening
) -> tuple[dict[str, Any], list[Problem]]:
    """The config that an adapter was saved without: ranks are in its shapes, alphas are the user's.

    Args:
        ranks: by module.
        saved: modules that are replaced whole.
        base: what tells the part of a module.
        opening: has the alphas.
    """
    alphas, where = opening.alphas, base.source.location
    places = place_weights(base.model, base.layout, Names.of(f"{module}.weight" for module in ranks))
    parts: dict[str, list[int]] = {}
    modules = []
    for module, rank in ranks.items():
        place = places.get(f"{module}.weight")
        if place is None:
            continue  # its weight is refused, as none of the model's
        parts.setdefault(place.part.name, []).append(rank)
        alpha = alphas.get(place.part.name, alphas.get(""))
        template = Template(base.layout.rename(place.rule.weight))
        modules.append((template, place.at, rank, float(rank if alpha is None else alpha)))
    problems = [
        Problem(
            f"{where}: {part} has LoRA of rank {'/'.join(map(str, dict.fromkeys(of_part)))}, and no file tells "
            "its alpha",
            f"add --lora-alpha {part}=ALPHA, as the run was configured, or put its {CONFIG} beside the file",
        )
        for part, of_part in parts.items()
        if part not in alphas and "" not in alphas
    ]
    problems += [
        Problem(
            f"{where}: --lora-alpha names {name}, which has no LoRA in it", f"name one of {', '.join(parts)}"
        )
        for name in alphas
        if name and name not in parts
    ]
    problems += alpha_problems(alphas)
    if not modules:
        return {"peft_type": "LORA", "target_modules": []}, problems
    return compose_config(targets_of(modules), "", saved) | {"use_rslora": opening.rslora}, problems


def _config_beside(source: Source) -> dict[str, Any] | None:
    """The adapter's config beside a whole model, if there is one."""
    path = source.root / CONFIG
    text = path.read_bytes(MAX_CONFIG)
    if text is None:
        return None
    try:
        return parse_object(text)
    except ValueError as error:
        raise SourceRefused(Problem(f"{path} is damaged: {error}", "copy the file again")) from error


def _refuse_lost_adapter(source: Source) -> None:
    """Refuse a directory with the config of an adapter and no adapter: its base alone is another model."""
    if source.location == source.root and (source.root / CONFIG).is_file():
        raise SourceRefused(
            Problem(
                f"{source.root} has {CONFIG}, but no LoRA factors: neither in {FILE} nor among the weights",
                "copy the adapter again; for the weights without it, give their file itself",
            )
        )


def _counted(whole: Whole) -> str:
    return f"{counted(len(whole.weights), 'weight')} and the LoRA factors of {counted(len(whole.factors), 'module')}"


def _noted(source: Source, note: str) -> Source:
    return View.of(source, {name: name for name in source.specs}, note)


def _no_item(source: Source, opening: Opening) -> CheckpointRefused:
    return CheckpointRefused(
        Problem(
            f"{source.location} has no item {opening.item}",
            f"it is a base and its adapter in one file: leave --item out for both, or give {BASE} or {ADAPTER}",
        )
    )
