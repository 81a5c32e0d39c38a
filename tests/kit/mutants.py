"""Mistakes planted in bridge itself, for as long as a test runs."""

import dataclasses
import re
from collections.abc import Callable

import pytest

import bridge
from bridge.rules.family import families

Plant = Callable[[pytest.MonkeyPatch], None]


def in_rules(change: Callable[[bridge.Rule], bridge.Rule]) -> Plant:
    """A mistake in the tables of rules."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def altered(family: bridge.Family) -> bridge.Family:
            models = tuple(
                dataclasses.replace(
                    model,
                    parts=tuple(
                        dataclasses.replace(part, rules=tuple(map(change, part.rules)))
                        for part in model.parts
                    ),
                )
                for model in family.models
            )
            return dataclasses.replace(family, models=models)

        known = families()
        mutants = tuple(map(altered, known))
        assert mutants != known, "nothing was planted"
        for reader in ("match", "adapter_model"):
            patch.setattr(f"bridge.checkpoint.{reader}.families", lambda: mutants)

    return plant


def in_axes(leaf: str, axes: str) -> Plant:
    """Another axis equation for the leaves that match `leaf`."""
    return in_rules(lambda rule: dataclasses.replace(rule, axes=axes) if re.search(leaf, rule.leaf) else rule)
