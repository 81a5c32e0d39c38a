"""What is understood of a PEFT adapter."""

from importlib.resources import files
from pathlib import Path

import bridge
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.checkpoint.open import open_checkpoint

SAMPLE = next(path for path in (files("bridge.cli") / "sample").iterdir() if path.is_dir()) / "checkpoint"


def test_modules_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    bridge.convert(str(SAMPLE), tmp_path / "adapter", to="peft-adapter", lora_alpha=8)
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert isinstance(checkpoint, AdapterCheckpoint)
    stored = [name for name in checkpoint.source.specs if name.endswith(".lora_A.weight")]
    # whatever PYTHONHASHSEED is: what inspect shows, and refusals, are the same from run to run
    assert [module.a for module in checkpoint.factors.values()] == stored
