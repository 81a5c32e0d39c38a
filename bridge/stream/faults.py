"""Faulty values of one step's weights, collected so that each leaf is reported once."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from bridge.arrays import all_finite
from bridge.errors import Problem
from bridge.lora.factors import LowRank
from bridge.rules.equation import Index
from bridge.rules.names import grouped
from bridge.rules.rule import Rule
from bridge.stream.readers import FactorReader, Label, Sources

_DIVERGED = "training diverged or the file is damaged: convert an earlier step, or copy the checkpoint again"


class Faults:
    """What a step met that cannot be converted.

    Args:
        rule: whose weights the step converts.
        where: the source they lie in, for messages.
        dtype: in which they are written.
    """

    def __init__(self, rule: Rule, where: object, dtype: np.dtype) -> None:
        self._rule, self._where, self._dtype = rule, where, dtype
        self._labels: defaultdict[tuple[object, str], list[Index | None]] = defaultdict(list)
        self._faulty: set[Index] = set()
        self._overflow: list[Index] = []

    def not_finite(self, index: Index) -> None:
        """Values of the weight that were read are not finite."""
        self._note(self._where, (self._rule.leaf, index), index)

    def overflows(self, index: Index) -> None:
        """Finite values became too large, unless a fault that is known already made them so."""
        if index not in self._faulty and index not in self._overflow:
            self._overflow.append(index)

    def check(self, index: Index, reader: FactorReader, change: LowRank, sources: Sources) -> None:
        """Record factors that are not finite."""
        where = sources[reader.reads[0][0]].location
        for label, factor in zip(reader.labels(self._rule, index), (change.a, change.b), strict=True):
            if not all_finite(factor):
                self._note(where, label, index)

    def cast(self, index: Index, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """``array`` in the dtype in which it is written; records what does not fit."""
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = array.astype(dtype, copy=False)
        if not all_finite(narrow):
            self.overflows(index)
        return narrow

    def _note(self, where: object, label: Label, index: Index) -> None:
        self._faulty.add(index)
        name, at = label
        if at not in self._labels[where, name]:
            self._labels[where, name].append(at)

    def problems(self) -> list[Problem]:
        """One problem for each leaf, with the layers that have it."""
        whole = [(where, name) for (where, name), at in self._labels.items() if None in at]
        problems = [
            Problem(f"{where}: {name} contains NaN or infinite values{self._layers(at)}", _DIVERGED)
            for (where, name), at in self._labels.items()
            if (where, name) not in whole
        ]
        for where in dict.fromkeys(where for where, _ in whole):
            problems += [
                Problem(f"{where}: {name} contains NaN or infinite values", _DIVERGED)
                for name in grouped(name for place, name in whole if place == where)
            ]
        if self._overflow:
            wide = self._dtype.name == "float32"
            problems.append(
                Problem(
                    f"{self._where}: {self._rule.leaf} overflows {self._dtype.name}{self._layers(self._overflow)}",
                    "the factors diverged, or alpha is wrong: convert an earlier step"
                    if wide
                    else "add --dtype float32",
                )
            )
        return problems

    def _layers(self, at: list[Index] | list[Index | None]) -> str:
        if not self._rule.equation.placeholders:
            return ""
        numbers = sorted({index[0] for index in at if index is not None})
        return f" ({self._rule.equation.placeholders[0]} {', '.join(map(str, numbers))})"
