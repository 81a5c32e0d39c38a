"""Containers on disk: how to recognise, list, read and write them. They know nothing of models.

A format is a plugin (entry-point group ``bridge.formats``): a :class:`Format` whose ``open``
gives a :class:`Source` and whose ``create`` gives a :class:`Sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bridge.formats.location import Location
from bridge.specs import Spec

Block = tuple[int, np.ndarray]
"""Consecutive rows of an array along its first axis, and the number of the first of them."""


@runtime_checkable
class Source(Protocol):
    """A container opened for reading. Picklable: workers open their own files."""

    @property
    def format(self) -> str:
        """The format's name."""
        ...

    @property
    def location(self) -> Location:
        """The directory or file that was opened, after any search for it."""
        ...

    @property
    def root(self) -> Location:
        """The directory a user thinks of as the checkpoint: where its assets lie."""
        ...

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every array, without its data."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the container says of itself besides arrays (a header's metadata, a config)."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What opening it had to decide, to be said aloud."""
        ...

    def stored_bytes(self, name: str) -> int:
        """Bytes that reading the array takes from disk."""
        ...

    def how(self, name: str) -> str:
        """Which way the array is read, in a few words, for the plan."""
        ...

    def buffered_bytes(self, name: str) -> int:
        """Bytes of memory that :meth:`blocks` needs at a time."""
        ...

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """The array, or the rows asked for. Raises KeyError, SourceRefused."""
        ...

    def blocks(self, name: str) -> Iterator[Block]:
        """The array in order, as blocks of whole rows; a block is valid until the next."""
        ...


class Sink(Protocol):
    """A container being written. Picklable; blocks may come in any order, from any worker."""

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Write rows of an array from row ``start`` on. ``array`` has its declared dtype."""
        ...

    def finish(self) -> None:
        """Make what was written durable. Called once, after the last write."""
        ...


@dataclass(frozen=True)
class Format:
    """A container format, as registered."""

    name: str
    claims: Callable[[Location], bool]
    """Whether a path looks like this format, finished or not; cheap."""
    open: Callable[[Location], Source]
    """Open for reading. Raises SourceRefused with the cause and the fix."""
    create: Callable[[Path, Mapping[str, Spec], Mapping[str, str]], Sink] | None = None
    """Make the container inside an empty directory: arrays to come, and header metadata."""
