"""One value of every fact: what the user gives, else the nearest directory that states it, else a default.

Two files of one directory that disagree are refused where the model would change; a base that
disagrees with its adapter is outranked, and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bridge.errors import Problem
from bridge.facts.read import Place
from bridge.formats.disk.stamps import Stamp
from bridge.rules.fact import Damage, Fact, FactKind, FactTable, Reading
from bridge.rules.model import Model, Sizes
from bridge.rules.option import flag


@dataclass(frozen=True, kw_only=True)
class Known:
    """The facts of a model, each with its origin."""

    facts: Mapping[str, Fact] = field(default_factory=dict)
    """By the key of their kind."""
    damaged: tuple[Damage, ...] = ()
    """What cannot be decided."""
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    """What looks wrong about them."""
    layout: str = ""
    """The layout that the kept files belong to."""
    kept: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Files that travel as they are while the layout stays: group -> name -> bytes."""
    leaving: tuple[str, ...] = ()
    """Notes where the layout changes."""
    inexpressible: tuple[Problem, ...] = ()
    """What a change of layout would lose."""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What cannot be decided, once each."""
        return tuple(dict.fromkeys(damage.problem for damage in self.damaged))

    def stated(self, key: str) -> Fact | None:
        """A fact that a file or a flag states."""
        fact = self.facts.get(key)
        return fact if fact is not None and not fact.assumed else None


def resolve(table: FactTable, model: Model, sizes: Sizes, given: Reading, places: Sequence[Place]) -> Known:
    """Decide every fact.

    Args:
        table: of the family.
        model: whose facts they are.
        sizes: of the model.
        given: by the user's options.
        places: the source, then its base: the nearest first.
    """
    damaged = list(given.damaged)
    notes: list[str] = []
    facts: dict[str, Fact] = {}
    for kind in table.kinds:
        chosen = next((fact for fact in given.facts if fact.kind.key == kind.key), None)
        told = chosen is not None
        for place in places:
            stated = list(_stated(place, kind))
            if not told:
                # that of a base does not matter where its adapter states the fact
                damaged += _damages(place, kind) if chosen is None else []
                damaged += _disagreements(place, kind, stated)
            first = next((fact for fact in stated if not fact.assumed), None)
            if first is None:
                continue
            if chosen is None:
                chosen = first
            elif kind.matters and not kind.same(chosen.value, first.value):
                ours, theirs = kind.contrast(chosen.value, first.value)
                notes.append(
                    f"{kind.title}: {ours} ({chosen.origin}) is used, not {theirs} "
                    f"({place.root / first.origin})"
                )
        if chosen is None:
            guesses = (fact for place in places for fact in _stated(place, kind))
            chosen = next(guesses, None)
        if chosen is not None:
            facts[kind.key] = chosen
    facts |= {fact.kind.key: fact for fact in table.complete(model, sizes, facts)}
    facts = {kind.key: facts[kind.key] for kind in table.kinds if kind.key in facts}
    nearest = next((place.own for place in places if place.own.layout), Reading())
    kept: dict[str, Mapping[str, bytes]] = {}
    for place in reversed(places):
        if place.own.layout == nearest.layout:
            kept |= place.own.kept
    return Known(
        facts=facts,
        damaged=tuple(damaged),
        notes=(*given.notes, *notes),
        remarks=tuple(table.remarks(model, sizes, facts)),
        layout=nearest.layout,
        kept=kept,
        leaving=nearest.notes,
        inexpressible=nearest.inexpressible,
        stamps={path: stamp for place in places for path, stamp in place.stamps.items()},
    )


def _stated(place: Place, kind: FactKind) -> Iterator[Fact]:
    """What a directory says of one kind: its files first, its record last."""
    recorded = next((fact for fact in place.recorded.facts if fact.kind.key == kind.key), None)
    for fact in place.own.facts:
        if fact.kind.key == kind.key:
            guessed = recorded is not None and recorded.assumed and kind.same(fact.value, recorded.value)
            # a default that bridge wrote into a file is a default still
            yield recorded if guessed and recorded is not None else fact
    if recorded is not None:
        yield recorded


def _damages(place: Place, kind: FactKind) -> list[Damage]:
    """What keeps a directory from stating a kind."""
    damaged = (*place.own.damaged, *place.recorded.damaged)
    return [damage for damage in damaged if damage.kind.key == kind.key]


def _disagreements(place: Place, kind: FactKind, stated: Sequence[Fact]) -> Iterator[Damage]:
    """Origins of one directory that would make another model of it."""
    sure = [fact for fact in stated if not fact.assumed]
    for other in sure[1:]:
        if kind.matters and not kind.same(sure[0].value, other.value):
            ours, theirs = kind.contrast(sure[0].value, other.value)
            where = f"{ours} in {sure[0].origin}, but {theirs} in {other.origin}"
            fix = (
                f"choose with {flag(kind.flag)}"
                if kind.flag
                else f"convert a copy of it with {sure[0].origin} or {other.origin} alone, whichever is right"
            )
            yield Damage(kind, Problem(f"{place.root}: the {kind.title} is {where}", fix))
