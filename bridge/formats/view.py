"""A source by other names: what trainers wrap around names is taken off without copying a byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bridge.arrays import Spec
from bridge.formats.contract import Slab, Source, Timings
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import Stamp


@dataclass(frozen=True, kw_only=True)
class View:
    """Some arrays of a source under names of their own. As picklable as the source is."""

    source: Source
    names: Mapping[str, str]
    """Name -> the name under which the source has it."""
    notes: tuple[str, ...]
    format: str
    metadata: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        source: Source,
        names: Mapping[str, str],
        *notes: str,
        format: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> View:
        """A view with further notes and metadata; of a view, one of its source."""
        if isinstance(source, View):
            names = {name: source.names[stored] for name, stored in names.items()}
        return cls(
            source=source.source if isinstance(source, View) else source,
            names=names,
            notes=(*source.notes, *notes),
            format=format or source.format,
            metadata={**source.metadata, **(metadata or {})},
        )

    @property
    def location(self) -> Location:
        return self.source.location

    @property
    def root(self) -> Location:
        return self.source.root

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        return self.source.stamps

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        specs = self.source.specs
        return {name: specs[stored] for name, stored in self.names.items()}

    def stored_bytes(self, name: str) -> int:
        return self.source.stored_bytes(self.names[name])

    def how(self, name: str) -> str:
        return self.source.how(self.names[name])

    def buffered_bytes(self, name: str) -> int:
        return self.source.buffered_bytes(self.names[name])

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        return self.source.read(self.names[name], rows)

    def sample(self, name: str, at: np.ndarray) -> np.ndarray | None:
        return self.source.sample(self.names[name], at)

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Timings | None = None
    ) -> Iterator[Slab]:
        return self.source.slabs(self.names[name], shape, spent)
