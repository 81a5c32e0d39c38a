"""Proof that an adapter means what it should, by the PEFT that is installed.

PEFT passes over missing keys, unexpected keys, wrong alphas and permuted layers in silence. So a
written adapter is loaded by PEFT itself onto a skeleton with the true module paths, and everything
it made of it is compared with the plan and the source:

- the config, the tensors and their checksums, the modules, their scales, the base left alone, what
  PEFT would save again;
- every module's factors: the exact distance of their product from that of the leaf's factors;
- every module run by PEFT on random inputs, against the JAX runtime's two einsums;
- of every kind of module, one change of the weight as PEFT builds it, entry by entry.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from bridge.arrays import raw
from bridge.checkpoint.inputs import Inputs
from bridge.errors import Problem, ProofFailed, Refusal, ValueRefused, refuse_if
from bridge.formats.disk.location import Location
from bridge.formats.safetensors.peft import CONFIG, open_peft
from bridge.formats.safetensors.torch import TorchSource
from bridge.lora.distance import module_error, products
from bridge.lora.factors import Factors
from bridge.peft.config import PREFIX, A, AdapterConfig, module_of, read_config
from bridge.proof.peft_skeleton import (
    FIX,
    base_problems,
    import_peft,
    load_on_skeleton,
    lora_layers,
    reexport_problems,
)
from bridge.publish.record import RECORD
from bridge.rules.equation import Index
from bridge.rules.names import grouped, numberless
from bridge.rules.rule import Rule
from bridge.stream.factor_writers import AdapterWriter, Pair
from bridge.stream.output import Output
from bridge.stream.readers import Done
from bridge.stream.step import Step
from bridge.torch_arrays import one_thread

if TYPE_CHECKING:
    import torch

#: relative error allowed of a module's product, in the adapter's dtype
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}

#: random inputs a module is run on
TOKENS = 8
#: how much more of an error some inputs may show than its norm does; a wrong equation shows all of itself
SPREAD = 16
#: relative error that float32 may make of a module's output
ROUNDING = 8e-6

#: entries of a change of a weight that are built at once
TILE = 1 << 18


@dataclass(frozen=True)
class Proof:
    """What PEFT makes of an adapter, in numbers."""

    peft: str
    """Version of PEFT that loaded it."""
    errors: Mapping[str, float]
    """By module path: relative error (Frobenius) of the product of its factors."""
    outputs: Mapping[str, float]
    """By module path: relative difference of PEFT's output from the JAX runtime's, on random inputs, float32."""
    seconds: float
    """What it took after the tensors were written."""
    importing: float
    """The part of it spent waiting for PEFT to be imported."""

    @property
    def largest(self) -> float:
        """Largest error of a module."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        return f"PEFT {self.peft} loads {len(self.errors)} modules, largest error {self.largest:.1e}"


@dataclass(frozen=True)
class Prover:
    """A proof that an output must pass before it is published."""

    start: Callable[[], threading.Thread]
    """Called before the output is made: what the proof needs is imported meanwhile."""
    check: Callable[[Path, Output, Inputs, int, threading.Thread], Proof]
    """Check the finished directory. Raises ProofFailed."""


@dataclass(frozen=True)
class Check:
    """One number about one module."""

    module: str
    what: str
    error: float
    allowed: float
    finite: bool = True
    """Whether the factors are that PEFT loaded: an error that is not finite is then one of arithmetic."""


PRODUCT, OUTPUT = "the product of the factors", "the output"


def prove_adapter(
    directory: Path, output: Output, inputs: Inputs, workers: int, importing: threading.Thread | None = None
) -> Proof:
    """Load an adapter with PEFT and compare it with its plan and its source.

    Args:
        directory: the adapter.
        output: what was planned.
        inputs: what it was made from.
        workers: leaves checked at once.
        importing: from :func:`import_peft`, where it was called earlier.

    Raises:
        ValueRefused: factors are too large for the runtimes' arithmetic.
        ProofFailed: with every failed check.
    """
    began = time.perf_counter()
    try:
        source = open_peft(Location.parse(directory))
    except Refusal as refused:
        raise ProofFailed(*refused.problems) from refused
    config, problems = _planned_config(directory, source.metadata[CONFIG], output)
    # what PEFT makes of another config says nothing, and may take for ever
    if config is None:
        raise ProofFailed(*problems)
    problems += _file_problems(directory, source, output)
    waited = time.perf_counter()
    (importing or import_peft()).join()
    waited = time.perf_counter() - waited
    with one_thread():
        model, loaded = load_on_skeleton(directory, _weight_shapes(output, inputs))
        layers = lora_layers(model)
        planned = {
            _path(pair): pair
            for _, writer in output.steps_of(AdapterWriter)
            for pair in writer.pairs.values()
        }
        problems += [*loaded, *_module_problems(directory, layers, planned.keys())]
        problems += _saved_problems(directory, config, model, output)
        problems += _pattern_problems(directory, config, layers)
        problems += _scale_problems(directory, layers, planned)
        problems += reexport_problems(directory, model)
        problems += base_problems(directory, model)
        checks = _checks(output, inputs, workers, layers)
    overflows = grouped(
        dict.fromkeys(
            check.module
            for check in checks
            if check.what == OUTPUT and check.finite and not math.isfinite(check.error)
        )
    )
    refuse_if(
        [
            Problem(
                f"{inputs.source.source.location}: the factors of {module} overflow float32 where they are applied",
                "training diverged, or alpha is wrong: convert an earlier step",
            )
            for module in overflows
            if not problems
        ],
        ValueRefused,
    )
    problems += [
        Problem(
            f"{directory}: {check.what} of {check.module} is off by {check.error:.1e} (allowed {check.allowed:.1e})",
            FIX,
        )
        for check in checks
        if not check.error <= check.allowed
    ]
    refuse_if(problems, ProofFailed)
    return Proof(
        version("peft"),
        {check.module: check.error for check in checks if check.what == PRODUCT},
        {check.module: check.error for check in checks if check.what == OUTPUT},
        time.perf_counter() - began,
        waited,
    )


