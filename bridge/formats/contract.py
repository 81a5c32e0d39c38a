"""The interface of a format: how to recognise, list, read and write a container on disk.

Formats know nothing of models.

A format is a plugin (entry-point group ``bridge.formats``): a :class:`Format` whose ``open``
returns a :class:`Source` and whose ``create`` returns a :class:`Sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bridge.arrays import Spec
from bridge.errors import PluginRefused, Problem
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import Stamp
from bridge.graph import Form, State
from bridge.plugins import load

Slab = tuple[tuple[int, ...], np.ndarray]
"""A box of an array: the position of its first element, and its values, both with all axes."""

#: bytes of a slab at most, where the storage allows it
SLAB_BYTES = 8 << 20

#: bytes written at a time: one chunk of an Orbax array, small enough that a layer can be read alone
RUN_BYTES = 32 << 20


@dataclass
class Timings:
    """Seconds a worker spent on what no conversion can avoid: reading, decoding, writing."""

    read: float = 0.0
    """Time spent waiting for reads; the disk reads ahead meanwhile."""
    decode: float = 0.0
    write: float = 0.0


@runtime_checkable
class Source(Protocol):
    """A container open for reading. Picklable: workers open files of their own."""

    @property
    def format(self) -> str:
        """The format's name."""
        ...

    @property
    def location(self) -> Location:
        """The directory or file that was opened, once the user's path is resolved."""
        ...

    @property
    def root(self) -> Location:
        """The directory a user thinks of as the checkpoint, which contains the assets."""
        ...

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every array, without its data."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata beside the arrays: a file header's, a config."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made when it was opened, to be reported."""
        ...

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The state of the local files it reads, when it was opened."""
        ...

    def stored_bytes(self, name: str) -> int:
        """Bytes read from disk for the array."""
        ...

    def how(self, name: str) -> str:
        """How the array is read, in a few words, for the plan."""
        ...

    def buffered_bytes(self, name: str) -> int:
        """Bytes of memory in use at a time by :meth:`slabs`."""
        ...

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """The array, or some of its rows. Raises KeyError, SourceRefused."""
        ...

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Timings | None = None
    ) -> Iterator[Slab]:
        """The array in C order, slab by slab; a slab is valid until the next.

        Args:
            name: of the array.
            shape: another shape of the same number of elements, to slice the array by.
            spent: the time it takes is added to these.
        """
        ...


class Sink(Protocol):
    """A container being written. Picklable; arrays come in any order, from any worker."""

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        """Write an array of its declared dtype, all of it or a run of it.

        A run is contiguous in C order. It begins at a multiple of :func:`bridge.arrays.run_shape`
        for `RUN_BYTES`, and ends at one or at the end of the array.
        """
        ...

    def finish(self) -> None:
        """Make all writes durable. Called once, after the last write."""
        ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """A container format, as registered."""

    name: str
    states: tuple[State, ...]
    """The states of the graph with this container; all have the same form."""
    claims: Callable[[Location], bool]
    """Whether a path looks like this format, complete or not; cheap."""
    open: Callable[[Location], Source]
    """Opens a path for reading. Raises SourceRefused with the cause and the fix."""
    create: Callable[[Path, Mapping[str, Spec], Mapping[str, str], Collection[str]], Sink] | None = None
    """Creates the container in an empty directory, from the arrays to come, the header metadata, and
    the names of arrays that are all zeros and are never written."""

    @property
    def form(self) -> Form:
        """The form of its arrays."""
        return self.states[0].form


def formats() -> tuple[Format, ...]:
    """All installed formats. Raises PluginRefused if one cannot be loaded."""
    return load("bridge.formats")


def format_named(name: str) -> Format:
    """The installed format of this name. Raises PluginRefused where a source or state names another."""
    known = {each.name: each for each in formats()}
    if name not in known:
        raise PluginRefused(
            Problem(
                f"no installed format is named {name} (installed: {', '.join(known)})",
                "the sources and states of a format must give its own name",
            )
        )
    return known[name]


def states() -> tuple[State, ...]:
    """All states of the graph."""
    return tuple(state for known in formats() for state in known.states)
