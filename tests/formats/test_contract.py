"""Formats of other packages, whose declarations are incomplete."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge import Format, State
from bridge.conversion.converters import converters, targets
from bridge.errors import CheckpointRefused, PluginRefused
from bridge.formats.contract import format_named, formats
from bridge.formats.disk.location import Location
from bridge.graph import Form
from tests.kit.plugins import registered

SAMPLE = next(path for path in (files("bridge.cli") / "sample").iterdir() if path.is_dir()) / "checkpoint"


@dataclass(frozen=True)
class Renamed:
    """A source of another format's name."""

    source: Any
    format: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def open_weights_only(location: Location) -> Any:
    return Renamed(format_named("orbax").open(location), "weights_only")


WEIGHTS_ONLY = Format(
    name="weights_only",
    states=(State(name="weights-only", contents="base", format="weights_only", form=Form.PYTREE),),
    claims=lambda location: False,
    open=open_weights_only,
)


@pytest.fixture
def installed() -> Iterator[None]:
    with registered(formats=[WEIGHTS_ONLY]):
        yield


@pytest.mark.usefixtures("installed")
def test_nothing_is_converted_to_a_format_that_is_only_read() -> None:
    assert "weights-only" not in targets()
    assert any(edge.source.name == "weights-only" for edge in converters())


@pytest.mark.usefixtures("installed")
def test_contents_without_a_state_are_refused() -> None:
    says = r"contains base\+lora, and the format weights_only declares no such state"
    with pytest.raises(CheckpointRefused, match=says):
        bridge.plan(str(SAMPLE), None, to="torch-merged", from_="weights_only")


def test_a_state_of_another_formats_name_is_refused() -> None:
    with pytest.raises(PluginRefused, match="no installed format is named zarr"):
        format_named("zarr")


def test_a_plugin_that_raises_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_on_import.py").write_text("1 / 0")
    (tmp_path / "has_no_name.py").write_text("FORMAT = object()")
    monkeypatch.syspath_prepend(str(tmp_path))
    causes = (
        ("raises_on_import", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("has_no_name", "is a builtins.object, not a Format"),
    )
    for module, why in causes:
        point = EntryPoint(name="other", value=f"{module}:FORMAT", group="bridge.formats")
        with registered(formats=[point]), pytest.raises(PluginRefused, match=f"plugin other .* {why}"):
            formats()
