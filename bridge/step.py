"""One unit of work: a leaf with its LoRA factors becomes its weights, streamed.

A step says by itself what it reads and writes; it holds no data, shares nothing with other
steps, and can be pickled, so that any executor can run it. At most one block of the leaf, its
factors and one weight are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from bridge.axes import Index
from bridge.errors import Problem
from bridge.formats import Sink, Source
from bridge.lora import delta, factor_axes
from bridge.rule import Rule
from bridge.specs import FLOAT32, Spec, all_finite, raw

Tick = Callable[[int], None]
"""Called with the number of source bytes (uncompressed) dealt with since the last call."""


@dataclass(frozen=True)
class Piece:
    """What a leaf holds of one weight, in the leaf's own axes (placeholders taken out).

    ``w`` may be a run of rows, starting at ``start``, where the leaf streams by rows.
    """

    index: Index
    start: int
    w: np.ndarray
    a: np.ndarray | None = None
    b: np.ndarray | None = None


@dataclass(frozen=True)
class Leaf:
    """Where a rule's leaf lies in the source, and its factors if they are wanted."""

    w: str
    a: str | None = None
    b: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.w, self.a, self.b) if name is not None)


@dataclass(frozen=True)
class Step:
    """Read ``leaf``, fold its factors if it names any, write ``weights``."""

    rule: Rule
    part: str
    leaf: Leaf
    scale: float
    """Factor of the LoRA product; 1 where the runtime has none."""
    weights: tuple[tuple[Index, tuple[str, ...]], ...]
    """For each index, the names the weight is written under (several where ties are spelled out)."""
    source_spec: Spec
    spec: Spec
    """Of each weight, as written."""
    bytes_read: int
    bytes_written: int
    memory: int
    """Estimated peak, in bytes."""


@dataclass
class Done:
    """What a step found while it ran."""

    read: dict[str, str] = field(default_factory=dict)
    """Checksum of every source array, by name."""
    written: dict[str, str] = field(default_factory=dict)
    """Checksum of every tensor, by name."""
    problems: list[Problem] = field(default_factory=list)


def run_step(step: Step, source: Source, sink: Sink, tick: Tick | None = None) -> Done:
    """Carry out a step. Faulty values are reported in the result; nothing is hidden or mended.

    Raises:
        SourceRefused: the source cannot be read.
    """
    done = Done()
    faults = _Faults(step, source)
    sums = {name: xxhash.xxh3_128() for _, names in step.weights for name in names}
    names_at = dict(step.weights)
    for piece in _pieces(step, source, done, tick):
        faults.look_for_non_finite(piece)
        w = _folded(step, piece) if piece.a is not None else piece.w
        with np.errstate(over="ignore", invalid="ignore"):
            # cast before moving: fewer bytes to transpose
            narrow = w.astype(step.spec.dtype, copy=False)
        if narrow is not w:
            faults.look_for_overflow(piece, narrow)
        weight = np.ascontiguousarray(step.rule.equation.arrange(narrow))
        for name in names_at[piece.index]:
            sink.write(name, weight, piece.start)
            sums[name].update(raw(weight))
    done.written = {name: digest.hexdigest() for name, digest in sums.items()}
    done.problems = faults.problems()
    return done


def _pieces(step: Step, source: Source, done: Done, tick: Tick | None) -> Iterator[Piece]:
    equation = step.rule.equation
    a, b = (None if name is None else _whole(source, name, done, tick) for name in (step.leaf.a, step.leaf.b))
    if not equation.streams:
        for index, one in equation.slices(_whole(source, step.leaf.w, done, tick)):
            yield Piece(index, 0, one)
        return
    digest = xxhash.xxh3_128()
    for first, rows in source.blocks(step.leaf.w):
        digest.update(raw(rows))
        if not equation.placeholders:
            yield Piece((), first, rows)
        else:
            slices = [equation.slices(rows)]
            if a is not None and b is not None:
                slices += [equation.slices(factor[first : first + len(rows)]) for factor in (a, b)]
            for (index, one), *factors in zip(*slices, strict=True):
                # the first placeholder is the axis the blocks run along
                yield Piece((index[0] + first, *index[1:]), 0, one, *(view for _, view in factors))
        if tick is not None:
            tick(rows.nbytes)
    done.read[step.leaf.w] = digest.hexdigest()


def _whole(source: Source, name: str, done: Done, tick: Tick | None) -> np.ndarray:
    array = np.ascontiguousarray(source.read(name))
    done.read[name] = xxhash.xxh3_128(raw(array)).hexdigest()
    if tick is not None:
        tick(array.nbytes)
    return array


def _folded(step: Step, piece: Piece) -> np.ndarray:
    """w + scale * (a b), in float32 whatever the stored dtypes: rounding comes once, at the end."""
    assert piece.a is not None and piece.b is not None
    axes = factor_axes(step.rule.equation.one)
    product = delta(axes, piece.a.astype(FLOAT32, copy=False), piece.b.astype(FLOAT32, copy=False))
    product *= np.float32(step.scale)
    product += piece.w
    return product


class _Faults:
    """Weights with faulty values, gathered so that each leaf is reported once."""

    def __init__(self, step: Step, source: Source) -> None:
        self._step, self._where = step, source.location
        self._non_finite: dict[str, list[Index]] = {}
        self._overflow: list[Index] = []

    def look_for_non_finite(self, piece: Piece) -> None:
        for name, array in zip(self._step.leaf.names, (piece.w, piece.a, piece.b), strict=False):
            if array is not None and not all_finite(array):
                self._non_finite.setdefault(name, []).append(piece.index)

    def look_for_overflow(self, piece: Piece, narrow: np.ndarray) -> None:
        faulty = any(at and at[-1] == piece.index for at in self._non_finite.values())
        if not faulty and not all_finite(narrow):
            self._overflow.append(piece.index)

    def problems(self) -> list[Problem]:
        found = [
            Problem(
                f"{self._where}: {name} holds values that are not finite{self._layers(at)}",
                "training diverged or the file is damaged: convert an earlier step, or copy it again",
            )
            for name, at in self._non_finite.items()
        ]
        if self._overflow:
            found.append(
                Problem(
                    f"{self._where}: {self._step.leaf.w} holds values too large for "
                    f"{self._step.spec.dtype.name}{self._layers(self._overflow)}",
                    "add --dtype float32",
                )
            )
        return found

    def _layers(self, at: list[Index]) -> str:
        if not self._step.rule.equation.placeholders:
            return ""
        numbers = sorted({index[0] for index in at})
        return f" ({self._step.rule.equation.placeholders[0]} {', '.join(map(str, numbers))})"
