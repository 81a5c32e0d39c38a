"""A golden checkpoint in every form that bridge makes of it, each converted once, on first use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bridge
from tests.kit.golden import Golden


@dataclass(frozen=True)
class Form:
    """What a user names to `bridge verify`."""

    path: Path
    base: Path | None = None
    """What an adapter applies to."""


#: form -> (what it is converted from, options, what an adapter applies to)
RECIPES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "merged": ("orbax", {"to": "torch-merged", "dtype": "float32"}, None),
    "merged-bfloat16": ("orbax", {"to": "torch-merged", "dtype": "bfloat16"}, None),
    "merged-float16": ("orbax", {"to": "torch-merged", "dtype": "float16"}, None),
    "lerobot": ("orbax", {"to": "torch-merged", "dtype": "float32", "layout": "lerobot"}, None),
    "transformers": ("orbax", {"to": "torch-merged", "dtype": "float32", "layout": "transformers"}, None),
    "base": ("orbax", {"to": "torch-base"}, None),
    "base-bfloat16": ("orbax", {"to": "torch-base", "dtype": "bfloat16"}, None),
    "base-orbax": ("base", {"to": "orbax"}, None),
    "base-lerobot": ("orbax", {"to": "torch-base", "layout": "lerobot"}, None),
    "adapter": ("orbax", {"to": "peft-adapter"}, "base"),
    "adapter-kept-alpha": ("orbax", {"to": "peft-adapter", "keep_alpha": True}, "base"),
    "adapter-lerobot": ("orbax", {"to": "peft-adapter", "layout": "lerobot"}, "base-lerobot"),
    "base-transformers": ("orbax", {"to": "torch-base", "layout": "transformers"}, None),
    "adapter-transformers": ("orbax", {"to": "peft-adapter", "layout": "transformers"}, "base-transformers"),
    "adapter-on-orbax": ("orbax", {"to": "peft-adapter"}, "base-orbax"),
    "adapter-on-bfloat16": ("orbax", {"to": "peft-adapter"}, "base-bfloat16"),
    "folded": ("merged", {"to": "orbax"}, None),
    "folded-at-once": ("adapter", {"to": "orbax", "fold": True}, None),
    "joined": ("adapter", {"to": "orbax"}, None),
    "remerged": ("adapter", {"to": "torch-merged"}, None),
}


@dataclass(frozen=True)
class Forms:
    """Converts on demand below ``home``."""

    golden: Golden
    home: Path

    def __getitem__(self, name: str) -> Form:
        if name == "orbax":
            return Form(self.golden.checkpoint)
        source, options, base = RECIPES[name]
        path = self.home / self.golden.name / name
        if not path.exists():
            origin = self[source]
            scales = self.golden.options if source == "orbax" and options["to"] != "torch-base" else {}
            given = {"base": origin.base} if origin.base else {}
            bridge.convert(origin.path, path, **options, **scales, **given)
        return Form(path, self[base].path if base else None)
