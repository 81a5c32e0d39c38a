"""The interface of a format: how to recognise, list, read and write a container on disk.

Formats know nothing of models.

A format is a plugin (entry-point group ``bridge.formats``): a :class:`Format` whose ``open``
returns a :class:`Source` and whose ``create`` returns a :class:`Sink`. What its arrays are
(:class:`bridge.graph.Form`) decides which converters lead to it and from it; nothing else has to
know of it. ``examples/own_format`` is one, in a module of its own.
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
"""A run of an array: the position of its first element, and its values, both with all axes."""

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
        """The directory a user thinks of as the checkpoint: assets and ``bridge.json`` are read there."""
        ...

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every array, without its data. Names are ``/``-joined paths in a pytree, else a state_dict's;
        dtypes are those of the values, bfloat16 that of ``ml_dtypes``, however they are stored."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata beside the arrays: a file header's, by its keys; of a state_dict, a ``config.json`` beside
        it under that name; of an adapter, its ``adapter_config.json``."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made when it was opened, to be reported."""
        ...

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The state of the local files it reads, when it was opened: :func:`bridge.formats.disk.stamps.take_stamps`
        before the first is read. A conversion during which one of them changes is refused."""
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

    def sample(self, name: str, at: np.ndarray) -> np.ndarray | None:
        """Values near the beginning of an array, where they take a small part of it to read; else None.

        Args:
            name: of the array.
            at: their positions: (count, axes).

        Raises:
            SourceRefused: it cannot be read.
        """
        ...

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Timings | None = None
    ) -> Iterator[Slab]:
        """The array in C order, slab by slab; a slab is valid until the next.

        Slabs are runs that follow each other: checksums are taken over them as they come. An array without
        axes is one slab, at the position ``()``.

        Args:
            name: of the array.
            shape: another shape of the same number of elements, to slice the array by: positions and values
                have its axes. Tensors are read by the axes that their rule gives them.
            spent: the time it takes is added to these.

        Raises:
            SourceRefused: it cannot be read.
        """
        ...


class Sink(Protocol):
    """A container being written. Picklable; arrays come in any order, from any worker.

    Every array is written completely and nothing twice, but for those of zeros, which are never written.
    Workers may be other processes: what is written is in the files, not in the object.
    """

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        """Write an array of its declared dtype, all of it or a run of it.

        A run is contiguous in C order. It begins at a multiple of :func:`bridge.arrays.run_shape`
        for `RUN_BYTES`, and ends at one or at the end of the array.
        """
        ...

    def finish(self) -> None:
        """Make all writes durable, and the container complete. Called once, after the last write, in the
        process that created it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """A container format, as registered."""

    name: str
    states: tuple[State, ...]
    """The states of the graph with this container; all have the same form. A container of pytrees has two,
    with ``"base"`` and with ``"base+lora"``."""
    claims: Callable[[Location], bool]
    """Whether a path looks like this format, complete or not; cheap."""
    open: Callable[[Location], Source]
    """Opens a path for reading. Raises SourceRefused with the cause and the fix."""
    create: Callable[[Path, Mapping[str, Spec], Mapping[str, str], Collection[str]], Sink] | None = None
    """Creates the container in an empty directory, from the arrays to come, the header metadata, and
    the names of arrays that are all zeros and are never written; None for a format that is only read.

    The directory is renamed once it is complete, other files are put beside the container's, and before
    that ``open`` must read back the very specs. The same arrays must give the same bytes. Adapters are
    written as PEFT reads them, which proves each before it is published: by the format that ships."""

    def __post_init__(self) -> None:
        if not self.states or any(
            (state.form, state.format) != (self.form, self.name) for state in self.states
        ):
            raise ValueError(f"format {self.name}: its states must have its name as format, and one form")

    @property
    def form(self) -> Form:
        """The form of its arrays."""
        return self.states[0].form


def formats() -> tuple[Format, ...]:
    """All installed formats. Raises PluginRefused if one cannot be loaded."""
    return load("bridge.formats", Format)


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
