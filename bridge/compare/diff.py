"""What differs between two checkpoints, in any two formats: how a user sees what a fine-tune trained.

LoRA counts as what it does to a weight: the effective weights are compared, with factors summed
in. Streams both; holds one weight of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge.compare.gaps import gap
from bridge.compare.sides import Both, open_side, same_model, walk
from bridge.lora.spectrum import effective_rank, spectrum
from bridge.proof.checks import values


@dataclass(frozen=True)
class Difference:
    """One weight on both sides."""

    name: str
    part: str
    leaf: str
    index: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    gap: float
    """Norm of b - a."""
    norm: float
    """Norm of a."""
    max_abs: float
    lora: str
    """``""``, or which sides carry factors: ``"a"``, ``"b"``, ``"both"``."""
    spectrum: tuple[float, ...] = ()
    """Singular values of the LoRA product of the side that carries it, largest first."""

    @property
    def relative(self) -> float:
        """Norm of b - a over the norm of a."""
        return self.gap / self.norm if self.norm else float(self.gap > 0)

    @property
    def changed(self) -> bool:
        # not `> 0`: a weight that is not a number differs
        return self.max_abs != 0

    @property
    def effective_rank(self) -> float | None:
        """How many directions the LoRA product uses."""
        return effective_rank(self.spectrum)


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, compared."""

    a: str
    b: str
    model: str
    states: tuple[str, str]
    differences: tuple[Difference, ...]

    @property
    def changed(self) -> tuple[Difference, ...]:
        """The weights that differ, most first."""
        return tuple(sorted((d for d in self.differences if d.changed), key=lambda d: -d.relative))

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "model": self.model,
            "states": list(self.states),
            "weights": len(self.differences),
            "changed": len(self.changed),
            "differences": [
                vars(d) | {"relative": d.relative, "changed": d.changed, "effective_rank": d.effective_rank}
                for d in self.differences
            ],
        }


def diff(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    lora_alpha: Mapping[str, float] | None = None,
    rslora: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the effective weights of two checkpoints.

    Args:
        a: a checkpoint, the one differences are relative to.
        b: another of the same model.
        base: what an adapter among the two applies to.
        lora_alpha: alpha by expert, where LoRA of other than stock ranks is among the two.
        rslora: the run used rank-stabilised LoRA.
        workers: leaves compared at once; the numbers do not depend on it.
        progress: called with the bytes dealt with, and their total.

    Raises:
        Refusal: one of them cannot be read, or they are of different models or dimensions.
    """
    from bridge.proof.verify import alphas_for

    alphas, root = alphas_for((b, a), lora_alpha, rslora)
    sides = open_side(a, base, alphas, root), open_side(b, base, alphas, root)
    model = same_model(*sides)
    found: dict[str, Difference] = {}
    for one in walk(*sides, _difference, workers=workers, progress=progress).looks:
        before = found.get(one.name)
        found[one.name] = one if before is None else _together(before, one)
    return Comparison(
        str(sides[0].checkpoint.source.location),
        str(sides[1].checkpoint.source.location),
        model.name,
        (str(sides[0].checkpoint.state), str(sides[1].checkpoint.state)),
        tuple(found.values()),
    )


def _difference(both: Both) -> Difference:
    found = gap(values(both, both.a), values(both, both.b))
    held = both.b if both.b.has_factors else both.a
    carries = (both.a.has_factors, both.b.has_factors)
    return Difference(
        both.name,
        both.part.name,
        both.rule.leaf,
        both.index,
        both.a.w.dtype.name,
        both.b.w.dtype.name,
        math.sqrt(found.squares),
        math.sqrt(found.norm),
        found.largest,
        {(True, True): "both", (True, False): "a", (False, True): "b"}.get(carries, ""),
        spectrum(both.rule.equation.one, held),
    )


def _together(a: Difference, b: Difference) -> Difference:
    """Two runs of rows of one weight."""
    return replace(
        a, gap=math.hypot(a.gap, b.gap), norm=math.hypot(a.norm, b.norm), max_abs=max(a.max_abs, b.max_abs)
    )
