"""Docstring examples produce what they show."""

import doctest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED_AS = {"bridge": "bridge", "adapters": "bridge.adapters", "cli": "bridge.cli"}


def modules_with_examples() -> Iterator[str]:
    for folder, package in INSTALLED_AS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text():
                inside = file.relative_to(ROOT / folder).with_suffix("").parts
                yield ".".join([package, *(part for part in inside if part != "__init__")])


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_give_what_they_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed = doctest.testmod(import_module(name), optionflags=flags).failed
    assert failed == 0, capsys.readouterr().out
