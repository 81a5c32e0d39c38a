"""Proof that an adapter means what it should, by the PEFT that is installed.

PEFT passes over missing keys, unexpected keys, wrong alphas and permuted layers in silence. So a
written adapter is loaded by PEFT itself onto a skeleton with the true module paths (weights of
stride zero: no memory), and everything it made of it is held against the plan and the source.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from bridge.axes import Index
from bridge.checkpoint import weight_names
from bridge.errors import Problem, ProofFailed, Refusal, refuse_if
from bridge.formats.location import Location
from bridge.formats.peft import CONFIG, FILE, open_peft
from bridge.formats.torch import TorchSource
from bridge.lora import delta, factor_axes
from bridge.peft import PREFIX, A, AdapterConfig, module_of, read_config
from bridge.pieces import Done, Factors
from bridge.publish import RECORD
from bridge.rule import Rule
from bridge.specs import FLOAT32, raw
from bridge.writers import AdapterWriter

if TYPE_CHECKING:
    import torch

    from bridge.planner import Plan

#: relative error allowed of a module's delta, in the adapter's dtype
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}
FIX = "this is a fault of bridge or of the installed PEFT: report it with the output of --dry-run"


def prove_adapter(directory: Path, plan: Plan) -> dict[str, float]:
    """Load an adapter with PEFT and hold it against the plan that made it and the source.

    Returns:
        Relative error of every module's ``get_delta_weight``, by module path.

    Raises:
        ProofFailed: with everything that does not hold.
    """
    try:
        source = open_peft(Location.parse(directory))
    except Refusal as refused:
        raise ProofFailed(*refused.problems) from refused
    config, problems = _planned_config(directory, source.metadata[CONFIG], plan)
    # what PEFT makes of another config says nothing, and may take for ever
    if config is None:
        raise ProofFailed(*problems)
    problems += _file_problems(directory, source, plan)
    model, loaded = load_on_skeleton(directory, _weight_shapes(plan))
    modules = _lora_modules(model)
    expected = dict(_expected(plan))
    problems += [*loaded, *_module_problems(directory, modules, expected.keys())]
    problems += _saved_problems(directory, config, model, plan)
    problems += _pattern_problems(directory, config, modules)
    problems += reexport_problems(directory, model)
    errors: dict[str, float] = {}
    for module in expected.keys() & modules.keys():
        layer, wanted = modules[module], expected[module]
        if any(layer.get_base_layer().weight.stride()):
            problems.append(Problem(f"{directory}: PEFT changes the base weight of {module}", FIX))
        scale = layer.scaling["default"]
        if not np.isclose(scale, wanted.scale, rtol=1e-6, atol=0):
            problems.append(Problem(f"{directory}: PEFT scales {module} by {scale}, not {wanted.scale}", FIX))
        actual = layer.get_delta_weight("default").detach().float().numpy()
        errors[module] = relative_error(actual, wanted.delta())
        if not errors[module] <= wanted.allowed:
            problems.append(
                Problem(
                    f"{directory}: the delta of {module} is off by {errors[module]:.1e} "
                    f"(allowed {wanted.allowed:.1e})",
                    FIX,
                )
            )
    refuse_if(problems, ProofFailed)
    return errors


def _planned_config(
    directory: Path, written: Mapping[str, Any], plan: Plan
) -> tuple[AdapterConfig | None, list[Problem]]:
    """The config as bridge reads it, where it is the one that was planned."""
    planned = json.loads(plan.output.files[CONFIG])
    config, problems = read_config(written, f"{directory}/{CONFIG}")
    # where the adapter lies may change, and PEFT notes its version
    free = {"base_model_name_or_path", "peft_version"}
    problems += [
        Problem(f"{directory}/{CONFIG}: {field} is not what was planned", FIX)
        for field in sorted((written.keys() | planned.keys()) - free)
        if (written.get(field) or None) != (planned.get(field) or None)
    ]
    return (None if problems else config), problems


def _file_problems(directory: Path, source: TorchSource, plan: Plan) -> list[Problem]:
    """Tensors that are not what was planned, or not what was written."""
    planned = plan.output.specs
    problems = [
        Problem(
            f"{directory}: {name} is {source.specs.get(name, 'missing')}, not {planned.get(name, 'planned')}",
            FIX,
        )
        for name in sorted(source.specs.keys() | planned.keys())
        if source.specs.get(name) != planned.get(name)
    ]
    record = directory / RECORD
    if record.is_file():
        tensors = json.loads(record.read_text())["tensors"]
        problems += [
            Problem(f"{directory}: {name} is not what {RECORD} says was written", FIX)
            for name in sorted(source.specs.keys() & tensors.keys())
            if xxhash.xxh3_128(raw(source.read(name))).hexdigest() != tensors[name]["checksum"]
        ]
    return problems


def _saved_problems(directory: Path, config: AdapterConfig, model: Any, plan: Plan) -> list[Problem]:
    """Modules that PEFT saves whole, and the plan does not; and the other way round."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    pairs = {
        name for step in plan.output.steps if isinstance(step.writer, AdapterWriter) for name in step.specs
    }
    planned = {module_of(name) for name in plan.output.specs.keys() - pairs}
    return [
        Problem(f"{directory}: {name} is saved whole by {'PEFT' if name in found else 'the plan'} alone", FIX)
        for name in sorted(found ^ planned)
    ] + [
        Problem(f"{directory}: modules_to_save names {name}, which is no module", FIX)
        for name in config.modules_to_save
        if not any(module.endswith(name) for module in planned)
    ]


