"""The ``adapter_config.json`` of PEFT adapters, read and composed.

Facts: peft 0.21, tuners/lora/{config,layer}.py and utils/other.py. PEFT silently accepts missing
keys, a wrong alpha and overlapping patterns, so a config is read field by field here, and composed
in the one form that all consumers understand.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bridge.errors import Problem
from bridge.peft.fields import unloadable
from bridge.peft.patterns import Clock, Patterns
from bridge.peft.targets import RESTORE, Targets, read_targets
from bridge.rules.names import Segment, Template
from bridge.strict_json import shown

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"

#: PEFT's default of both r and lora_alpha
DEFAULT_ALPHA = 8

MAX_MODULES_TO_SAVE = 2000
MERGE = "merge it into its base with PEFT (merge_and_unload), and convert the result"

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
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an ``adapter_config.json`` that determine what the adapter computes."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    targets: Targets
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)

    def rank(self, module: str) -> int:
        """The rank of a module. Raises TimeoutError if matching the patterns takes too long."""
        pattern = self.rank_patterns.first(module)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def scale(self, module: str, rank: int | None = None) -> float:
        """The scale of a module's product at run time, whose rank may be given. Raises TimeoutError, as
        :meth:`rank` does."""
        rank, alpha = rank or self.rank(module), self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def alpha_of(self, module: str) -> float:
        """The alpha of a module. Raises TimeoutError, as :meth:`rank` does."""
        pattern = self.alpha_patterns.first(module)
        return self.alpha if pattern is None else self.alpha_pattern[pattern]

    @cached_property
    def rank_patterns(self) -> Patterns:
        return Patterns(self.rank_pattern, self.clock)

    @cached_property
    def alpha_patterns(self) -> Patterns:
        return Patterns(self.alpha_pattern, self.clock)

    def applies(self, module: str) -> bool:
        """Whether PEFT adds LoRA to a linear layer. Raises TimeoutError, as :meth:`rank` does."""
        return self.targets.include(module, self.clock)

    def saves(self, module: str) -> bool:
        """Whether PEFT saves a copy of this module, or of one that contains it, in the adapter."""
        if not self.modules_to_save:
            return False
        paths = itertools.accumulate(module.split("."), "{}.{}".format)
        return any(path[-length:] in names for path in paths for length, names in self._saved.items())

    @cached_property
    def _saved(self) -> Mapping[int, Collection[str]]:
        """The ends of paths that are saved whole, by their lengths: there may be thousands."""
        by_length: dict[int, set[str]] = {}
        for name in self.modules_to_save:
            by_length.setdefault(len(name), set()).add(name)
        return by_length


def read_config(
    config: Mapping[str, Any], where: str, modules: int = 0
) -> tuple[AdapterConfig | None, list[Problem]]:
    """Read a config; a problem names each field that would make PEFT compute something else.

    Args:
        config: the JSON object.
        where: its file, for messages.
        modules: how many its patterns will be matched with, as far as that is known.
    """
    problems: list[Problem] = []
    clock = Clock(modules=modules)

    def refuse(cause: str, fix: str) -> None:
        problems.append(Problem(f"{where}: {cause}", fix))

    if config.get("peft_type") != "LORA":
        refuse(
            f"peft_type is {shown(config.get('peft_type'))}, not LORA", "bridge converts LoRA adapters only"
        )
    if config.get("use_dora"):
        refuse(f"it is DoRA (use_dora is {shown(config['use_dora'])}), which bridge does not convert", MERGE)
    for name, value in config.items():
        if name not in _HARMLESS | _READ and value not in (None, False, {}, [], 0):
            refuse(
                f"{name} is {shown(value)}, which bridge does not convert",
                MERGE,
            )
    for name, words in unloadable(config):
        refuse(f"{name} is {shown(config[name])}, and PEFT takes {words} there", RESTORE)
    if config.get("bias", "none") != "none":
        refuse(
            f"bias is {shown(config['bias'])}: it has trained biases, which bridge does not convert",
            MERGE,
        )
    if config.get("fan_in_fan_out"):
        refuse("fan_in_fan_out is set: its weights are stored transposed", MERGE)
    init = config.get("init_lora_weights", True)
    # PEFT changes the base when it loads such an adapter
    if isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal", "eva"):
        refuse(
            f"init_lora_weights is {shown(init)}, which changes the base weights",
            "convert it in PEFT first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    r, alpha = config.get("r", DEFAULT_ALPHA), config.get("lora_alpha", DEFAULT_ALPHA)
    if not _is_rank(r):
        refuse(f"r is {shown(r)}", RESTORE)
    if not _number(alpha):
        refuse(f"lora_alpha is {shown(alpha)}", RESTORE)
    patterns = {}
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _number)):
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(fits(number) for number in value.values()):
            refuse(f"{name} is {shown(value)}", RESTORE)
            value = {}
        try:
            problems += [
                Problem(f"{where}: {name} has a pattern that {why}", RESTORE)
                for pattern in value
                if (why := clock.check(pattern))
            ]
        except TimeoutError:
            refuse(f"matching the patterns of {name} {clock.spent}", RESTORE)
        patterns[name] = value
    saved = config.get("modules_to_save") or []
    if (
        not isinstance(saved, list)
        or len(saved) > MAX_MODULES_TO_SAVE
        or not all(isinstance(name, str) for name in saved)
    ):
        refuse(f"modules_to_save is {shown(saved)}", RESTORE)
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
    # far above any alpha; a larger int may not convert to float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_rank(value: object) -> bool:
    # PEFT takes no float for a rank, not even a whole one
    return isinstance(value, int) and _number(value) and value >= 1


@dataclass(frozen=True)
class Target:
    """Modules of one rank and alpha, by the template of their weights."""

    template: Template
    rank: int
    alpha: float
    numbers: Mapping[str, Collection[int]] = field(default_factory=dict)
    """Those that a placeholder stands for; an axis that is not here stands for any."""

    @property
    def paths(self) -> Iterator[tuple[str, ...]]:
        """The modules' paths as patterns, by their segments: without the last, `weight`."""
        segments = [s.choices or (self._segment(s),) for s in self.template.segments[:-1]]
        return itertools.product(*segments)

    def _segment(self, segment: Segment) -> str:
        if segment.axis is None:
            return segment.text
        numbers = sorted(self.numbers.get(segment.axis, ()))
        return (
            r"\d+" if not numbers else f"({'|'.join(map(str, numbers))})" if numbers[1:] else str(numbers[0])
        )


