"""How one rule's weight is written: as tensors of a state_dict, or as a LoRA pair a module.

The counterpart of :mod:`bridge.pieces`. Writers hold no data and can be pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bridge.axes import Index
from bridge.formats import Sink
from bridge.lora import compress, split
from bridge.pieces import Factors, Piece
from bridge.rule import Rule
from bridge.specs import FLOAT32, Spec


@dataclass(frozen=True)
class TensorWriter:
    """Weights as tensors."""

    names: Mapping[Index, tuple[str, ...]]
    """For each index, the names the weight is written under (several where ties are spelled out)."""
    spec: Spec
    """Of each weight, as written."""

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: self.spec for names in self.names.values() for name in names}

    @property
    def dtype(self) -> np.dtype:
        return self.spec.dtype

    def write(self, rule: Rule, sink: Sink, piece: Piece, w: np.ndarray) -> dict[str, np.ndarray]:
        """Write a piece whose values ``w`` are cast already; returns what went under each name."""
        # arranged after the cast: fewer bytes to transpose
        weight = np.ascontiguousarray(rule.equation.arrange(w))
        for name in self.names[piece.index]:
            sink.write(name, weight, piece.start)
        return dict.fromkeys(self.names[piece.index], weight)


@dataclass(frozen=True)
class Pair:
    """The two tensors of one module of an adapter, with the scale PEFT applies at run time."""

    a: str
    b: str
    spec_a: Spec
    spec_b: Spec
    runtime: float
    """alpha / rank as the adapter's config gives it: what is left is folded into ``lora_B``."""


@dataclass(frozen=True)
class AdapterWriter:
    """LoRA factors as PEFT's ``lora_A`` (rank, in) and ``lora_B`` (out, rank)."""

    pairs: Mapping[Index, Pair]
    compress_to: int | None = None
    """Largest rank to keep; None keeps all."""

    @property
    def specs(self) -> dict[str, Spec]:
        return {
            name: spec
            for pair in self.pairs.values()
            for name, spec in ((pair.a, pair.spec_a), (pair.b, pair.spec_b))
        }

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.pairs.values())).spec_b.dtype

    def matrices(self, rule: Rule, index: Index, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
        """``lora_A`` and ``lora_B`` as written, before the cast."""
        pair = self.pairs[index]
        fold = factors.scale / pair.runtime
        a, b = factors.a, factors.b
        if rule.factor_axes.summed or fold != 1 or self.compress_to is not None:
            # arithmetic happens in float32 or wider; a pure rearrangement keeps the stored dtype
            a, b = (each.astype(np.promote_types(each.dtype, FLOAT32)) for each in (a, b))
        matrix_a, matrix_b = split(rule.equation.one, a, b)
        if fold != 1:
            matrix_b = matrix_b * matrix_b.dtype.type(fold)
        if self.compress_to is not None and len(matrix_a) > self.compress_to:
            matrix_a, matrix_b, _ = compress(matrix_a, matrix_b, self.compress_to)
        return matrix_a, matrix_b

    def write(
        self, sink: Sink, index: Index, matrices: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Write the matrices of one module, cast already; returns what went under each name."""
        pair = self.pairs[index]
        written = {pair.a: matrices[0], pair.b: matrices[1]}
        for name, matrix in written.items():
            sink.write(name, np.ascontiguousarray(matrix))
        return written


Writer = TensorWriter | AdapterWriter
