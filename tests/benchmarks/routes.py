"""What is measured: conversions, a proof and a comparison, each from checkpoints that earlier ones make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import ranges, watched

MADE = "orbax"
"""The checkpoint that all else comes from."""


@dataclass(frozen=True)
class Route:
    """One row. ``source``, ``base`` and ``against`` name checkpoints by the route that makes them."""

    name: str
    title: str
    source: str = MADE
    base: str | None = None
    against: str | None = None
    """The other side, for what compares two. Nothing is made then."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for name in (self.source, self.base, self.against) if name is not None)

    @property
    def encodes(self) -> bool:
        return self.options.get("to") == "orbax"

    def command(self, folder: Path) -> list[str]:
        src = str(folder / self.source)
        if self.against is not None:
            return watched.driven(self.name, src=src, dst=str(folder / self.against))
        base = {"base": str(folder / self.base)} if self.base is not None else {}
        return watched.driven("convert", src=src, dst=str(folder / self.name), **self.options, **base)

    def reads(self, folder: Path) -> list[ranges.Range]:
        """The bytes of the sources that the route needs: to an adapter, those of the factors."""
        lie = {which: ranges.tensors(folder / name) for which, name in self._sources.items()}
        if self.against is not None:
            wanted = [(which, name) for which, tensors in lie.items() for name in tensors]
        else:
            import bridge

            base = folder / self.base if self.base is not None else None
            plan = bridge.plan(folder / self.source, None, base=base, **self.options)
            wanted = [read for step in plan.steps for read in step.reads]
        # what lies inside an index has no range
        return [one for which, name in wanted for one in lie[which].get(name, ())]

    @property
    def _sources(self) -> dict[str, str]:
        other = self.against or self.base
        return {"source": self.source} | ({"base": other} if other is not None else {})


def _to(to: str, dtype: str | None = None) -> dict[str, Any]:
    return {"to": to} | ({"dtype": dtype} if dtype is not None else {})


#: in an order that lets each large checkpoint be removed early
ROUTES = (
    Route("float32", "orbax[lora] -> torch-merged float32", options=_to("torch-merged", "float32")),
    Route("verify", "verify orbax[lora] <-> torch-merged float32", against="float32"),
    Route("diff", "diff orbax[lora] and torch-merged float32", against="float32"),
    Route("float32-orbax", "torch-merged float32 -> orbax", "float32", options=_to("orbax")),
    Route("bfloat16", "orbax[lora] -> torch-merged bfloat16", options=_to("torch-merged", "bfloat16")),
    Route("bfloat16-orbax", "torch-merged bfloat16 -> orbax", "bfloat16", options=_to("orbax")),
    Route("adapter", "orbax[lora] -> peft-adapter", options=_to("peft-adapter")),
    Route("base", "orbax[lora] -> torch-base", options=_to("torch-base")),
    Route("join", "peft-adapter + torch-base -> orbax[lora]", "adapter", "base", options=_to("orbax")),
    Route(
        "merge", "peft-adapter + torch-base -> torch-merged", "adapter", "base", options=_to("torch-merged")
    ),
)