def _planned_config(
    directory: Path, written: Mapping[str, Any], output: Output
) -> tuple[AdapterConfig | None, list[Problem]]:
    """The config as bridge reads it, where it is the one that was planned."""
    planned = json.loads(output.files[CONFIG])
    config, problems = read_config(written, f"{directory}/{CONFIG}")
    # where the adapter lies may change, and PEFT notes its version
    free = {"base_model_name_or_path", "peft_version"}
    problems += [
        Problem(f"{directory}/{CONFIG}: {field} is not what was planned", FIX)
        for field in sorted((written.keys() | planned.keys()) - free)
        if (written.get(field) or None) != (planned.get(field) or None)
    ]
    return (None if problems else config), problems


def _file_problems(directory: Path, source: TorchSource, output: Output) -> list[Problem]:
    """Tensors that are not what was planned, or not what was written."""
    planned = output.specs
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


def _saved_problems(directory: Path, config: AdapterConfig, model: Any, output: Output) -> list[Problem]:
    """Modules that PEFT saves whole, and the plan does not; and the other way round."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    pairs = {name for step, _ in output.steps_of(AdapterWriter) for name in step.specs}
    planned = {module_of(name) for name in output.specs.keys() - pairs}
    return [
        Problem(
            f"{directory}: {name} is in modules_to_save of {'PEFT' if name in found else 'the plan'} only",
            FIX,
        )
        for name in sorted(found ^ planned)
    ] + [
        Problem(f"{directory}: modules_to_save names {name}, and no module of the model has that name", FIX)
        for name in config.modules_to_save
        if not any(module.endswith(name) for module in planned)
    ]


def _pattern_problems(directory: Path, config: AdapterConfig, modules: Mapping[str, Any]) -> list[Problem]:
    """Patterns that overlap: PEFT takes the first, and sorts them when it saves the adapter again."""
    return [
        Problem(f"{directory}: {len(hits)} patterns of {field} match {module}", FIX)
        for field, patterns in (
            ("rank_pattern", config.rank_patterns),
            ("alpha_pattern", config.alpha_patterns),
        )
        for module in modules
        if len(hits := patterns.all(module)) > 1
    ]


def _scale_problems(directory: Path, layers: Mapping[str, Any], planned: Mapping[str, Pair]) -> list[Problem]:
    return [
        Problem(f"{directory}: PEFT scales {module} by {scale}, not {pair.runtime}", FIX)
        for module, pair in planned.items()
        if module in layers
        if not math.isclose(scale := layers[module].scaling["default"], pair.runtime, rel_tol=1e-6)
    ]


def _weight_shapes(output: Output, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Every weight of the model that carries the adapter, by the name it has there.

    Without a base only the weights that an adapter changes have known shapes: those beside them, which it
    must not touch, are there with others.
    """
    model, rename = inputs.model, output.layout.rename
    shapes = {name: spec.shape for name, spec in inputs.weights.weight_specs().items()}
    for bound in model.bind(inputs.source.seen()):
        for name in bound.names.values():
            shapes.setdefault(name, (1,) * len(bound.rule.equation.right))
    tied = {alias: shapes[of] for alias, of in model.tied.items() if of in shapes}
    return {rename(name): shape for name, shape in {**tied, **shapes}.items()}


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


def _path(pair: Pair) -> str:
    return pair.a.removesuffix(A).removeprefix(PREFIX)


def _checks(output: Output, inputs: Inputs, workers: int, layers: Mapping[str, Any]) -> list[Check]:
    """Every number about every module; several leaves at once."""
    import torch

    steps = list(output.steps_of(AdapterWriter))
    samples = _one_of_each_kind(steps)

    def check(number: int) -> list[Check]:
        step, writer = steps[number]
        sampled = {index for which, index in samples if which == number}
        with torch.no_grad():
            return list(_step_checks(output, inputs, step, writer, number, sampled, layers))

    with ThreadPoolExecutor(workers) as pool:
        return [each for checks in pool.map(check, range(len(steps))) for each in checks]


