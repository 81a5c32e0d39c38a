"""What is asked of a builder, and what it gives: the outputs of a route's target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bridge.arrays import WEIGHT_DTYPES, Spec, widest
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.inputs import Inputs
from bridge.conversion.options import Options
from bridge.graph import Loss, State
from bridge.lora.factors import Scale
from bridge.proof.peft import Prover
from bridge.rules.model import Bound, Layout
from bridge.rules.rule import Rule
from bridge.stream.output import Output
from bridge.stream.readers import FactorReader, WeightsReader
from bridge.stream.step import Step
from bridge.stream.work import Load, Writer
from bridge.stream.workers import Progress


@dataclass(frozen=True, kw_only=True)
class Request:
    """One conversion, understood."""

    inputs: Inputs
    reference: Checkpoint | None
    """A base to compare the source with."""
    target: State
    fold: bool
    """Whether LoRA factors are summed into the weights on the way."""
    layout: Layout
    dtype: str
    scales: Mapping[str, Scale]
    """What the runtime multiplies the LoRA products of each part by."""
    ranks: Mapping[str, int]
    """Rank of the LoRA leaves that each part gets."""
    options: Options
    destination: Path | None
    progress: Progress | None

    def step(
        self,
        bound: Bound,
        weights: WeightsReader | None,
        factors: FactorReader | None,
        writer: Writer,
        leaf_spec: Spec,
    ) -> Step:
        """A step, with what it reads and the memory it takes."""
        step = Step(
            rule=bound.rule,
            part=bound.part.name,
            weights=weights,
            factors=factors,
            writer=writer,
            leaf_spec=leaf_spec,
            bytes_read=0,
            memory=0,
        )
        sources = self.inputs.sources
        load = Load(
            rule=step.rule,
            sizes=step.sizes,
            slab=0 if weights is None else sources[weights.reads[0][0]].buffered_bytes(weights.reads[0][1]),
            factors=0 if factors is None else factors.memory(sources),
        )
        stored = sum(sources[source].stored_bytes(name) for source, name in step.reads)
        return replace(step, bytes_read=stored, memory=writer.memory(load))

    def weight_dtype(self, rule: Rule, stored: np.dtype, *, folded: bool = False) -> np.dtype:
        """dtype in which a rule's weights are written: as asked, but never below what the runtime keeps.

        Args:
            rule: whose weights.
            stored: their dtype in the source.
            folded: whether factors are summed into them: where no dtype is asked for, not below the family's
                dtype for that.
        """
        if self.dtype == "keep":
            usual = WEIGHT_DTYPES.get(self.inputs.weights.family.fold_dtype, stored)
            return widest((stored, usual)) if folded and self.options["dtype"] is None else stored
        wanted = WEIGHT_DTYPES[self.dtype]
        kept = WEIGHT_DTYPES[rule.dtype] if rule.dtype is not None else wanted
        return kept if kept.itemsize > wanted.itemsize else wanted

    def factor_dtype(self, stored: np.dtype) -> np.dtype:
        """dtype in which LoRA factors are written."""
        return stored if self.dtype == "keep" else WEIGHT_DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a builder planned."""

    outputs: tuple[Output, ...]
    """The directories to make, the destination itself first."""
    notes: tuple[str, ...] = ()
    loss: Loss = Loss.EXACT
    """What it costs beyond what its edges do."""
    read_scales: Mapping[str, Scale] = field(default_factory=dict)
    """By part, what the source's LoRA products are multiplied by, where what is written has other ranks."""
    prover: Prover | None = None
    """What the destination must pass before it is published."""
