"""What PEFT does not load, bridge does not take: every field of the config, with every kind of value."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from bridge.peft.config import read_config

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2.5, 2.0, "", "x", [], ["x"], {}, {"x": 1}, {"q_proj": None}, {"q_proj": 2.0},
    {"q_proj": "2"}, "NONE", "GAUSSIAN", "eva", "EVA", "pissa", "CAUSAL_LM",
]  # fmt: skip
#: what PEFT makes of these depends on the model, which a config does not tell
OF_THE_MODEL = {"target_modules", "layers_to_transform", "exclude_modules", "modules_to_save", "r"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    directory = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(network(), LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(directory)
    return directory


def network() -> Any:
    import torch

    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(5, 7, bias=False)})


def loads(directory: Path, config: dict[str, Any]) -> bool:
    from peft import PeftModel

    (directory / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PeftModel.from_pretrained(network(), directory)
        except Exception:
            return False
    return True


def test_what_peft_does_not_load_is_refused(adapter: Path) -> None:
    from peft import LoraConfig

    saved = json.loads((adapter / "adapter_config.json").read_text())
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init} | saved.keys()
    refused = []
    for name in sorted(fields - OF_THE_MODEL):
        for value in VALUES:
            config = {**saved, name: value}
            # a model that is no language model has no such task
            if (name, value) != ("task_type", "CAUSAL_LM") and not loads(adapter, config):
                read, problems = read_config(config, "adapter_config.json")
                assert read is None and problems, f"PEFT does not load {name} = {value!r}"
                refused.append(name)
    assert len(refused) > 150 and {"megatron_config", "rank_pattern", "lora_dropout", "task_type"} <= {
        *refused
    }


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rank_pattern", None, "rank_pattern is None, and PEFT takes an object there"),
        ("alpha_pattern", None, "alpha_pattern is None, and PEFT takes an object there"),
        ("rank_pattern", {"q_proj": 2.0}, "rank_pattern is {'q_proj': 2.0}"),
        ("r", 2.0, "r is 2.0"),
        (
            "megatron_config",
            {"x": 1},
            "megatron_config is {'x': 1}, and PEFT takes null, where Megatron is not",
        ),
        ("target_modules", [], "target_modules is [], and PEFT takes a pattern, or a list of names there"),
        ("lora_dropout", 3, "lora_dropout is 3, and PEFT takes a number from 0 to 1 there"),
    ],
)
def test_it_is_said_what_peft_takes(name: str, value: Any, says: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], name: value}
    read, problems = read_config(config, "adapter_config.json")
    assert read is None
    assert any(problem.cause.startswith(f"adapter_config.json: {says}") for problem in problems), problems


def test_what_peft_saves_is_taken(adapter: Path) -> None:
    from peft import LoraConfig

    LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]).save_pretrained(adapter)
    read, problems = read_config(json.loads((adapter / "adapter_config.json").read_text()), "x")
    assert problems == [] and read is not None
