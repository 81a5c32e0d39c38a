"""bridge: models fine-tuned in JAX between Orbax, PyTorch and PEFT, LoRA included, with nothing dropped unnoticed.

>>> import bridge
>>> bridge.convert("checkpoints/my_run/29999", "my_model", to="torch-merged")  # doctest: +SKIP

Names are imported on first use, so that ``import bridge`` and ``bridge --help`` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.api import Opened, convert, load_jax, load_nnx, load_torch, open
    from bridge.arrays import Spec
    from bridge.checkpoint.describe import Description, describe
    from bridge.checkpoint.options import OpenOptions, SourceOptions
    from bridge.compare.diff import Comparison, diff
    from bridge.conversion.options import Options
    from bridge.conversion.plan import Plan, plan
    from bridge.conversion.run import Result, run
    from bridge.errors import Problem, Refusal, SourceRefused
    from bridge.formats.contract import Format, Sink, Source, Timings
    from bridge.formats.disk.location import Location
    from bridge.graph import Form, State
    from bridge.proof.options import VerifyOptions
    from bridge.proof.verify import Verdict, verify
    from bridge.rules.equation import Equation
    from bridge.rules.fact import IN_WEIGHTS, Damage, Fact, FactKind, FactTable, Reading
    from bridge.rules.factoring import Factoring, by_role, last_two_axes
    from bridge.rules.family import AssetDirectory, Companions, Facts, Family, FullModel, Resize, Tree
    from bridge.rules.initialiser import LecunNormal, Normal, Zeros
    from bridge.rules.model import Layout, Model, Multiple, Part, Unused
    from bridge.rules.option import Choice, File, Flag, Number, Option, Text
    from bridge.rules.rule import Rule

# No module or folder directly in bridge/ may have one of these names: importing it would replace the name.
_HOMES = {
    "api": ("Opened", "convert", "load_jax", "load_nnx", "load_torch", "open"),
    "arrays": ("Spec",),
    "checkpoint.describe": ("Description", "describe"),
    "checkpoint.options": ("OpenOptions", "SourceOptions"),
    "compare.diff": ("Comparison", "diff"),
    "conversion.options": ("Options",),
    "conversion.plan": ("Plan", "plan"),
    "conversion.run": ("Result", "run"),
    "errors": ("Problem", "Refusal", "SourceRefused"),
    "formats.contract": ("Format", "Sink", "Source", "Timings"),
    "formats.disk.location": ("Location",),
    "graph": ("Form", "State"),
    "proof.options": ("VerifyOptions",),
    "proof.verify": ("Verdict", "verify"),
    "rules.equation": ("Equation",),
    "rules.fact": ("IN_WEIGHTS", "Damage", "Fact", "FactKind", "FactTable", "Reading"),
    "rules.factoring": ("Factoring", "by_role", "last_two_axes"),
    "rules.initialiser": ("LecunNormal", "Normal", "Zeros"),
    "rules.family": ("AssetDirectory", "Companions", "Facts", "Family", "FullModel", "Resize", "Tree"),
    "rules.model": ("Layout", "Model", "Multiple", "Part", "Unused"),
    "rules.option": ("Choice", "File", "Flag", "Number", "Option", "Text"),
    "rules.rule": ("Rule",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IN_WEIGHTS",
    "AssetDirectory",
    "Choice",
    "Companions",
    "Comparison",
    "Damage",
    "Description",
    "Equation",
    "Fact",
    "FactKind",
    "FactTable",
    "Factoring",
    "Facts",
    "Family",
    "File",
    "Flag",
    "Form",
    "Format",
    "FullModel",
    "Layout",
    "LecunNormal",
    "Location",
    "Model",
    "Multiple",
    "Normal",
    "Number",
    "OpenOptions",
    "Opened",
    "Option",
    "Options",
    "Part",
    "Plan",
    "Problem",
    "Reading",
    "Refusal",
    "Resize",
    "Result",
    "Rule",
    "Sink",
    "Source",
    "SourceOptions",
    "SourceRefused",
    "Spec",
    "State",
    "Text",
    "Timings",
    "Tree",
    "Unused",
    "Verdict",
    "VerifyOptions",
    "Zeros",
    "by_role",
    "convert",
    "describe",
    "diff",
    "last_two_axes",
    "load_jax",
    "load_nnx",
    "load_torch",
    "open",
    "plan",
    "run",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    return getattr(import_module(f"bridge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
