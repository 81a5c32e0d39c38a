"""What every route publishes tells nothing of the machine that it was made on."""

from pathlib import Path
from typing import Any

import pytest

import bridge
from tests.faults.table import check_published
from tests.kit import checkpoints

ALPHA = {"lora_alpha": 4.0}
#: name -> source, target and options; a base is a name, too
ROUTES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "merged": ("run", "torch-merged", ALPHA | {"layout": "transformers"}),
    "lerobot": ("run", "torch-merged", ALPHA | {"layout": "lerobot"}),
    "stripped": ("run", "torch-base", {}),
    "adapter": ("run", "peft-adapter", ALPHA | {"with_base": True}),
    "adapter alone": ("run", "peft-adapter", ALPHA),
    "adapter for lerobot": ("run", "peft-adapter", ALPHA | {"layout": "lerobot"}),
    "joined": ("adapter", "orbax", {"base": "adapter/base", "rank": dict(checkpoints.LORA)}),
    "merged again": ("adapter", "torch-merged", {"base": "adapter/base"}),
    "back": ("merged", "orbax", {}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("the-home-of-somebody")
    checkpoints.save(checkpoints.pi0_tree(layers=2, image_layers=1), home / "run", quick=True)
    return home


def test_no_path_of_the_machine_is_published(home: Path) -> None:
    for name, (source, to, options) in ROUTES.items():
        base = {"base": home / options["base"]} if "base" in options else {}
        bridge.convert(home / source, home / name, to=to, **options | base)
        check_published(home / name, home)
