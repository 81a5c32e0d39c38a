"""Which of several sets of weights to read: an item of a checkpoint manager, a part of a training state.

A checkpoint manager writes a directory for each item of a step (orbax, checkpoint_manager.py). What
trainers save as one item may be a training state: weights beside their moving average, an optimizer
and a step (flax, training/train_state.py; openpi, training/utils.py).
"""

from __future__ import annotations

from bridge.checkpoint.directories import steps_in
from bridge.errors import Problem, SourceRefused
from bridge.formats.contract import Source, format_named
from bridge.formats.disk.location import Location, is_safe_path
from bridge.formats.view import View
from bridge.graph import Form

#: sets of weights in a training state -> what they are
SETS = {"params": "the weights as they are trained", "ema_params": "the moving average of the weights"}

#: what tells a training state from a tree of weights, and what else may be in it
_STATE = {"opt_state", "step"}
_BESIDE = _STATE | {"ema_decay", "model_def", "tx", "rng", "apply_fn"}


def item_of(location: Location, item: str | None) -> tuple[Location, str | None, tuple[str, ...]]:
    """The directory of an item below a location, what of the item's name is left, and a note.

    The location itself, where no directory has the name: the item may be inside a file.

    Raises:
        SourceRefused: the name leads out of the location.
    """
    if item is None:
        return location, None, ()
    if not is_safe_path(item):
        raise SourceRefused(
            Problem(f"--item {item} is no name of an item", f"name one of {_listed(location)}")
        )
    first, _, rest = item.partition("/")
    names = location.names()
    # of a run, the newest step that has it
    steps = (location / name for _, name in sorted(steps_in(names), reverse=True))
    home = location if first in names else next((step for step in steps if first in step.names()), None)
    if home is None:
        return location, item, ()
    return home / first, rest or None, (f"using item {first} of {home}, as --item says",)


def training_state(source: Source, item: str | None) -> Source:
    """The weights of a source that may be a training state: those of the item, or the only ones.

    Raises:
        SourceRefused: a training state has several sets of weights, or none, or not the one asked for.
    """
    if format_named(source.format).form is not Form.PYTREE:
        return source  # an item inside a file is found once its names are understood
    tops = {name.partition("/")[0] for name in source.specs}
    sets = [name for name in SETS if name in tops]
    beside = tops - SETS.keys()
    if not (beside & _STATE and beside <= _BESIDE) and len(sets) < 2:
        if item is None:
            return source
        raise SourceRefused(
            Problem(
                f"{source.location} has no item {item}",
                f"leave --item out, or name one of {_listed(source.root)}",
            )
        )
    named = "; ".join(f"{name}: {SETS[name]}" for name in sets)
    if item not in (None, *sets):
        raise SourceRefused(
            Problem(f"{source.location} has no {item} ({named})", f"give --item {_one(source, sets)}")
        )
    if item is None and len(sets) > 1:
        raise SourceRefused(
            Problem(
                f"{source.location} has several sets of weights ({named})",
                f"choose: --item {_one(source, sets)}",
            )
        )
    if not sets:
        raise SourceRefused(
            Problem(
                f"{source.location} is a training state without weights (contains {', '.join(sorted(tops))})",
                f"give the step that has them: {source.root}",
            )
        )
    chosen = item or sets[0]
    names = {name.removeprefix(f"{chosen}/"): name for name in source.specs if name.startswith(f"{chosen}/")}
    unread = ", ".join(sorted(tops - {chosen}))
    return View.of(source, names, f"using {chosen} of a training state: {SETS[chosen]} (not read: {unread})")


def _one(source: Source, sets: list[str]) -> str:
    """How the sets are spelled after ``--item``."""
    inside = "" if source.root == source.location else f"{source.location.name}/"
    return " or ".join(f"{inside}{name}" for name in sets)


def _listed(location: Location) -> str:
    inside = (name for name in location.names() if (location / name).names())
    return ", ".join(inside) or "nothing"
