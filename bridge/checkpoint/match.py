"""Which model a list of names is: the declared one whose rules fit them best.

There is nothing to detect by hand: every model's table says which names it must have. The best
fit is right when nothing is missing and nothing is left over; otherwise it says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bridge.plugins import adapters
from bridge.rules.model import Adapter, Layout, Model, Part
from bridge.rules.names import grouped, skeleton
from bridge.rules.rule import Rule


@dataclass(frozen=True)
class Fit:
    """A model laid over a list of names."""

    adapter: Adapter
    model: Model
    layout: Layout | None
    """For PyTorch names, the layout they have; None for leaves."""
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def errors(self) -> int:
        return len(self.missing) + len(self.extra)


@dataclass(frozen=True)
class Place:
    """What a PyTorch name stands for: a weight of a rule at an index."""

    part: Part
    rule: Rule
    at: Mapping[str, int]


def fit_leaves(leaves: Iterable[str]) -> Fit | None:
    """The model whose rules fit the leaf paths best, or None when none fits half of them."""
    names = set(leaves)
    fits = []
    for adapter in adapters():
        for model in adapter.models:
            required = {rule.leaf for rule in model.rules}
            optional = {leaf for rule in model.rules for leaf in rule.factor_leaves or ()} | set(
                model.ignored
            )
            fits.append(
                Fit(
                    adapter,
                    model,
                    None,
                    tuple(sorted(required - names)),
                    tuple(sorted(names - required - optional)),
                )
            )
    return _best(fits, len(names))


def fit_weights(weights: Iterable[str]) -> list[Fit]:
    """The models, in their layouts, whose rules fit the PyTorch names best: several where names do not tell."""
    names = tuple(weights)
    keys = [(name, skeleton(name)[0]) for name in names]
    fits = []
    for adapter in adapters():
        for model in adapter.models:
            for layout in model.layouts:
                places = _places(model, layout)
                optional = {skeleton(name)[0] for name in optional_weights(model, layout)}
                known = {key for _, key in keys}
                # a tied weight may be stored under either of its names
                known |= {
                    skeleton(layout.rename(of))[0]
                    for alias, of in model.tied.items()
                    if skeleton(layout.rename(alias))[0] in known
                }
                fits.append(
                    Fit(
                        adapter,
                        model,
                        layout,
                        tuple(
                            layout.rename(place[1].weight)
                            for key, place in places.items()
                            if key not in known
                        ),
                        tuple(
                            grouped(name for name, key in keys if key not in places and key not in optional)
                        ),
                    )
                )
    best = _best(fits, len({key for _, key in keys}))
    return (
        []
        if best is None
        else [fit for fit in fits if fit.errors == best.errors and fit.layout == best.layout]
    )


def place_weights(model: Model, layout: Layout, names: Iterable[str]) -> dict[str, Place]:
    """What each PyTorch name stands for; names that no rule has are left out."""
    places = _places(model, layout)
    found = {}
    for name in names:
        key, numbers = skeleton(name)
        if key in places:
            part, rule, chosen = places[key]
            found[name] = Place(
                part, rule, {**chosen, **dict(zip(rule.template.numbered, numbers, strict=True))}
            )
    return found


def optional_weights(model: Model, layout: Layout) -> dict[str, str]:
    """Names that may be there and are read by no rule -> why."""
    aliases = {
        layout.rename(alias): f"the same tensor as {layout.rename(of)}" for alias, of in model.tied.items()
    }
    return aliases | {layout.rename(unused.weight): unused.reason for unused in model.unused}


def _places(model: Model, layout: Layout) -> dict[tuple[str | None, ...], tuple[Part, Rule, dict[str, int]]]:
    places = {}
    for part in model.parts:
        for rule in part.rules:
            for _, chosen in rule.template.skeletons():
                at = {**dict.fromkeys(rule.template.numbered, 0), **chosen}
                places[skeleton(layout.rename(rule.template.format(at)))[0]] = (part, rule, chosen)
    return places


def _best(fits: list[Fit], count: int) -> Fit | None:
    best = min(fits, key=lambda fit: fit.errors, default=None)
    return best if best is not None and len(best.extra) * 2 <= count and count else None
