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
from dataclasses import dataclass
from typing import Any

from bridge.errors import Problem
from bridge.names import Template

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"

#: PEFT's default when the config does not say
DEFAULT_ALPHA = 8
MAX_PATTERN = 8192
SECONDS = 2.0

#: fields that do not change what a loaded LoRA adapter computes
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "task_type", "target_modules", "exclude_modules", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "layers_pattern", "qalora_group_size",
    "layers_to_transform", "ensure_weight_tying", "monteclora_config", "velora_config", "arrow_config",
    "kasa_config",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save",
    "bias", "init_lora_weights", "fan_in_fan_out",
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

    def rank(self, module: str) -> int:
        """The rank PEFT gives a module. Raises TimeoutError for a pattern that takes too long."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """The factor PEFT applies to a module's product at run time."""
        rank = self.rank(module)
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _matching(patterns: Iterable[str], module: str) -> str:
    """The first pattern that matches, as PEFT's ``get_pattern_key`` finds it, in bounded time."""
    import regex

    for pattern in patterns:
        if regex.match(rf"(.*\.)?({pattern})$", module, timeout=SECONDS):
            return pattern
    return ""


def read_config(config: Mapping[str, Any], where: str) -> tuple[AdapterConfig | None, list[Problem]]:
    """Read a config, refusing by name whatever would make PEFT compute something else."""
    problems: list[Problem] = []

    def refuse(cause: str, fix: str) -> None:
        problems.append(Problem(f"{where}: {cause}", fix))

    if config.get("peft_type") != "LORA":
        refuse(f"peft_type is {config.get('peft_type')!r}, not LORA", "bridge converts LoRA adapters only")
    for field, value in config.items():
        if field not in _HARMLESS | _READ and value not in (None, False, {}, [], 0):
            refuse(
                f"{field} is {value!r}, which bridge does not convert", "merge the adapter in PEFT instead"
            )
    if config.get("bias", "none") != "none":
        refuse(
            f"bias is {config['bias']!r}: trained biases would be lost", "merge the adapter in PEFT instead"
        )
    if config.get("fan_in_fan_out"):
        refuse(
            "fan_in_fan_out is set: its weights are stored transposed", "merge the adapter in PEFT instead"
        )
    init = config.get("init_lora_weights", True)
    # openpi never uses these; PEFT changes the base when it loads such an adapter
    if isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal", "eva"):
        refuse(
            f"init_lora_weights is {init!r}, which changes the base weights",
            "convert it in PEFT first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    r, alpha = config.get("r", DEFAULT_ALPHA), config.get("lora_alpha", DEFAULT_ALPHA)
    if not _number(r) or int(r) != r or r < 1:
        refuse(f"r is {r!r}", "restore the config that was saved with the adapter")
    if not _number(alpha):
        refuse(f"lora_alpha is {alpha!r}", "restore the config that was saved with the adapter")
    patterns = {}
    for field in ("rank_pattern", "alpha_pattern"):
        value = config.get(field) or {}
        if not isinstance(value, dict) or not all(_number(number) for number in value.values()):
            refuse(f"{field} is {value!r}"[:200], "restore the config that was saved with the adapter")
            value = {}
        problems += [
            Problem(f"{where}: {field} holds a pattern that {why}", "restore the config that was saved")
            for pattern in value
            if (why := _bad_pattern(pattern))
        ]
        patterns[field] = value
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        refuse(f"modules_to_save is {saved!r}"[:200], "restore the config that was saved with the adapter")
    if problems:
        return None, problems
    return (
        AdapterConfig(
            int(r),
            float(alpha),
            bool(config.get("use_rslora")),
            {key: int(number) for key, number in patterns["rank_pattern"].items()},
            {key: float(number) for key, number in patterns["alpha_pattern"].items()},
            tuple(saved),
        ),
        [],
    )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _bad_pattern(pattern: str) -> str:
    import regex

    if len(pattern) > MAX_PATTERN:
        return f"has {len(pattern)} characters"
    try:
        regex.compile(pattern)
    except regex.error as error:
        return f"is no regular expression ({error})"
    # one look at a name like those it will meet: a pattern that hangs is found here
    try:
        _matching([pattern], "model.layers.17.self_attn.q_proj_" + "a" * 40)
    except TimeoutError:
        return f"takes longer than {SECONDS:g} s to match"
    return ""


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