def targets_of(modules: Iterable[tuple[Template, Mapping[str, int], int, float]]) -> Iterator[Target]:
    """Modules, each the template of its weight at an index, its rank and its alpha: alike ones together."""
    alike: dict[tuple[str, int, float], list[dict[str, int]]] = {}
    for template, at, rank, alpha in modules:
        # one axis is left open
        axis = template.numbered[-1:]
        text = template.format({name: number for name, number in at.items() if name not in axis})
        alike.setdefault((text, rank, alpha), []).append({name: at[name] for name in axis})
    for (text, rank, alpha), places in alike.items():
        numbers = {axis: [at[axis] for at in places] for axis in places[0]}
        yield Target(Template(text), rank, alpha, numbers)


def compose_config(
    targets: Iterable[Target], base_name: str, modules_to_save: Iterable[str]
) -> dict[str, Any]:
    """The ``adapter_config.json`` of modules with any ranks and alphas.

    The most common pair becomes ``r`` and ``lora_alpha``; other ranks and alphas go into patterns.
    Patterns match whole paths and disjoint sets of modules, because PEFT uses the first that
    matches and sorts them when it saves.
    """
    modules = list(targets)
    (r, alpha), _ = Counter((target.rank, target.alpha) for target in modules).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": _plain(alpha),
        "target_modules": _pattern(modules),
        "rank_pattern": _patterns((target, target.rank) for target in modules if target.rank != r),
        "alpha_pattern": _patterns(
            (target, _plain(target.alpha)) for target in modules if target.alpha != alpha
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


def _patterns(pairs: Iterable[tuple[Target, Any]]) -> dict[str, Any]:
    groups: dict[Any, list[Target]] = {}
    for target, value in pairs:
        groups.setdefault(value, []).append(target)
    return dict(sorted((f"^{_pattern(group)}", value) for value, group in groups.items()))


def _pattern(targets: Iterable[Target]) -> str:
    """A regular expression that fully matches the module paths of targets, and no other path."""
    return _alternatives([path for target in targets for path in target.paths])


def _alternatives(paths: list[tuple[str, ...]]) -> str:
    """An alternation of paths, with common first segments factored out."""
    tails: dict[str, list[tuple[str, ...]]] = {}
    for head, *tail in paths:
        tails.setdefault(head, []).append(tuple(tail))
    forms = [head if below == [()] else rf"{head}\.{_alternatives(below)}" for head, below in tails.items()]
    return forms[0] if len(forms) == 1 else f"({'|'.join(forms)})"


def module_of(weight: str) -> str:
    """The path of the module that a weight belongs to."""
    return weight.rpartition(".")[0]
