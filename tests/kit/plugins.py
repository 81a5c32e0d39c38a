"""Plug-ins as if they were installed: families and formats of a test, beside those that ship with bridge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any
from unittest import mock

import bridge.plugins
from bridge import Family, Format
from bridge.conversion.converters import converters


@dataclass(frozen=True)
class Entry:
    """An entry point whose object is at hand."""

    name: str
    plugin: Any
    value: str = "a test"
    dist: None = None

    def load(self) -> Any:
        return self.plugin


@contextmanager
def registered(
    families: Sequence[Family | metadata.EntryPoint] = (),
    formats: Sequence[Format | metadata.EntryPoint] = (),
    *,
    alone: bool = False,
) -> Iterator[None]:
    """Register plug-ins, as objects or entry points, as long as this lasts.

    Args:
        families: of the group ``bridge.adapters``.
        formats: of the group ``bridge.formats``.
        alone: whether no other family is installed.
    """
    own = {"bridge.adapters": families, "bridge.formats": formats}

    def entry_points(*, group: str) -> list[Any]:
        installed = [] if alone and group == "bridge.adapters" else list(metadata.entry_points(group=group))
        return installed + [
            plugin if isinstance(plugin, metadata.EntryPoint) else Entry(plugin.name, plugin)
            for plugin in own.get(group, ())
        ]

    with mock.patch.object(bridge.plugins, "entry_points", entry_points):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    bridge.plugins.load.cache_clear()
    converters.cache_clear()
