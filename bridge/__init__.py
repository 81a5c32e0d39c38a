"""bridge: openpi's pi0 policies between Orbax/JAX, PyTorch and PEFT, with nothing dropped unnoticed.

>>> import bridge
>>> bridge.convert("checkpoints/pi0_lora/29999", "pi0_torch", to="torch-merged")  # doctest: +SKIP

Names are imported on first use, so that ``import bridge`` and ``bridge --help`` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.api import Opened, convert, load_jax, load_torch, open
    from bridge.checkpoint.describe import Description, describe
    from bridge.errors import Problem, Refusal
    from bridge.planned import Plan
    from bridge.planner import plan
    from bridge.rules.model import Adapter, Companions, Facts, Layout, Model, Multiple, Part, Unused
    from bridge.rules.rule import Factors, Rule
    from bridge.runner import Result, run

_HOMES = {
    "api": ("Opened", "convert", "load_jax", "load_torch", "open"),
    "checkpoint.describe": ("Description", "describe"),
    "errors": ("Problem", "Refusal"),
    "rules.model": ("Adapter", "Companions", "Facts", "Layout", "Model", "Multiple", "Part", "Unused"),
    "planned": ("Plan",),
    "planner": ("plan",),
    "rules.rule": ("Factors", "Rule"),
    "runner": ("Result", "run"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "Companions",
    "Description",
    "Factors",
    "Facts",
    "Layout",
    "Model",
    "Multiple",
    "Opened",
    "Part",
    "Plan",
    "Problem",
    "Refusal",
    "Result",
    "Rule",
    "Unused",
    "convert",
    "describe",
    "load_jax",
    "load_torch",
    "open",
    "plan",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    return getattr(import_module(f"bridge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
