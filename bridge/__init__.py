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
    from bridge.conversion.job import Plan
    from bridge.conversion.plan import plan
    from bridge.conversion.run import Result, run
    from bridge.errors import Problem, Refusal
    from bridge.rules.model import Adapter, Companions, Facts, Layout, Model, Multiple, Part, Unused
    from bridge.rules.rule import Factors, Rule

_HOMES = {
    "api": ("Opened", "convert", "load_jax", "load_torch", "open"),
    "checkpoint.describe": ("Description", "describe"),
    "errors": ("Problem", "Refusal"),
    "rules.model": ("Adapter", "Companions", "Facts", "Layout", "Model", "Multiple", "Part", "Unused"),
    "conversion.job": ("Plan",),
    "conversion.plan": ("plan",),
    "rules.rule": ("Factors", "Rule"),
    "conversion.run": ("Result", "run"),
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