def _pattern_problems(directory: Path, config: AdapterConfig, modules: Mapping[str, Any]) -> list[Problem]:
    """Patterns that overlap: PEFT takes the first, and sorts them when it saves the adapter again."""
    return [
        Problem(f"{directory}: {len(hits)} patterns of {field} match {module}", FIX)
        for field, patterns in (
            ("rank_pattern", config.rank_pattern),
            ("alpha_pattern", config.alpha_pattern),
        )
        for module in modules
        if len(hits := config.clock.matching(patterns, module)) > 1
    ]


def load_on_skeleton(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, list[Problem]]:
    """A PeftModel over a skeleton with these weights, and what loading said.

    Args:
        directory: the adapter.
        shapes: shape of every weight of the base model, by the name it has there.
    """
    from peft import PeftModel

    config = json.loads((directory / CONFIG).read_text())
    saved = tuple(config.get("modules_to_save") or ())
    problems: list[Problem] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(_skeleton(shapes, saved), directory, is_trainable=False)
        except Exception as error:
            said = " ".join(str(error).split())[:400]
            raise ProofFailed(Problem(f"{directory}: PEFT cannot load it: {said}", FIX)) from error
    problems += [
        Problem(f"{directory}: PEFT warns: {str(warning.message).splitlines()[0][:300]}", FIX)
        for warning in caught
        if not issubclass(warning.category, (DeprecationWarning, FutureWarning, ResourceWarning))
    ]
    return model, problems


def _skeleton(shapes: Mapping[str, tuple[int, ...]], saved: tuple[str, ...]) -> torch.nn.Module:
    """A tree of modules with the given weights. Weights take memory only where they are loaded."""
    import torch

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
            made = torch.nn.Linear(1, 1, bias=False, device="meta") if is_linear else torch.nn.Module()
            parent.add_module(last, made)
        leaf = getattr(parent, last)
        real = any(module.endswith(each) for each in saved)
        value = torch.zeros(shape) if real else torch.zeros(()).expand(shape)
        leaf.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        if isinstance(leaf, torch.nn.Linear) and name == "weight":
            leaf.out_features, leaf.in_features = shape
    return root


def _weight_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Every weight of the model that carries the adapter, by the name it has there."""
    model, sizes = plan.inputs.model, plan.inputs.source.sizes
    found = {}
    for part in model.parts:
        local = model.local_sizes(part.name, sizes)
        for rule in part.rules:
            for _, name in weight_names(rule, local):
                found[plan.layout.rename(name)] = rule.equation.weight_shape(local)
    return found


def _lora_modules(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected (Frobenius)."""
    gap, norm = float(np.linalg.norm(actual - expected)), float(np.linalg.norm(expected))
    return gap / norm if norm else gap


@dataclass(frozen=True)
class Expected:
    """What PEFT must make of a module."""

    scale: float
    delta: Callable[[], np.ndarray]
    """(out, in), from the source's leaves, by openpi's equations."""
    allowed: float


def _expected(plan: Plan) -> Iterator[tuple[str, Expected]]:
    from bridge.compare import compression_errors

    lossy = compression_errors(plan.inputs, plan.output)
    for step in plan.output.steps:
        if not isinstance(step.writer, AdapterWriter) or step.factors is None:
            continue
        factors_at = step.factors.open(step.rule, plan.inputs.sources, Done(), None)
        for index, pair in step.writer.pairs.items():
            module = pair.a.removesuffix(A)
            allowed = TOLERANCE[step.writer.dtype.name] + 1.001 * lossy.get(module, 0.0)
            wanted = partial(_delta, step.rule, factors_at, index)
            yield module.removeprefix(PREFIX), Expected(pair.runtime, wanted, allowed)


def _delta(rule: Rule, factors_at: Callable[[Index], Factors | None], index: Index) -> np.ndarray:
    factors = factors_at(index)
    assert factors is not None
    product = delta(factor_axes(rule.equation.one), factors.a.astype(FLOAT32), factors.b.astype(FLOAT32))
    return rule.equation.arrange(product * np.float32(factors.scale))


def _module_problems(directory: Path, modules: Mapping[str, Any], expected: Set[str]) -> list[Problem]:
    problems = [
        Problem(f"{directory}: PEFT gives LoRA to {module}, which the plan does not", FIX)
        for module in sorted(modules.keys() - expected)
    ]
    problems += [
        Problem(f"{directory}: PEFT gives no LoRA to {module}", FIX)
        for module in sorted(expected - modules.keys())
    ]
    return problems


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
        or not torch.equal(again[name].to(stored[name].dtype), stored[name])
    ]
    return problems
