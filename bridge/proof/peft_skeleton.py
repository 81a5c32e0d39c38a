"""An adapter loaded by the installed PEFT onto a model without weights.

The skeleton has the module paths and shapes of the model that the adapter is for. Its weights have
stride zero and take no memory, and its linear layers give zeros: what PEFT makes of a layer's
output is what the adapter adds to it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import Problem, ProofFailed
from bridge.formats.safetensors.peft import CONFIG, FILE
from bridge.peft.config import PREFIX

if TYPE_CHECKING:
    import torch

FIX = "this is a fault of bridge or of the installed PEFT: report it with the output of --dry-run"


def import_peft() -> threading.Thread:
    """Start importing PEFT, which takes seconds, while something else is done.

    Raises:
        ProofFailed: it is not installed.
    """
    for package in ("torch", "peft"):
        if find_spec(package) is None:
            cause = f"an adapter is proven by PEFT before it is published, and {package} is not installed"
            raise ProofFailed(Problem(cause, f"install it: pip install {package}"))

    def load() -> None:
        # what is wrong with the installation shows, and is said, where PEFT is used
        with contextlib.suppress(Exception):
            import peft  # noqa: F401

    thread = threading.Thread(target=load, name="import peft")
    thread.start()
    return thread


def load_on_skeleton(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, list[Problem]]:
    """A PeftModel over a skeleton with these weights, and what loading said.

    PEFT takes the tensors as the file holds them (``low_cpu_mem_usage``): what the file lacks stays
    on the meta device, where the usual way would leave random numbers.

    Args:
        directory: the adapter.
        shapes: shape of every weight of the base model, by the name it has there.

    Raises:
        ProofFailed: PEFT cannot load it.
    """
    from peft import PeftModel

    config = json.loads((directory / CONFIG).read_text())
    saved = tuple(config.get("modules_to_save") or ())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(
                _skeleton(shapes, saved), directory, is_trainable=False, low_cpu_mem_usage=True
            )
        except Exception as error:
            said = " ".join(str(error).split())[:400]
            raise ProofFailed(Problem(f"{directory}: PEFT cannot load it: {said}", FIX)) from error
    return model, [
        Problem(f"{directory}: PEFT warns: {str(warning.message).splitlines()[0][:300]}", FIX)
        for warning in caught
        if not issubclass(warning.category, (DeprecationWarning, FutureWarning, ResourceWarning))
    ]


def _skeleton(shapes: Mapping[str, tuple[int, ...]], saved: tuple[str, ...]) -> torch.nn.Module:
    """A tree of modules with the given weights, none of which takes memory."""
    import torch

    class Silent(torch.nn.Linear):
        """A linear layer of a base model whose weights are all zero."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input.new_zeros((*input.shape[:-1], self.out_features))

    root = torch.nn.Module()
    # PEFT asks a model for this when it saves and merges
    root.config = {"model_type": "custom"}  # type: ignore[assignment]
    for weight, shape in shapes.items():
        module, _, name = weight.rpartition(".")
        parent = root
        *parents, last = module.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        if not hasattr(parent, last):
            is_linear = f"{module}.weight" in shapes and len(shapes[f"{module}.weight"]) == 2
            made = Silent(1, 1, bias=False, device="meta") if is_linear else torch.nn.Module()
            parent.add_module(last, made)
        leaf = getattr(parent, last)
        # PEFT copies a module that it saves: a copy of stride zero would be a full one
        copied = any(module.endswith(each) for each in saved)
        value = torch.empty(shape, device="meta") if copied else torch.zeros(()).expand(shape)
        leaf.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        if isinstance(leaf, torch.nn.Linear) and name == "weight":
            leaf.out_features, leaf.in_features = shape
    return root


def lora_layers(model: Any) -> dict[str, Any]:
    """The modules that PEFT gave LoRA, by their path in the base model."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def base_problems(directory: Path, model: Any) -> list[Problem]:
    """Weights of the skeleton that loading the adapter has changed: they have memory of their own."""
    return [
        Problem(f"{directory}: PEFT changes the base weight {name.removeprefix(PREFIX)}", FIX)
        for name, weight in model.named_parameters()
        if not {"lora_A", "lora_B", "modules_to_save"} & set(name.split("."))
        and not weight.is_meta
        and any(weight.stride())
    ]


def reexport_problems(directory: Path, model: Any) -> list[Problem]:
    """Whether the tensors PEFT would save again are exactly those of the file."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(str(directory / FILE))
    again = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = [
        Problem(f"{directory}: {name} is in the file, and PEFT did not take it", FIX)
        for name in sorted(stored.keys() - again.keys())
    ]
    problems += [
        Problem(f"{directory}: PEFT has {name}, which is not in the file", FIX)
        for name in sorted(again.keys() - stored.keys())
    ]
    problems += [
        Problem(f"{directory}: PEFT holds other values than the file in {name}", FIX)
        for name in sorted(stored.keys() & again.keys())
        if again[name].shape != stored[name].shape
        or again[name].is_meta
        or not torch.equal(again[name].to(stored[name].dtype), stored[name])
    ]
    return problems
