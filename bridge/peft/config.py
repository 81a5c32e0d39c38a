"""What a PEFT adapter's config says, and the config that says what bridge writes.

Facts: peft 0.21, tuners/lora/{config,layer}.py and utils/other.py. PEFT takes much in silence
(missing keys, a wrong alpha, patterns that overlap), so a config is read field by field here and
written in the one form that all consumers understand.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import Problem
from bridge.peft.patterns import SECONDS, Clock
from bridge.peft.targets import Targets, read_targets
from bridge.rules.names import Template
from bridge.strict_json import shown

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"

#: PEFT's default when the config does not say
DEFAULT_ALPHA = 8

MAX_MODULES_TO_SAVE = 2000

#: fields that do not change what a loaded LoRA adapter computes
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "task_type", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying", "velora_config",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save",
    "bias", "init_lora_weights", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an ``adapter_config.json`` that decide what the adapter computes."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    targets: Targets
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)

    def rank(self, module: str) -> int:
        """The rank PEFT gives a module. Raises TimeoutError for patterns that take too long."""
        return self.rank_pattern.get(self._first(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """The factor PEFT applies to a module's product at run time."""
        rank = self.rank(module)
        alpha = self.alpha_pattern.get(self._first(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def applies(self, module: str) -> bool:
        """Whether PEFT gives a linear layer LoRA. Raises TimeoutError for patterns that take too long."""
        return self.targets.include(module, self.clock)

    def saves(self, module: str) -> bool:
        """Whether PEFT keeps a copy of this module in the adapter: it, or one it is part of, is named."""
        paths = itertools.accumulate(module.split("."), "{}.{}".format)
        return any(path.endswith(self.modules_to_save) for path in paths)

    def _first(self, patterns: Mapping[str, object], module: str) -> str:
        return next(iter(self.clock.matching(patterns, module)), "")


def read_config(config: Mapping[str, Any], where: str) -> tuple[AdapterConfig | None, list[Problem]]:
    """Read a config, refusing by name whatever would make PEFT compute something else."""
    problems: list[Problem] = []
    clock = Clock()

    def refuse(cause: str, fix: str) -> None:
        problems.append(Problem(f"{where}: {cause}", fix))

    if config.get("peft_type") != "LORA":
        refuse(
            f"peft_type is {shown(config.get('peft_type'))}, not LORA", "bridge converts LoRA adapters only"
        )
    for name, value in config.items():
        if name not in _HARMLESS | _READ and value not in (None, False, {}, [], 0):
            refuse(
                f"{name} is {shown(value)}, which bridge does not convert",
                "merge the adapter in PEFT instead",
            )
    if config.get("bias", "none") != "none":
        refuse(
            f"bias is {shown(config['bias'])}: trained biases would be lost",
            "merge the adapter in PEFT instead",
        )
    if config.get("fan_in_fan_out"):
        refuse(
            "fan_in_fan_out is set: its weights are stored transposed", "merge the adapter in PEFT instead"
        )
    init = config.get("init_lora_weights", True)
    # openpi never uses these; PEFT changes the base when it loads such an adapter
    if isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal", "eva"):
        refuse(
            f"init_lora_weights is {shown(init)}, which changes the base weights",
            "convert it in PEFT first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    r, alpha = config.get("r", DEFAULT_ALPHA), config.get("lora_alpha", DEFAULT_ALPHA)
    if not _is_rank(r):
        refuse(f"r is {shown(r)}", "restore the config that was saved with the adapter")
    if not _number(alpha):
        refuse(f"lora_alpha is {shown(alpha)}", "restore the config that was saved with the adapter")
    patterns = {}
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _number)):
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(fits(number) for number in value.values()):
            refuse(f"{name} is {shown(value)}", "restore the config that was saved with the adapter")
            value = {}
        try:
            problems += [
                Problem(f"{where}: {name} holds a pattern that {why}", "restore the config that was saved")
                for pattern in value
                if (why := clock.check(pattern))
            ]
        except TimeoutError:
            refuse(f"{name} takes longer than {SECONDS:g} s to read", "restore the config that was saved")
        patterns[name] = value
    saved = config.get("modules_to_save") or []
    if (
        not isinstance(saved, list)
        or len(saved) > MAX_MODULES_TO_SAVE
        or not all(isinstance(name, str) for name in saved)
    ):
        refuse(f"modules_to_save is {shown(saved)}", "restore the config that was saved with the adapter")
        saved = []
    targets, faults = read_targets(config, saved, clock, where)
    problems += faults
    if problems or targets is None:
        return None, problems
    return (
        AdapterConfig(
            int(r),
            float(alpha),
            bool(config.get("use_rslora")),
            {key: int(number) for key, number in patterns["rank_pattern"].items()},
            {key: float(number) for key, number in patterns["alpha_pattern"].items()},
            tuple(saved),
            targets,
            clock,
        ),
        [],
    )


def _number(value: object) -> bool:
    # no alpha comes near it, and an int beyond a float's range has no float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_rank(value: object) -> bool:
    return isinstance(value, (int, float)) and _number(value) and int(value) == value and value >= 1


@dataclass(frozen=True)
class Target:
    """A family of modules of one rank and alpha: the weight template they belong to."""

    template: Template
    rank: int
    alpha: float


def compose_config(
    targets: Iterable[Target], base_name: str, modules_to_save: Iterable[str]
) -> dict[str, Any]:
    """The ``adapter_config.json`` for modules of any ranks and alphas.

    The commonest rank is ``r``; every other rank, and every alpha that is not ``lora_alpha``,
    stands in a pattern. Patterns are pinned to whole paths and match disjoint sets of modules,
    because PEFT takes the first that matches and sorts them when it saves.
    """
    every = list(targets)
    (r, alpha), _ = Counter((target.rank, target.alpha) for target in every).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": _plain(alpha),
        "target_modules": _pattern(target.template for target in every),
        "rank_pattern": _patterns((target.template, target.rank) for target in every if target.rank != r),
        "alpha_pattern": _patterns(
            (target.template, _plain(target.alpha)) for target in every if target.alpha != alpha
        ),
        "modules_to_save": list(modules_to_save) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _patterns(pairs: Iterable[tuple[Template, Any]]) -> dict[str, Any]:
    families: dict[Any, list[Template]] = {}
    for template, value in pairs:
        families.setdefault(value, []).append(template)
    return dict(sorted((f"^{_pattern(family)}", value) for value, family in families.items()))


def _pattern(templates: Iterable[Template]) -> str:
    """A regular expression that matches the module paths of templates whole, and no other path."""
    paths: list[tuple[str, ...]] = []
    for template in templates:
        # the last segment is `weight`: a module is named without it
        segments = [s.choices or (s.text if s.axis is None else r"\d+",) for s in template.segments[:-1]]
        paths += itertools.product(*segments)
    return _alternatives(paths)


def _alternatives(paths: list[tuple[str, ...]]) -> str:
    """Paths that share their first segments, written with those segments once."""
    tails: dict[str, list[tuple[str, ...]]] = {}
    for head, *tail in paths:
        tails.setdefault(head, []).append(tuple(tail))
    forms = [head if below == [()] else rf"{head}\.{_alternatives(below)}" for head, below in tails.items()]
    return forms[0] if len(forms) == 1 else f"({'|'.join(forms)})"


def module_of(weight: str) -> str:
    """Path of the module that a weight belongs to."""
    return weight.rpartition(".")[0]
