"""Finding plug-ins: whatever is installed under an entry-point group."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, TypeVar

from bridge.display import with_article
from bridge.errors import PluginRefused, Problem

DISTRIBUTION = "openpi-bridge"

_REINSTALL = "reinstall or uninstall the package that registers it"


class Plugin(Protocol):
    """Whatever is registered: it has a name."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Plugin)


@cache
def load(group: str, kind: type[P]) -> tuple[P, ...]:
    """Every plug-in of a group, those that ship with bridge first, then by name.

    Args:
        group: of entry points.
        kind: what they must be.

    Raises:
        PluginRefused: one cannot be loaded or is something else, or two have one name.
    """
    loaded: dict[str, P] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (not _ships(point), point.name)):
        where = f"plugin {point.name} ({point.value}) of {group}"
        try:
            plugin = point.load()
        except Exception as error:
            # a declaration that contradicts itself raises ValueError and says how; any other module may raise anything
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise PluginRefused(Problem(f"{where} cannot be loaded: {why}", _REINSTALL)) from error
        if not isinstance(plugin, kind):
            what = f"{type(plugin).__module__}.{type(plugin).__qualname__}"
            raise PluginRefused(
                Problem(f"{where} is {with_article(what)}, not {with_article(kind.__name__)}", _REINSTALL)
            )
        if plugin.name in loaded and loaded[plugin.name] is not plugin:
            raise PluginRefused(
                Problem(
                    f"two plugins of {group} are named {plugin.name}: {point.value} is the second",
                    "uninstall one of the packages that register it",
                )
            )
        loaded[plugin.name] = plugin
    return tuple(loaded.values())


def _ships(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == DISTRIBUTION
