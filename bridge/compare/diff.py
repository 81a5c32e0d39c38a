"""What differs between two checkpoints, in any two formats: how a user sees what a fine-tune trained.

LoRA counts as what it does to a weight: the effective weights are compared, with factors summed
in. Streams both; has one weight of each in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from bridge.checkpoint.options import SourceOptions
from bridge.compare.gaps import gap, values
from bridge.compare.shared import shared
from bridge.compare.sides import WeightPair, open_sides, same_model, walk
from bridge.lora.algebra import effective_rank
from bridge.rules.option import complete
from bridge.stream.workers import Progress


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints, compared."""

    a: str
    b: str
    model: str
    states: tuple[str, str]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

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
            "notes": list(self.notes),
            "differences": [
                vars(d) | {"relative": d.relative, "changed": d.changed, "effective_rank": d.effective_rank}
                for d in self.differences
            ],
        }


def diff(
    a: str | Path,
    b: str | Path,
    *,
    progress: Progress | None = None,
    **options: Unpack[SourceOptions],
) -> Comparison:
    """Compare the effective weights of two checkpoints, in any two formats: LoRA factors are summed in.

    Args:
        a (`str` or `Path`): a checkpoint; differences are relative to it.
        b (`str` or `Path`): another one of the same model and dimensions.
        progress (`Callable[[int, int], None]`, *optional*): called with the bytes of weights compared, and
            their total.
        **options: the fields of :class:`bridge.SourceOptions`. An adapter among the two needs
            ``base``, where it does not lie beside it; alphas
            that are not given are read from the ``bridge.json`` of ``b`` or ``a``.

    Returns:
        `Comparison`: a :class:`Difference` for each weight, and those that differ in
        :attr:`Comparison.changed`, the most changed first.

    Raises:
        Refusal: one of them cannot be read, or they are of different models or dimensions.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> result = bridge.convert(sample, "base", to="torch-base")
        >>> comparison = bridge.diff("base", sample, lora_alpha=8)
        >>> len(comparison.differences), len(comparison.changed)
        (106, 42)
        >>> comparison.changed[0].lora
        'b'
    """
    options = complete(SourceOptions, options)
    first, second, _ = shared(*open_sides(a, b, options))
    sides = first, second
    model = same_model(*sides)
    merged: dict[str, Difference] = {}
    for each in walk(*sides, _difference, workers=options["workers"], progress=progress).results:
        before = merged.get(each.name)
        merged[each.name] = each if before is None else _together(before, each)
    return Comparison(
        a=str(sides[0].checkpoint.source.location),
        b=str(sides[1].checkpoint.source.location),
        model=model.name,
        states=(str(sides[0].checkpoint.state), str(sides[1].checkpoint.state)),
        differences=tuple(merged.values()),
        notes=tuple(dict.fromkeys(note for side in sides for note in side.notes)),
    )


def _difference(pair: WeightPair) -> Difference:
    equation = pair.rule.equation.of_weight
    changes = pair.a.matrices, pair.b.matrices
    measured = gap(values(equation, pair.a.w, changes[0]), values(equation, pair.b.w, changes[1]))
    carries = "".join(side for side, change in zip("ab", changes, strict=True) if change is not None)
    return Difference(
        name=pair.name,
        part=pair.part.name,
        leaf=pair.rule.leaf,
        index=pair.index,
        dtype_a=pair.a.w.dtype.name,
        dtype_b=pair.b.w.dtype.name,
        gap=math.sqrt(measured.squares),
        norm=math.sqrt(measured.norm),
        max_abs=measured.largest,
        lora="both" if carries == "ab" else carries,
        spectrum=carrying.spectrum if (carrying := changes[1] or changes[0]) else (),
    )


def _together(a: Difference, b: Difference) -> Difference:
    """Two runs of rows of one weight."""
    return replace(
        a, gap=math.hypot(a.gap, b.gap), norm=math.hypot(a.norm, b.norm), max_abs=max(a.max_abs, b.max_abs)
    )
