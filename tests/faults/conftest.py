"""What every table of faults starts from."""

from pathlib import Path

import pytest

from tests.faults.table import Scene


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)
