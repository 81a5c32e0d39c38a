"""Real PEFT: models that carry an adapter, adapters that it trains, and what modules compute."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from tests.kit import golden
from tests.kit.checkpoints import Array
from tests.kit.golden import BLOCK, Recorded, State

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
A, B = ".lora_A.weight", ".lora_B.weight"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

#: Where each layout has the layers of the two experts.
GEMMAS = {
    "openpi": tuple(f"{prefix}.layers" for _, _, prefix in golden.EXPERTS),
    "lerobot": tuple(f"model.{prefix}.layers" for _, _, prefix in golden.EXPERTS),
    "transformers": ("model.vlm.language_model.layers", "model.dit.layers"),
}
#: A golden checkpoint with LoRA, and a layout of its model.
CASES = [
    (name, layout)
    for name in golden.WITH_LORA
    for layout in GEMMAS
    if (name, layout) != ("pi05_lora", "transformers")
]


# A model that carries an adapter.


def tree_of(state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Modules with the paths and weights of a state_dict; matrices are linear layers, SigLIP's as well."""
    root = torch.nn.Module()
    for name, weight in state.items():
        *parents, last, kind = name.split(".")
        parent = root
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        if last not in parent._modules:
            matrix = f"{name.rpartition('.')[0]}.weight"
            shape = state[matrix].shape if matrix in state else ()
            module = (
                torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
                if len(shape) == 2
                else torch.nn.Module()
            )
            parent.add_module(last, module)
        parameter = torch.nn.Parameter(weight.clone(), requires_grad=False)
        parent.get_submodule(last).register_parameter(kind, parameter)
    return root


def load_adapter(base: State, adapter: Path) -> Any:
    """A PeftModel of a base's weights; whatever PEFT warns of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(tree_of(base), adapter)


def lora_modules(model: Any) -> dict[str, Any]:
    """Path in the base model -> PEFT's LoRA layer."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def module_errors(
    recorded: Recorded, model: Any, layout: str, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Relative error of every recorded projection, and of every feed-forward as a whole.

    max |difference| / max |recorded|, by `<path>.<module>`.
    """
    assert torch.get_float32_matmul_precision() == "highest"
    errors = {}
    for key in recorded:
        if not key.endswith("/input"):
            continue
        leaf = key.removesuffix("/input")
        parsed = re.fullmatch(rf"{BLOCK}/(?:attn/)?(\w+?)(_1)?/(\d+)", leaf)
        assert parsed is not None
        kind, suffix, number = parsed.groups()
        layer = f"{GEMMAS[layout][suffix == '_1']}.{number}"
        x = torch.from_numpy(recorded[key]).to(dtype)
        expected = recorded[f"{leaf}/output"].astype(np.float64)
        for name, got, wanted in _outputs(model, layer, kind, x, expected):
            off = np.abs(got.to(torch.float64).numpy().reshape(wanted.shape) - wanted).max()
            errors[f"{layer}.{name}"] = float(off / np.abs(wanted).max())
    assert errors, "nothing was compared"
    return errors


def _outputs(
    model: Any, layer: str, kind: str, x: torch.Tensor, expected: Array
) -> Iterator[tuple[str, torch.Tensor, Array]]:
    def apply(name: str, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model.get_submodule(f"{PREFIX}{layer}.{name}")(x)
        return result

    with torch.no_grad():
        if kind == "mlp":
            gate = F.gelu(apply("mlp.gate_proj", x), approximate="tanh")
            yield "mlp", apply("mlp.down_proj", gate * apply("mlp.up_proj", x)), expected
        elif kind == "attn_vec_einsum":
            yield "self_attn.o_proj", apply("self_attn.o_proj", x.flatten(-2)), expected
        elif kind == "q_einsum":
            yield "self_attn.q_proj", apply("self_attn.q_proj", x), expected
        else:
            names = {"kv_einsum": "kv", "qkv_einsum": "qkv"}[kind]
            for name, wanted in zip(names, expected, strict=True):
                yield f"self_attn.{name}_proj", apply(f"self_attn.{name}_proj", x), wanted


# Its files.


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    return config


def tensors_of(directory: Path) -> State:
    state: State = safetensors.torch.load_file(directory / WEIGHTS)
    return state


# As PEFT trains and merges.


def train(base: State, config: Any, directory: Path) -> State:
    """Make an adapter as PEFT does, with random numbers for training; returns what PEFT merges.

    Everything is float32 here: the tensors are what `save_pretrained` writes.
    """
    torch.manual_seed(0)
    model = get_peft_model(tree_of(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name or "modules_to_save" in name
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(directory)
    return merged_by_peft(model)


def merged_by_peft(model: Any) -> State:
    state: State = model.merge_and_unload().state_dict()
    return {name: weight.detach() for name, weight in state.items()}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    gap = torch.linalg.vector_norm(actual.double() - expected.double())
    norm = float(torch.linalg.vector_norm(expected.double()))
    return float(gap) / norm if norm else float(gap)
