"""Which model an adapter is of: by its names, by what lies beside it, and by its base.

Models share module names, so names alone often fit several; what still does after all three is
left open and named, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.identity import recorded
from bridge.checkpoint.match import Place, place_weights
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.formats.safetensors.peft import FILE
from bridge.formats.safetensors.torch import CONFIG
from bridge.peft.config import PREFIX
from bridge.publish.record import RECORD, read_record
from bridge.rules.family import Family, families
from bridge.rules.model import Layout, Model
from bridge.rules.names import Names, grouped

OTHER_BASE = "give the base that the adapter was trained on with --base"


@dataclass(frozen=True)
class Match:
    """A model and layout that have an adapter's modules, and what each of its weights is there."""

    family: Family
    model: Model
    layout: Layout
    places: Mapping[str, Place]
    spare: Set[str]
    """Those of its weights that the runtime never uses."""


def possible_models(
    source: Source, names: Mapping[str, str], base: Checkpoint | None
) -> tuple[list[Match], list[Problem]]:
    """The models that an adapter may be of, the likeliest first.

    Args:
        source: the adapter.
        names: its tensors -> the weight that each changes or replaces.
        base: what it applies to, if that is known.

    Returns:
        Those that have most of its modules, and what contradicts them: another model named beside
        the adapter, or a base of another model.
    """
    weights = Names.of(names.values())
    # stored whole and not factored as well
    whole = {weight for name, weight in names.items() if name == PREFIX + weight}
    whole -= {weight for name, weight in names.items() if name != PREFIX + weight}
    matches = [
        Match(
            family,
            model,
            layout,
            _places(model, layout, weights, whole),
            model.spare(layout).keys() & weights.apart.keys(),
        )
        for family in families()
        for model in family.models
        for layout in model.layouts
    ]
    matches = [match for match in matches if match.places or match.spare]
    most = max((len(match.places) for match in matches), default=0)
    best = [match for match in matches if len(match.places) == most]
    # what a runtime never uses tells layouts apart, and is no reason to prefer a model
    best.sort(key=lambda match: -len(match.spare))
    if not best:
        return [], []
    named, origin = _named_beside(source)
    problems = []
    if named in model_names(best):
        best = [match for match in best if match.model.name == named]
    elif named:
        cause = f"{source.root / origin} says {named}, but the modules are those of {_either(best)}"
        problems.append(Problem(cause, "put back the file that was saved with the adapter"))
    if base is None:
        return best, problems
    known = base.model.name
    same = [match for match in best if match.model.name == known]
    if not same and not problems:
        strangers = grouped(
            name
            for name in dict.fromkeys(names.values())
            if not any(name in match.places for match in matches if match.model.name == known)
        )
        why = f"{known} has no {strangers[0]}" if strangers else f"{origin} says so"
        cause = f"{source.location} is an adapter of {_either(best)} ({why}), but {base.source.location} is {known}"
        problems.append(Problem(cause, OTHER_BASE))
    # of models of one name, the base's own
    same.sort(key=lambda match: match.model.rules_key != base.model.rules_key)
    return same or best, problems


def _places(model: Model, layout: Layout, weights: Names, whole: Set[str]) -> dict[str, Place]:
    """What an adapter's weights stand for, without those that the runtime never uses.

    Args:
        model: the model.
        layout: whose names they are.
        weights: all of them.
        whole: those without factors.
    """
    places = place_weights(model, layout, weights)
    for name in model.spare(layout):
        places.pop(name, None)
    # of a weight that is known by another name as well, the whole may be there under the name that is used
    for alias in model.applied & model.tied.keys():
        name, known = layout.rename(alias), layout.rename(model.tied[alias])
        if name in whole and name != known:
            places[name] = place_weights(model, layout, Names.of([known]))[known]
    return places


def model_names(matches: Sequence[Match]) -> tuple[str, ...]:
    """Names of the models, each once."""
    return tuple(dict.fromkeys(match.model.name for match in matches))


def _either(matches: Sequence[Match]) -> str:
    return " or ".join(model_names(matches))


def _named_beside(source: Source) -> tuple[str, str]:
    """The model that a file beside the adapter names, and that file; both empty where none does."""
    installed = {model.name for family in families() for model in family.models}
    fingerprint = recorded(source)
    if fingerprint is not None and fingerprint.model in installed:
        return fingerprint.model, FILE
    told = read_record(source.root).get("model")
    if isinstance(told, str) and told in installed:
        return told, RECORD
    config = source.metadata.get(CONFIG)
    for family in families():
        if family.known_model is not None and isinstance(config, Mapping):
            name = family.known_model(config)
            if name is not None:
                return name, CONFIG
    return "", ""
