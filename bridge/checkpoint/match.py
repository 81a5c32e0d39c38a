"""Which model a list of names is: the declared model whose rules fit them best.

There is nothing to detect by hand: every model's table says which names it must have. The best
fit is right when nothing is missing and nothing is left over; otherwise it says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bridge.checkpoint.tree import Leaves, read_tree
from bridge.rules.family import Family, families
from bridge.rules.model import Layout, Model, Part
from bridge.rules.names import NameIndex, Names, Template, grouped, skeleton
from bridge.rules.rule import Rule


class Place(NamedTuple):
    """What a name stands for: a leaf or a weight of a rule at an index."""

    part: Part
    rule: Rule
    at: Mapping[str, int]

    @property
    def weight(self) -> str:
        """The weight's name in the rules."""
        return self.rule.template.format(self.at)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model laid over a list of names."""

    family: Family
    model: Model
    layout: Layout
    """That of the names, for PyTorch names; the model's first for leaves."""
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    leaves: Leaves = field(default_factory=lambda: Leaves({}, False, ()))
    """For leaves: where each is stored."""

    @property
    def names(self) -> Iterator[str]:
        """Those of the model, in the form that was fitted; placeholders are left open."""
        return (
            rule.leaf if self.leaves.stored else self.layout.rename(rule.weight) for rule in self.model.rules
        )

    @property
    def errors(self) -> int:
        return len(self.missing) + len(self.extra)


def fit_leaves(names: Iterable[str]) -> Fit | None:
    """The model whose rules fit the stored names of a pytree best, or None when none fits half of them."""
    stored = tuple(names)
    fits = []
    for family in families():
        leaves = read_tree(stored, family)
        for model in family.models:
            index = leaf_index(model)
            factors = NameIndex(
                {Template(path, "/"): None for rule in model.rules for path in rule.factor_leaves or ()}, "/"
            )
            required = {rule.leaf: rule.path for rule in model.rules}
            extra = []
            for leaf in leaves.stored:
                place = index.find(leaf)
                if place is not None:
                    required.pop(place[0][1].leaf, None)
                elif factors.find(leaf) is None and leaf not in model.ignored:
                    extra.append(leaf)
            fits.append(
                Fit(
                    family=family,
                    model=model,
                    layout=model.layouts[0],
                    missing=tuple(
                        sorted(pattern for path in required.values() for _, pattern in path.patterns())
                    ),
                    extra=tuple(grouped(sorted(extra))),
                    leaves=leaves,
                )
            )
    return _best(fits, len(stored))


def leaf_index(model: Model) -> NameIndex[tuple[Part, Rule]]:
    """What the path of a leaf stands for."""
    return NameIndex({rule.path: (part, rule) for part in model.parts for rule in part.rules}, "/")


def fit_weights(names: Names) -> list[Fit]:
    """The models, in their layouts, whose rules fit the PyTorch names best: several where names do not tell."""
    fits: list[Fit] = []
    strangers: dict[frozenset[str], tuple[str, ...]] = {}
    for family in families():
        for model in family.models:
            for layout in model.layouts:
                index = model.index(layout)
                forms, known = index.forms_of(names)
                optional = {skeleton(name)[0] for name in model.optional(layout)}
                if not forms and optional.isdisjoint(names.kinds):
                    continue  # another model's names altogether
                # a tied weight may be stored under either of its names
                aliases = {
                    index.form_of(layout.rename(of))
                    for alias, of in model.tied.items()
                    if skeleton(layout.rename(alias))[0] in names.kinds
                }
                extra = frozenset(
                    name
                    for name, (kind, _) in names.apart.items()
                    if not known(name) and kind not in optional and not layout.is_fact(name)
                )
                if extra not in strangers:  # to models with the same names
                    strangers[extra] = tuple(grouped(name for name in names.apart if name in extra))
                fits.append(
                    Fit(
                        family=family,
                        model=model,
                        layout=layout,
                        missing=tuple(
                            pattern
                            for template in index.templates
                            for form, pattern in template.patterns()
                            if form not in forms and form not in aliases
                        ),
                        extra=strangers[extra],
                    )
                )
    best = _best(fits, len(names.kinds))
    if best is None:
        return []
    return [fit for fit in fits if fit.errors == best.errors and fit.layout == best.layout]


def known_weights(fits: Iterable[Fit]) -> Callable[[str], bool]:
    """Whether a PyTorch name stands for something in any of the models."""
    indexes = [fit.model.index(fit.layout) for fit in fits]
    optional = {skeleton(name)[0] for fit in fits for name in fit.model.optional(fit.layout)}

    def known(name: str) -> bool:
        return skeleton(name)[0] in optional or any(index.form_of(name) is not None for index in indexes)

    return known


def place_weights(model: Model, layout: Layout, names: Names) -> dict[str, Place]:
    """What each PyTorch name stands for; names that no rule has are left out."""
    found = model.index(layout).find_all(names)
    return {name: Place(part, rule, at) for name, ((part, rule), at) in found.items()}


def _best(fits: list[Fit], count: int) -> Fit | None:
    best = min(fits, key=lambda fit: fit.errors, default=None)
    if best is None or not count or len(best.extra) * 2 > count:
        return None
    # one that lost names, or has more, is that model still; one of which most is otherwise is another
    other = best.missing and best.extra and best.errors > count - len(best.extra)
    return None if other else best