def _step_checks(
    output: Output,
    inputs: Inputs,
    step: Step,
    writer: AdapterWriter,
    number: int,
    samples: Set[Index],
    layers: Mapping[str, Any],
) -> Iterator[Check]:
    """What PEFT made of the modules of one leaf, against the leaf's factors."""
    assert step.factors is not None
    change_at = step.factors.open(step.rule, inputs.sources, Done(), None)
    generator = np.random.default_rng(number)
    for index, pair in writer.pairs.items():
        module, change = _path(pair), change_at(index)
        assert change is not None
        factors = change.factors()
        # what PEFT did not load is among the problems already
        if module not in layers or any(weight.is_meta for weight in layers[module].parameters()):
            continue
        allowed = TOLERANCE[writer.dtype.name] + 1.001 * output.approximated.get(module, 0.0)
        yield from _module_checks(module, layers[module], step.rule, factors, allowed, generator)
        if index in samples:
            yield Check(module, "the change of the weight", _change_error(layers[module], factors), allowed)


def _one_of_each_kind(steps: Sequence[tuple[Step, AdapterWriter]]) -> set[tuple[int, Index]]:
    """One weight of each kind, by the number of its step: q, k and v, each of some layer."""
    kinds: dict[tuple[object, ...], list[tuple[int, Index]]] = {}
    for number, (step, writer) in enumerate(steps):
        rule = step.rule
        stacked = rule.lora.stacked if rule.lora is not None else ()
        for index in writer.pairs:
            numbers = zip(index, rule.equation.placeholders, strict=True)
            choice = tuple(n for n, axis in numbers if axis not in stacked)
            kinds.setdefault((step.part, numberless(rule.leaf), choice), []).append((number, index))
    return {same[kind % len(same)] for kind, same in enumerate(kinds.values())}


def _module_checks(
    module: str, layer: Any, rule: Rule, factors: Factors, allowed: float, generator: np.random.Generator
) -> Iterator[Check]:
    import torch

    lora_A, lora_B = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    lora_B = lora_B * layer.scaling["default"]
    error = module_error(lora_A, lora_B, factors)
    yield Check(module, PRODUCT, error, allowed)
    x = torch.from_numpy(generator.standard_normal((TOKENS, lora_A.shape[1]), dtype=np.float32))
    output = layer(x).double()
    error = _relative(output, _runtime_output(rule, factors, x.double()))
    finite = bool(lora_A.isfinite().all() and lora_B.isfinite().all())
    yield Check(module, OUTPUT, error, SPREAD * allowed, finite)
    error = _relative(output, x.double() @ lora_A.T @ lora_B.T)
    yield Check(module, "the output, by its own factors,", error, ROUNDING)


def _runtime_output(rule: Rule, factors: Factors, x: torch.Tensor) -> torch.Tensor:
    """What the JAX runtime's LoRA einsums give for inputs of one weight: (tokens, out), float64."""
    import torch

    if rule.runtime is None:
        result = x.new_empty(len(x), *(factors.sizes[axis] for axis in factors.axes.equation.right[0]))
        for at, b, a in products(factors.axes, factors.a, factors.b):
            rows = result[(slice(None), *at)]
            rows[...] = (x @ a.T @ b.T).reshape(rows.shape)
        return factors.scale * result.reshape(len(x), -1)
    a, b = (torch.from_numpy(factor.astype(np.float64)) for factor in (factors.a, factors.b))
    operands, _ = rule.runtime.split("->")
    labels, weight = operands.split(",")
    sizes = dict(zip(weight, (factors.sizes[axis] for axis in factors.axes.equation.left), strict=True))
    first, second = factors.axes.einsums(rule.runtime)
    middle = torch.einsum(first, x.reshape(1, len(x), *(sizes[label] for label in labels[2:])), a)
    return factors.scale * torch.einsum(second, middle, b).reshape(len(x), -1)


def _change_error(layer: Any, factors: Factors) -> float:
    """Relative error of what PEFT would add to the weight, some rows at a time."""
    import torch

    output, sizes = factors.axes.equation.right[0], factors.sizes
    whole = layer.lora_B["default"].weight
    spread = whole.reshape(*(sizes[axis] for axis in output), -1)
    gap = norm = 0.0
    try:
        for at, wide_b, wide_a in products(factors.axes, factors.a, factors.b):
            b, a = (factors.scale * wide_b).float(), wide_a.float()
            ours = spread[at].reshape(len(b), -1)
            step = max(1, TILE // a.shape[1])
            for start in range(0, len(b), step):
                rows = slice(start, start + step)
                layer.lora_B["default"].weight = torch.nn.Parameter(ours[rows], requires_grad=False)
                actual = layer.get_delta_weight("default")
                wanted = b[rows] @ a
                gap = math.hypot(gap, float(torch.linalg.norm(actual - wanted)))
                norm = math.hypot(norm, float(torch.linalg.norm(wanted)))
    finally:
        layer.lora_B["default"].weight = whole
    return gap / norm if norm else gap


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    gap, norm = float((actual - expected).norm()), float(expected.norm())
    return gap / norm if norm else gap


PEFT = Prover(import_peft, prove_adapter)
"""The installed PEFT loads an adapter, and applies all of it."""
