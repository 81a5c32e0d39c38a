"""What a plan makes of one directory: its tensors, the steps that fill them, the files beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from bridge.arrays import Spec
from bridge.graph import State
from bridge.rules.model import Layout
from bridge.stream.step import Step
from bridge.stream.work import Writer

W = TypeVar("W", bound=Writer)


@dataclass(frozen=True, kw_only=True)
class Output:
    """One directory of a plan."""

    state: State
    where: str = ""
    """Its path below the destination; empty for the destination itself."""
    layout: Layout
    dtype: str
    steps: tuple[Step, ...]
    specs: Mapping[str, Spec]
    """Every tensor."""
    zeros: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are zeros -> the reason."""
    header: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files written beside the tensors."""
    approximated: Mapping[str, float] = field(default_factory=dict)
    """Modules of an adapter that are compressed -> relative error of the product of their factors."""

    @property
    def bytes_written(self) -> int:
        """Bytes written; tensors of zeros are a hole and take none."""
        return sum(step.bytes_written for step in self.steps) + sum(len(data) for data in self.files.values())

    @property
    def main_dtype(self) -> str:
        """dtype of most tensors."""
        return Counter(spec.dtype.name for spec in self.specs.values()).most_common(1)[0][0]

    def steps_of(self, writer: type[W]) -> Iterator[tuple[Step, W]]:
        """The steps that write by one kind of writer, with it."""
        return ((step, step.writer) for step in self.steps if isinstance(step.writer, writer))

    def with_files(self, files: Mapping[str, bytes]) -> Output:
        return replace(self, files={**self.files, **files})


def collect(model: str, steps: tuple[Step, ...]) -> dict[str, Spec]:
    """Every tensor that steps write, each once, by name.

    Raises:
        ValueError: two steps write one name.
    """
    specs: dict[str, Spec] = {}
    for step in steps:
        for name, spec in step.specs.items():
            if name in specs:
                raise ValueError(f"model {model}: two rules write {name}")
            specs[name] = spec
    return dict(sorted(specs.items()))


def narrows(output: Output, wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether some weight is written in a dtype that cannot represent all values of its source's.

    Args:
        output: what is written.
        wide: the widest dtype of weights.
        narrow: the dtype of which it represents all values.
    """
    return any(
        step.writer.dtype != step.leaf_spec.dtype
        and not (step.writer.dtype == wide and step.leaf_spec.dtype.itemsize == narrow.itemsize)
        for step in output.steps
    )
