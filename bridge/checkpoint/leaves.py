"""The two ways openpi lays out a ``params`` pytree, and the leaf paths common to both.

Training saves ``params/<leaf>/value`` (``value`` comes from flax ``nnx.State``), releases are
``params/<leaf>`` (openpi, models/model.py, ``restore_params``). Rules speak of ``<leaf>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bridge.errors import Problem

ROOT = "params/"
SUFFIX = "/value"


@dataclass(frozen=True)
class Tree:
    """Leaf path -> stored name, and which of the two layouts it is."""

    stored: Mapping[str, str]
    value_suffix: bool


def read_tree(names: Iterable[str]) -> tuple[Tree, list[Problem]]:
    """Take the common leaf paths out of the stored names of a pytree."""
    stored: dict[str, str] = {}
    problems = []
    for name in names:
        other = stored.setdefault(name.removeprefix(ROOT), name)
        if other != name:
            problems.append(
                Problem(
                    f"{other} and {name} are one leaf to openpi", "two trees were mixed: remove one of them"
                )
            )
    suffixed = [leaf for leaf in stored if leaf.endswith(SUFFIX)]
    if suffixed and len(suffixed) < len(stored):
        bare = next(leaf for leaf in stored if not leaf.endswith(SUFFIX))
        problems.append(
            Problem(
                f"{len(suffixed)} leaves end in 'value' and {len(stored) - len(suffixed)} do not (first: {bare})",
                "two checkpoints were mixed: openpi writes the suffix on all leaves or on none",
            )
        )
    return Tree({leaf.removesuffix(SUFFIX): name for leaf, name in stored.items()}, bool(suffixed)), problems
