"""Values of an ``adapter_config.json`` with which PEFT does not load an adapter at all.

Facts: peft 0.21, tuners/lora/config.py (``LoraConfig.__post_init__``, ``_get_lora_subconfig``),
tuners/lora/layer.py (``reset_lora_parameters``), utils/peft_types.py (``TaskType``). A test tries
every field with every kind of value on the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_TASKS = {"SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"}


def _object(value: object) -> bool:
    return isinstance(value, dict)


def _none(value: object) -> bool:
    return value is None


def _object_or_none(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _probability(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _task(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in _TASKS)


def _nothing(value: object) -> bool:
    return not value


def _initializer(value: object) -> bool:
    if isinstance(value, str) and value:
        # of all names, case is overlooked in this alone
        return value.lower() == "gaussian" or value.islower()
    return value is True or not value


#: field -> what PEFT takes, and that in words
_LOADED: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "rank_pattern": (_object, "an object"),
    "alpha_pattern": (_object, "an object"),
    "lora_dropout": (_probability, "a number from 0 to 1"),
    "task_type": (_task, f"null or one of {', '.join(sorted(_TASKS))}"),
    "init_lora_weights": (_initializer, "true, false or a name"),
    "megatron_config": (_nothing, "null, where Megatron is not installed"),
    "trainable_token_indices": (_none, "null, for an adapter of linear layers"),
    **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config"), (_none, "null, for plain LoRA")),
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"),
        (_object_or_none, "null or an object"),
    ),
}


def unloadable(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields of a config with which PEFT does not load it, each with what it would take."""
    for name, (loads, words) in _LOADED.items():
        if name in config and not loads(config[name]):
            yield name, words
    if config.get("target_modules", True) in ("", []):
        yield "target_modules", "a pattern, or a list of names"
