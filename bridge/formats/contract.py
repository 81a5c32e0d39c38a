"""Containers on disk: how to recognise, list, read and write them. They know nothing of models.

A format is a plugin (entry-point group ``bridge.formats``): a :class:`Format` whose ``open``
gives a :class:`Source` and whose ``create`` gives a :class:`Sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bridge.arrays import Spec
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import Stamp
from bridge.graph import Form, State
from bridge.plugins import load

Slab = tuple[tuple[int, ...], np.ndarray]
"""A box of an array: the position of its first element along every axis, and the values, with as many axes."""

#: a slab is at most this long where the storage allows it
SLAB_BYTES = 8 << 20

#: what is written at a time: a chunk of an Orbax array, from which a reader can take a layer alone
RUN_BYTES = 32 << 20


@dataclass
class Spent:
    """Seconds a worker spent in what no conversion can do without: reading, decoding, writing."""

    read: float = 0.0
    """Waiting for it: the disk reads ahead meanwhile."""
    decode: float = 0.0
    write: float = 0.0


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

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The local files that it reads, as they were when it was opened."""
        ...

    def stored_bytes(self, name: str) -> int:
        """Bytes that reading the array takes from disk."""
        ...

    def how(self, name: str) -> str:
        """Which way the array is read, in a few words, for the plan."""
        ...

    def buffered_bytes(self, name: str) -> int:
        """Bytes of memory that :meth:`slabs` needs at a time."""
        ...

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """The array, or the rows asked for. Raises KeyError, SourceRefused."""
        ...

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Spent | None = None
    ) -> Iterator[Slab]:
        """The array in C order, a slab at a time; a slab is valid until the next.

        Args:
            name: of the array.
            shape: another shape of as many elements, to cut it by.
            spent: takes note of the time it takes.
        """
        ...


class Sink(Protocol):
    """A container being written. Picklable; arrays may come in any order, from any worker."""

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        """Write an array of its declared dtype, whole or from a position on.

        What is written at a position is a run in C order that begins at a multiple of
        :func:`bridge.arrays.run_shape` for `RUN_BYTES`, and ends at one or with the array.
        """
        ...

    def finish(self) -> None:
        """Make what was written durable. Called once, after the last write."""
        ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """A container format, as registered."""

    name: str
    states: tuple[State, ...]
    """The nodes of the graph that this container can be; all of one form."""
    claims: Callable[[Location], bool]
    """Whether a path looks like this format, finished or not; cheap."""
    open: Callable[[Location], Source]
    """Open for reading. Raises SourceRefused with the cause and the fix."""
    create: Callable[[Path, Mapping[str, Spec], Mapping[str, str], Collection[str]], Sink] | None = None
    """Make the container inside an empty directory: arrays to come, header metadata, and the names of
    arrays that are zeros and never written."""

    @property
    def form(self) -> Form:
        """What its arrays are."""
        return self.states[0].form


def formats() -> tuple[Format, ...]:
    """Every installed format. Raises PluginRefused when one cannot be loaded."""
    return load("bridge.formats")


def format_named(name: str) -> Format:
    """The installed format of that name."""
    return next(known for known in formats() if known.name == name)


def states() -> tuple[State, ...]:
    """Every node of the graph."""
    return tuple(state for known in formats() for state in known.states)
