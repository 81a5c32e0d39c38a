"""Norm stats: what a policy's states and actions are shifted and scaled by. openpi, shared/normalize.py.

One internal form, float64 vectors by feature and statistic, with openpi's names. The file is
``assets/<asset_id>/norm_stats.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from bridge import Problem

NormStats: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]
"""Feature (``state``, ``actions``) -> statistic -> one number per dimension, float64."""

FEATURES = ("state", "actions")
#: those that openpi's class requires, and those that it may have
REQUIRED = ("mean", "std")
QUANTILES = ("q01", "q99")

#: how values are normalised -> the statistics that takes
METHODS = {"mean and std": REQUIRED, "quantiles": QUANTILES}

FIX = "compute it again with openpi's compute_norm_stats.py, or give the right file with --norm-stats"


def read(path: str, data: bytes, statistics: tuple[str, ...] = ()) -> NormStats | list[Problem]:
    """What ``norm_stats.json`` says, or everything that is wrong with it.

    Args:
        path: for messages.
        data: the file.
        statistics: what the policy is normalised by, beside what openpi always requires.
    """
    try:
        tree = json.loads(data) if data.strip() else None
    except (ValueError, RecursionError) as error:
        return [Problem(f"{path} is not JSON: {error}", FIX)]
    if tree is None:
        return [Problem(f"{path} is empty", FIX)]
    stats: dict[str, dict[str, np.ndarray]] = {}
    problems: list[Problem] = []
    for key in FEATURES:
        needed = dict.fromkeys((*REQUIRED, *statistics))
        optional = [name for name in QUANTILES if at(tree, "norm_stats", key, name) is not None]
        vectors = {name: at(tree, "norm_stats", key, name) for name in dict.fromkeys((*needed, *optional))}
        lacks = [name for name, values in vectors.items() if not _is_vector(values)]
        if lacks:
            cause = f"norm_stats.{key} of {path} has no list of finite numbers {' and '.join(lacks)}"
            problems.append(Problem(cause, FIX))
            continue
        stats[key] = {name: np.array(values, np.float64) for name, values in vectors.items()}
        problems += length_problems(path, f"norm_stats.{key}", stats[key])
    return problems or stats


def length_problems(path: str, feature: str, vectors: Mapping[str, np.ndarray]) -> list[Problem]:
    """Statistics of one feature that differ in length."""
    if len({vector.shape for vector in vectors.values()}) <= 1:
        return []
    lengths = [f"{len(vector)} {name}" for name, vector in vectors.items()]
    return [Problem(f"{feature} of {path} has {' and '.join(lengths)}", FIX)]


def write(stats: NormStats) -> bytes:
    """The file, as openpi serialises it: a statistic that is not known is null."""
    tree = {
        feature: {
            name: vectors[name].tolist() if name in vectors else None for name in (*REQUIRED, *QUANTILES)
        }
        for feature, vectors in stats.items()
    }
    return json.dumps({"norm_stats": tree}, indent=2).encode()


def encode(stats: NormStats) -> dict[str, Any]:
    """Its JSON form."""
    return {
        feature: {name: vector.tolist() for name, vector in vectors.items()}
        for feature, vectors in stats.items()
    }


def decode(tree: Any) -> NormStats:
    """From its JSON form. Raises ValueError."""
    if not isinstance(tree, dict) or set(tree) != set(FEATURES):
        raise ValueError("it has no state and actions")
    stats: dict[str, dict[str, np.ndarray]] = {}
    for feature, vectors in tree.items():
        if not isinstance(vectors, dict) or not vectors or not all(map(_is_vector, vectors.values())):
            raise ValueError(f"{feature} has no lists of finite numbers")
        stats[feature] = {name: np.array(values, np.float64) for name, values in vectors.items()}
        if len({vector.shape for vector in stats[feature].values()}) > 1:
            raise ValueError(f"{feature} has lists of different lengths")
    return stats


def same(a: NormStats, b: NormStats) -> bool:
    """Whether the statistics that both have are equal in float32, in which every runtime uses them."""
    return next(_differences(a, b), None) is None


def contrast(a: NormStats, b: NormStats) -> tuple[str, str]:
    """The first number in which they differ."""
    return next(_differences(a, b), (show(a), show(b)))


def show(stats: NormStats) -> str:
    """Widths, and the dimensions that never move."""
    shown = [f"{feature} {width(stats, feature)}{_constant(vectors)}" for feature, vectors in stats.items()]
    return ", ".join(shown)


def width(stats: NormStats, feature: str) -> int:
    """Number of dimensions of a feature."""
    return len(next(iter(stats[feature].values())))


def constant(vectors: Mapping[str, np.ndarray]) -> list[int]:
    """Dimensions that never moved when the statistics were taken."""
    still = vectors["std"] == 0 if "std" in vectors else vectors["q01"] == vectors["q99"]
    return [int(dimension) for dimension in np.flatnonzero(still)]


def _constant(vectors: Mapping[str, np.ndarray]) -> str:
    still = constant(vectors)
    more = "…" if len(still) > 8 else ""
    return f" (constant: {' '.join(map(str, still[:8]))}{more})" if still else ""


def _differences(a: NormStats, b: NormStats) -> Iterator[tuple[str, str]]:
    for feature in FEATURES:
        ours, theirs = a[feature], b[feature]
        if width(a, feature) != width(b, feature):
            yield f"{width(a, feature)} {feature}", f"{width(b, feature)} {feature}"
            continue
        for name in (each for each in ours if each in theirs):
            left, right = ours[name].astype(np.float32), theirs[name].astype(np.float32)
            for at in np.flatnonzero(left != right)[:1]:
                yield f"{feature} {name}[{at}] {left[at]:.7g}", f"{right[at]:.7g}"


def at(node: Any, *keys: str) -> Any:
    """What lies at a path of keys of nested JSON objects; None where there is nothing."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _is_vector(values: object) -> bool:
    """Whether this is a list of numbers that float32 can hold; JSON as Python reads it has NaN too."""
    largest = float(np.finfo(np.float32).max)
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(type(value) in (int, float) and abs(value) <= largest for value in values)
    )
