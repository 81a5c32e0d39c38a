"""The paths of a pytree's leaves, as the rules name them, behind what a runtime puts around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bridge.errors import Problem
from bridge.rules.family import Family


@dataclass(frozen=True)
class Leaves:
    """Leaf path -> stored name, whether paths end in the tree's suffix, and what is wrong with them."""

    stored: Mapping[str, str]
    suffixed: bool
    problems: tuple[Problem, ...]


def read_tree(names: Iterable[str], family: Family) -> Leaves:
    """Take the paths that a family's rules speak of out of the stored names of a pytree."""
    root, suffix = family.tree.root, family.tree.suffix
    stored: dict[str, str] = {}
    problems = []
    for name in names:
        other = stored.setdefault(name.removeprefix(root), name)
        if other != name:
            problems.append(
                Problem(
                    f"{other} and {name} are the same leaf in {family.runtime}",
                    "two trees were mixed: convert a copy that has only the right one",
                )
            )
    suffixed = [leaf for leaf in stored if suffix and leaf.endswith(suffix)]
    if suffixed and len(suffixed) < len(stored):
        bare = next(leaf for leaf in stored if not leaf.endswith(suffix))
        problems.append(
            Problem(
                f"{len(suffixed)} leaves end in {suffix.lstrip('/')!r} and {len(stored) - len(suffixed)} do not "
                f"(first: {bare})",
                f"two checkpoints were mixed: {family.runtime} writes the suffix on all leaves or on none",
            )
        )
    bare_names = {leaf.removesuffix(suffix) if suffix else leaf: name for leaf, name in stored.items()}
    return Leaves(bare_names, bool(suffixed), tuple(problems))
