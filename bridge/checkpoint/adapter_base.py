"""Where the base of an adapter lies when no one names it: inside the adapter's directory, or as its config says."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.checkpoint.open import open_checkpoint
from bridge.checkpoint.opening import Opening
from bridge.display import printable
from bridge.errors import Problem, Refusal
from bridge.formats.contract import Source, formats
from bridge.formats.disk.location import Location
from bridge.formats.safetensors.peft import CONFIG
from bridge.graph import Form

#: the directory inside an adapter's into which its base is written
BASE = "base"
NAME = "base_model_name_or_path"

#: owner/name, as the hub has it
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Based:
    """A checkpoint's base, as far as it is known."""

    path: str | Path | Location | None = None
    own: Checkpoint | None = None
    """The base that an adapter was saved with, as one model."""
    origin: str = ""
    """Why it is this one; empty where it was given."""
    named: str = ""
    """What an adapter's config calls it, where it is not here."""
    on_hub: bool = False
    adapter: Location | None = None
    """Whose it is, where it is an adapter's."""

    @property
    def here(self) -> bool:
        """Whether there is one."""
        return self.path is not None or self.own is not None

    @property
    def missing(self) -> Problem | None:
        """What to say of an adapter where there is none."""
        if self.here or self.adapter is None:
            return None
        if not self.named:
            return Problem(f"{self.adapter} is an adapter and needs its base", "add --base PATH")
        fix = "download it, and add --base PATH" if self.on_hub else "add --base PATH"
        return Problem(f"{self.adapter}: its base is {self.description}", fix)

    @property
    def description(self) -> str:
        """The base in a few words."""
        if self.own is not None:
            return "saved with it, as one model"
        if self.path is not None:
            return f"{self.path}, {self.origin}" if self.origin else str(self.path)
        where = "on the hub" if self.on_hub else "which is not here"
        return f"{self.named}, {where}" if self.named else "not named"

    def open(self, opening: Opening) -> Checkpoint:
        """Raises Refusal: it cannot be opened, or is itself an adapter; where it was not given, with its origin.

        Args:
            opening: of the adapter; an item is no item of its base.
        """
        if self.own is not None:
            return self.own
        assert self.path is not None
        try:
            base = open_checkpoint(self.path, opening=replace(opening, item=None))
            if base.state.form is Form.ADAPTER:
                raise Refusal(
                    Problem(
                        f"{base.source.location} is an adapter, not a base", "give the weights it applies to"
                    )
                )
        except Refusal as refused:
            if not self.origin:
                raise
            note = Problem(f"{self.path} is the base, {self.origin}", "give another with --base PATH")
            raise type(refused)(*refused.problems, note) from refused
        return base


def base_of(checkpoint: Checkpoint, given: str | Path | None) -> Based:
    """The base that is given, else that of an adapter, where it can be reached from here.

    PEFT and the runtimes that use it take a relative name as one from the working directory; one from the
    adapter's own directory still leads there once that directory is moved, and is tried first.
    """
    if given is not None or checkpoint.state.form is not Form.ADAPTER:
        return Based(given)
    source = checkpoint.source
    if isinstance(checkpoint, AdapterCheckpoint) and checkpoint.own_base is not None:
        return Based(own=checkpoint.own_base)
    inside = source.root / BASE
    if _is_checkpoint(inside):
        return Based(inside, origin=f"{BASE}/ in the adapter's directory", adapter=source.location)
    name = source.metadata[CONFIG].get(NAME)
    if not isinstance(name, str) or not name.strip():
        return Based(adapter=source.location)
    if (path := _here(source, name)) is not None:
        return Based(path, origin=f"{NAME} in {CONFIG}", adapter=source.location)
    on_hub = _REPOSITORY.fullmatch(name) is not None
    return Based(named=printable(name[:200]), on_hub=on_hub, adapter=source.location)


def base_name(
    source: Source, destination: Path | None, chosen: str | None, *, with_base: bool, absolute: bool
) -> str | None:
    """``base_model_name_or_path`` of an adapter to be written; None for the source's own, as it is.

    Relative to the adapter where its base is inside it, so that it can be moved. PEFT and what uses it take a
    relative name from the working directory, which matters where the name is all that a runtime has.

    Args:
        source: what it is made from.
        destination: where it will be.
        chosen: by an option.
        with_base: whether its base is written inside it.
        absolute: whether its runtime finds the base by this name alone.
    """
    if chosen is not None:
        return chosen
    if with_base:
        return str(destination / BASE) if absolute and destination is not None else BASE
    name = source.metadata.get(CONFIG, {}).get(NAME)
    if destination is None or not isinstance(name, str) or Path(name).is_absolute():
        return None
    path = _inside(source, name)
    if path is None:
        return None
    return str(path.absolute()) if absolute else os.path.relpath(path, destination)


def _here(source: Source, name: str) -> Path | None:
    """The path that the name of a base stands for, if there is something."""
    beside = Path(name).absolute()
    try:
        # from the working directory, a name such as `base` may be anything
        taken = beside if beside.exists() and _is_checkpoint(Location.parse(beside)) else None
    except (OSError, ValueError):
        taken = None  # no path at all
    return _inside(source, name) or taken


def _inside(source: Source, name: str) -> Path | None:
    """The path that a name stands for from an adapter's own directory, if there is something."""
    folder = source.root.local
    try:
        # an adapter is not its own base, whatever it says
        if folder is not None and (path := folder / name).exists() and not path.samefile(folder):
            return path
    except (OSError, ValueError):
        pass  # no path at all
    return None


def _is_checkpoint(location: Location) -> bool:
    return any(known.claims(location) for known in formats())
