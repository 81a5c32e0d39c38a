"""Finding plug-ins: whatever is installed under an entry-point group."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bridge.errors import PluginRefused, Problem

DISTRIBUTION = "openpi-bridge"


@cache
def load(group: str) -> tuple[Any, ...]:
    """Every plug-in of a group, those that ship with bridge first, then by name.

    Raises:
        PluginRefused: one cannot be loaded, or two have one name.
    """
    loaded: dict[str, Any] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (not _ships(point), point.name)):
        try:
            plugin = point.load()
            name = plugin.name
        except Exception as error:
            # loading runs the code of another package, which may raise anything
            said = error if isinstance(error, (ImportError, AttributeError, ValueError)) else repr(error)
            raise PluginRefused(
                Problem(
                    f"plugin {point.name} ({point.value}) of {group} cannot be loaded: {said}",
                    "reinstall or uninstall the package that registers it",
                )
            ) from error
        if name in loaded and loaded[name] is not plugin:
            raise PluginRefused(
                Problem(
                    f"two plugins of {group} are named {name}: {point.value} is the second",
                    "uninstall one of the packages that register it",
                )
            )
        loaded[name] = plugin
    return tuple(loaded.values())


def _ships(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == DISTRIBUTION
