"""A conversion as data: every read, every write, every shape and byte, before the first is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge.arrays import Spec
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.inputs import Inputs
from bridge.conversion.options import Options
from bridge.formats.disk.stamps import Stamp
from bridge.graph import Loss, Route
from bridge.lora.factors import Scale
from bridge.proof.peft import Prover
from bridge.rules.fact import Fact
from bridge.rules.model import Layout
from bridge.stream.output import Output
from bridge.stream.step import Step

#: what steps running at once may take together
MEMORY = 512 << 20

#: what the interpreter with numpy, TensorStore and zstandard takes
RESIDENT = 90 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a conversion will do."""

    inputs: Inputs
    destination: Path | None
    """The directory to make; None for a plan that is only carried out in memory."""
    route: Route
    loss: Loss
    scales: Mapping[str, Scale]
    facts: Mapping[str, Fact]
    """What is in no weight, with its origin."""
    outputs: tuple[Output, ...]
    """The directories it makes, the destination itself first."""
    notes: tuple[str, ...]
    read_scales: Mapping[str, Scale] = field(default_factory=dict)
    """Those of the source's own factors, where they are not what is written."""
    options: Options
    prover: Prover | None = None
    """What the destination must pass before it is published."""
    overwrite: bool = False
    workers: int = 2
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """Every local file that the plan depends on, as it was when it was opened."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.inputs.source

    @property
    def output(self) -> Output:
        """The destination itself."""
        return self.outputs[0]

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for output in self.outputs for step in output.steps)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor of the destination itself."""
        return self.output.specs

    @property
    def layout(self) -> Layout:
        return self.output.layout

    @property
    def dtype(self) -> str:
        return self.output.dtype

    @property
    def bytes_read(self) -> int:
        """Bytes read from the sources, as stored."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_decoded(self) -> int:
        """Bytes of the arrays read, once decoded."""
        return sum(self.inputs.spec(read).nbytes for step in self.steps for read in step.reads)

    @property
    def bytes_written(self) -> int:
        """Bytes written; tensors of zeros are a hole and take none."""
        return sum(output.bytes_written for output in self.outputs)

    @property
    def memory_budget(self) -> int:
        """Bytes that steps running at once may take together; a larger one runs alone."""
        largest = max((step.memory for step in self.steps), default=0)
        return max(largest, MEMORY)

    @property
    def memory(self) -> int:
        """Estimated peak memory of the process, in bytes."""
        biggest = sorted((step.memory for step in self.steps), reverse=True)[: self.workers]
        return RESIDENT + min(sum(biggest), self.memory_budget)
