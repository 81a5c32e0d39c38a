"""What lerobot-train saved (tests/data/golden/lerobot), in openpi's form, against LeRobot's own actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit import golden, lerobot

pytestmark = pytest.mark.slow

HOME = golden.DATA / "lerobot"
BASE = {"base": HOME / "base_pi0"}
#: what a LeRobot directory of these sizes does not tell
HEADS = {"paligemma.head": 8, "siglip.head": 4}
#: 2.4e-6 was measured, on actions up to 1.9
ALLOWED = 5e-5


@pytest.mark.parametrize(("name", "options"), [("full_pi0", {}), ("peft_pi0", BASE), ("qv_pi0", BASE)])
def test_it_acts_as_lerobot(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """From a raw observation to unnormalised actions, the adapters as LoRA leaves of their base."""
    recorded = dict(np.load(HOME / name / "reference.npz"))
    got = lerobot.openpi_actions(HOME / name, tmp_path, recorded, size=HEADS, **options)
    assert got.shape == recorded["actions"].shape == (10, 7)
    assert np.abs(got - recorded["actions"]).max() <= ALLOWED
