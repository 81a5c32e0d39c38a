"""Axes that a family's option cuts or pads: what becomes of the model, and what speaks against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bridge.checkpoint.assets import Assets
from bridge.checkpoint.inputs import Inputs
from bridge.conversion.options import Options
from bridge.errors import Problem
from bridge.rules.family import Resize
from bridge.rules.names import grouped
from bridge.rules.option import flag


def _chosen(inputs: Inputs, options: Options) -> Iterator[tuple[str, Resize, str, int]]:
    """Options given that resize an axis: keyword, declaration, the axis's canonical name, length."""
    for keyword, resize in inputs.weights.family.resizes.items():
        if keyword in options["settings"]:
            axis = inputs.model.canonical.get(resize.axis, resize.axis)
            yield keyword, resize, axis, options["settings"][keyword]


def resized(inputs: Inputs, options: Options) -> Inputs:
    """The same, with the axes resized that options say so of."""
    changed = {
        axis: length
        for _, _, axis, length in _chosen(inputs, options)
        if inputs.weights.sizes.get(axis, length) != length
    }
    return replace(inputs, resized=changed, seed=options["seed"])


def cut_problems(inputs: Inputs, options: Options, assets: Assets) -> list[Problem]:
    """Axes that would lose entries which are in use."""
    problems = []
    for keyword, resize, axis, length in _chosen(inputs, options):
        for what, count in _used(inputs, resize, assets).items():
            if axis in inputs.cut and count > length:
                problems.append(
                    Problem(
                        f"{flag(keyword)} {length} would cut {axis} below the {count} entries of {what}",
                        f"give {flag(keyword)} at least {count}",
                    )
                )
    return problems


def _used(inputs: Inputs, resize: Resize, assets: Assets) -> dict[str, int]:
    used: dict[str, int] = {}
    for checkpoint in inputs.checkpoints.values():
        config = checkpoint.source.metadata.get("config.json")
        files = assets.files if checkpoint is inputs.source else {}
        used |= resize.used(files, config if isinstance(config, dict) else {})
    return used


def resize_notes(inputs: Inputs, options: Options, assets: Assets) -> list[str]:
    """What is gone and what is new, by weight."""
    notes = []
    for keyword, resize, axis, length in _chosen(inputs, options):
        if axis not in inputs.resized:
            continue
        had = inputs.weights.sizes[axis]
        touched = [
            (bound.rule.start, name)
            for bound in inputs.bound()
            if axis in {inputs.model.qualified(bound.part.name, each) for each in bound.rule.named_axes}
            for name in bound.names.values()
        ]
        if length < had:
            used = _used(inputs, resize, assets)
            beyond = (
                "beyond " + " and ".join(f"the {count} of {what}" for what, count in used.items())
                if used
                else "nothing says how many of them are used"
            )
            notes.append(f"{flag(keyword)}: entries {length} to {had - 1} of {axis} are lost, {beyond}")
            notes += [f"cut: {name}" for name in grouped(name for _, name in touched)]
        else:
            notes.append(
                f"{flag(keyword)}: entries {had} to {length - 1} of {axis} are new and untrained (--seed "
                f"{options['seed']}): train before use"
            )
            for start in dict.fromkeys(start for start, _ in touched):
                names = grouped(name for each, name in touched if each == start)
                notes += [f"padded with {start}: {name}" for name in names]
    return notes
