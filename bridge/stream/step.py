"""One unit of work: the weights of one leaf from where they lie to where they go, streamed.

A step names by itself what it reads and writes; it carries no data, shares nothing with other
steps, and can be pickled, so that any executor can run it. At most one slab of a leaf, its
factors and one weight as it is written are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from bridge.arrays import Spec, raw
from bridge.formats.contract import Sink, Timings
from bridge.rules.rule import Rule
from bridge.stream.faults import Faults
from bridge.stream.readers import Done, FactorReader, Read, Sources, Tick, WeightsReader
from bridge.stream.work import Work, Writer


@dataclass(frozen=True, kw_only=True)
class Step:
    """Read ``weights`` and ``factors``; fold them where weights are written; write.

    Weights alone are exported, factors alone become an adapter or LoRA leaves, both are folded.
    """

    rule: Rule
    part: str
    weights: WeightsReader | None
    factors: FactorReader | None
    writer: Writer
    leaf_spec: Spec
    """Of the leaf, or of the JAX form the weights would have."""
    bytes_read: int
    """As stored."""
    memory: int
    """Estimated peak, in bytes."""

    @property
    def reads(self) -> tuple[Read, ...]:
        weights = self.weights.reads if self.weights is not None else ()
        return weights + (self.factors.reads if self.factors is not None else ())

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor the step writes."""
        return self.writer.specs

    @property
    def sizes(self) -> Mapping[str, int]:
        """Length of every axis of the leaf, by the rule's names."""
        return dict(zip(self.rule.equation.left, self.leaf_spec.shape, strict=True))

    @property
    def bytes_written(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def run_step(step: Step, sources: Sources, sink: Sink, tick: Tick | None = None) -> Done:
    """Carry out a step. Faulty values are reported in the result; nothing is hidden or repaired.

    Raises:
        SourceRefused: a source cannot be read.
    """
    done = Done()
    # a step that only writes zeros reads nothing
    where = sources[step.reads[0][0]].location if step.reads else None
    faults = Faults(step.rule, where, step.writer.dtype)
    work = Work(
        rule=step.rule,
        sizes=step.sizes,
        weights=step.weights,
        factors=step.factors,
        sources=sources,
        sink=_Timed(sink, done.spent),
        done=done,
        faults=faults,
        tick=tick,
    )
    sums = {name: xxhash.xxh3_128() for name in step.specs}
    for name, array in step.writer.write(work):
        sums[name].update(raw(array))
    done.written = {name: digest.hexdigest() for name, digest in sums.items()}
    done.problems += faults.problems()
    return done


@dataclass(frozen=True)
class _Timed:
    """A sink that measures the time it takes."""

    sink: Sink
    spent: Timings

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        began = time.perf_counter()
        self.sink.write(name, array, at)
        self.spent.write += time.perf_counter() - began

    def finish(self) -> None:
        self.sink.finish()
