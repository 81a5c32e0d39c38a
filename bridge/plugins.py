"""Finding adapters and formats: whatever is installed under an entry-point group."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from bridge.errors import PluginRefused, Problem

if TYPE_CHECKING:
    from bridge.formats.contract import Format
    from bridge.rules.model import Adapter


@cache
def _load(group: str) -> tuple[Any, ...]:
    loaded: dict[str, Any] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        try:
            plugin = point.load()
        except (ImportError, AttributeError) as error:
            raise PluginRefused(
                Problem(
                    f"plugin {point.name} ({point.value}) of {group} cannot be loaded: {error}",
                    "reinstall or uninstall the package that registers it",
                )
            ) from error
        if plugin.name in loaded and loaded[plugin.name] is not plugin:
            raise PluginRefused(
                Problem(
                    f"two plugins of {group} are named {plugin.name}: {point.value} is the second",
                    "uninstall one of the packages that register it",
                )
            )
        loaded[plugin.name] = plugin
    return tuple(loaded.values())


def adapters() -> tuple[Adapter, ...]:
    """Every installed adapter. Raises PluginRefused when one cannot be loaded."""
    return _load("bridge.adapters")


def formats() -> tuple[Format, ...]:
    """Every installed format. Raises PluginRefused when one cannot be loaded."""
    return _load("bridge.formats")
