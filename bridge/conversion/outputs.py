"""What a plan makes: the tensors of one output directory, the steps that fill them, the files beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bridge.arrays import FLOAT32, WEIGHT_DTYPES, Spec, widest
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.leaves import ROOT, SUFFIX
from bridge.checkpoint.scales import Scale
from bridge.formats.safetensors.peft import CONFIG
from bridge.graph import State
from bridge.lora.algebra import factor_shapes
from bridge.peft.config import PREFIX, A, B, Target, compose_config, module_of
from bridge.rules.model import Layout, Model, Part
from bridge.rules.rule import Rule
from bridge.stream.inputs import Inputs, factor_reader, kept_entries, leaf_factors, weights_reader
from bridge.stream.readers import (
    FactorReader,
    LeafFactors,
    LeafWeights,
    ModuleFactors,
    Weights,
)
from bridge.stream.step import Step
from bridge.stream.tiles import TILE
from bridge.stream.writers import AdapterWriter, FactorWriter, LeafWriter, Pair, TensorWriter, Writer


@dataclass(frozen=True)
class Output:
    """One directory of a plan."""

    state: State
    where: str
    """Its path below the destination; empty for the destination itself."""
    layout: Layout
    dtype: str
    steps: tuple[Step, ...]
    specs: Mapping[str, Spec]
    """Every tensor."""
    zeros: Mapping[str, str]
    """Tensors that are zeros -> the reason."""
    header: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files written beside the tensors."""
    approximated: Mapping[str, float] = field(default_factory=dict)
    """Modules of an adapter that are compressed -> relative error of the product of their factors."""

    @property
    def bytes_written(self) -> int:
        """Bytes written; tensors of zeros are a hole and take none."""
        return sum(step.bytes_written for step in self.steps) + sum(len(data) for data in self.files.values())

    @property
    def main_dtype(self) -> str:
        """dtype of most tensors."""
        return Counter(spec.dtype.name for spec in self.specs.values()).most_common(1)[0][0]

    def with_files(self, files: Mapping[str, bytes]) -> Output:
        return replace(self, files={**self.files, **files})


def tensor_output(
    inputs: Inputs, state: State, layout: Layout, dtype: str, scales: Mapping[str, Scale], *, fold: bool
) -> Output:
    """The weights of a state_dict, with factors folded into them where asked."""
    steps = tuple(
        _tensor_step(inputs, part, rule, layout, dtype, scales.get(part.name), fold=fold)
        for part in inputs.model.parts
        for rule in part.rules
    )
    specs = _collect(inputs.model, steps)
    # as safetensors' save_model records a tensor that is stored under another name
    header = {"format": "pt"}
    for alias, of in inputs.model.tied.items():
        if layout.rename(alias) not in specs:
            header[layout.rename(alias)] = layout.rename(of)
    zeros = {}
    for unused in inputs.model.unused:
        name = layout.rename(unused.weight)
        shape = tuple(inputs.weights.sizes[inputs.model.canonical.get(axis, axis)] for axis in unused.axes)
        narrow = min((spec.dtype for spec in specs.values()), key=lambda dtype: (dtype.itemsize, dtype.name))
        specs[name] = Spec(shape, narrow)
        zeros[name] = unused.reason
    return Output(state, "", layout, dtype, steps, dict(sorted(specs.items())), zeros, header)


def _tensor_step(
    inputs: Inputs,
    part: Part,
    rule: Rule,
    layout: Layout,
    dtype: str,
    scale: Scale | None,
    *,
    fold: bool,
) -> Step:
    sizes = inputs.model.local_sizes(part.name, inputs.weights.sizes)
    weights, rule, sizes = weights_reader(inputs, rule, sizes, flat=True)
    names = dict(rule.weights(sizes))
    factors = factor_reader(inputs, rule, names, scale) if fold else None
    stored = widest(inputs.spec(read).dtype for read in weights.reads)
    leaf_spec = Spec(rule.equation.leaf_shape(sizes), stored)
    spec = Spec(rule.equation.weight_shape(sizes), _dtype(rule, stored, dtype))
    writer = TensorWriter(
        {index: _written_names(inputs.model, layout, name) for index, name in names.items()}, spec
    )
    return _step(inputs, part, rule, weights, factors, writer, leaf_spec)


def leaf_output(
    inputs: Inputs,
    state: State,
    dtype: str,
    *,
    fold: bool,
    value_suffix: bool,
    ranks: Mapping[str, int],
    scales: Mapping[str, Scale],
    lossy: bool,
) -> Output:
    """A JAX pytree as openpi restores it, with LoRA leaves where an adapter is joined.

    Args:
        fold: sum the adapter's factors into the weights, and write no LoRA leaves.
        value_suffix: end leaf paths in ``value``, as training saves them.
        ranks: rank of the LoRA leaves by part; parts without one get none.
        scales: what openpi's runtime will multiply each part's products by.
        lossy: approximate factors that do not fit their part's rank.
    """
    steps = []
    for part in inputs.model.parts:
        sizes = inputs.model.local_sizes(part.name, inputs.weights.sizes)
        for rule in part.rules:
            weights, _, _ = weights_reader(inputs, rule, sizes, flat=False)
            names = dict(rule.weights(sizes))
            factors = factor_reader(inputs, rule, names, scales.get(part.name))
            stored = widest(inputs.spec(read).dtype for read in weights.reads)
            spec = Spec(rule.equation.leaf_shape(sizes), _dtype(rule, stored, dtype))
            writer = LeafWriter(_leaf_name(rule.leaf, value_suffix), spec)
            leaf_spec = Spec(spec.shape, stored)
            steps.append(_step(inputs, part, rule, weights, factors if fold else None, writer, leaf_spec))
            if fold or rule.lora is None or part.name not in ranks:
                continue
            if factors is None:
                factors = ModuleFactors({})
            steps.append(
                _factor_step(
                    inputs, part, rule, factors, spec.shape, sizes, dtype, value_suffix, ranks, scales, lossy
                )
            )
    specs = _collect(inputs.model, tuple(steps))
    return Output(
        state, "", inputs.model.layouts[0], dtype, tuple(steps), dict(sorted(specs.items())), {}, {}
    )


def _factor_step(
    inputs: Inputs,
    part: Part,
    rule: Rule,
    factors: FactorReader,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    dtype: str,
    value_suffix: bool,
    ranks: Mapping[str, int],
    scales: Mapping[str, Scale],
    lossy: bool,
) -> Step:
    assert rule.lora is not None and rule.factor_leaves is not None
    shape_a, shape_b = factor_shapes(shape, ranks[part.name])
    # openpi keeps factors in float32; an adapter's own dtype is kept where it is one
    held = widest(inputs.spec(read).dtype for read in factors.reads)
    written = held if dtype == "keep" else WEIGHT_DTYPES[dtype]
    a, b = (_leaf_name(leaf, value_suffix) for leaf in rule.factor_leaves)
    runtime = scales[part.name].value if rule.lora.scaled else 1.0
    writer = FactorWriter(a, b, Spec(shape_a, written), Spec(shape_b, written), sizes, runtime, lossy)
    return _step(inputs, part, rule, None, factors, writer, Spec(shape, held))


def _leaf_name(leaf: str, value_suffix: bool) -> str:
    return ROOT + leaf + (SUFFIX if value_suffix else "")


def adapter_output(
    checkpoint: Checkpoint,
    state: State,
    layout: Layout,
    dtype: str,
    scales: Mapping[str, Scale],
    *,
    keep_alpha: bool = False,
    rank: int | None = None,
    base_name: str = "",
    replaced: tuple[str, ...] = (),
) -> Output:
    """LoRA factors as an adapter set.

    Args:
        keep_alpha: write the factors as they are and the scale as alpha; else fold the scale
            into ``lora_B``, so that alpha equals the rank everywhere.
        rank: compress modules of a larger rank to this one.
        base_name: written as ``base_model_name_or_path``.
        replaced: weights (openpi's names) that the adapter carries whole, for ``modules_to_save``.
    """
    inputs = Inputs(checkpoint)
    steps: list[Step] = []
    targets: list[Target] = []
    for part, rule in checkpoint.lora_rules():
        sizes = checkpoint.model.local_sizes(part.name, checkpoint.sizes)
        factors = leaf_factors(checkpoint, rule, scales.get(part.name))
        leaf_spec = Spec(rule.equation.leaf_shape(sizes), inputs.spec(factors.reads[1]).dtype)
        full = checkpoint.rank(part.name, rule) * kept_entries(rule, sizes)
        held = full if rank is None else min(full, rank)
        runtime = factors.scale if keep_alpha else 1.0
        out, into = rule.equation.weight_shape(sizes)
        written = leaf_spec.dtype if dtype == "keep" else WEIGHT_DTYPES[dtype]
        pairs = {}
        for index, name in rule.weights(sizes):
            module = PREFIX + module_of(layout.rename(name))
            pairs[index] = Pair(
                module + A, module + B, Spec((held, into), written), Spec((out, held), written), runtime
            )
        writer = AdapterWriter(pairs, rank)
        steps.append(_step(inputs, part, rule, None, factors, writer, leaf_spec))
        template = replace(rule.template, text=layout.rename(rule.weight))
        targets.append(Target(template, held, runtime * held))
    modules = tuple(dict.fromkeys(module_of(layout.rename(name)) for name in replaced))
    steps += _replaced_steps(inputs, layout, replaced)
    config = compose_config(targets, base_name, modules)
    specs = _collect(checkpoint.model, tuple(steps))
    return Output(
        state,
        "",
        layout,
        dtype,
        tuple(steps),
        dict(sorted(specs.items())),
        {},
        {"format": "pt"},
        {CONFIG: _json(config)},
    )


def _replaced_steps(inputs: Inputs, layout: Layout, replaced: tuple[str, ...]) -> Iterator[Step]:
    """Steps that write whole weights into an adapter, under the names modules_to_save has."""
    wanted = set(replaced)
    for part in inputs.model.parts:
        sizes = inputs.model.local_sizes(part.name, inputs.source.sizes)
        for rule in part.rules:
            names = {i: (PREFIX + layout.rename(n),) for i, n in rule.weights(sizes) if n in wanted}
            if not names:
                continue
            weights = LeafWeights("source", inputs.source.stored[rule.leaf])
            dtype = inputs.spec(weights.reads[0]).dtype
            spec = Spec(rule.equation.weight_shape(sizes), dtype)
            leaf_spec = Spec(rule.equation.leaf_shape(sizes), dtype)
            yield _step(inputs, part, rule, weights, None, TensorWriter(names, spec), leaf_spec)


#: what the tiles of a worker take
TILES = 4 * TILE * FLOAT32.itemsize


def _step(
    inputs: Inputs,
    part: Part,
    rule: Rule,
    weights: Weights | None,
    factors: FactorReader | None,
    writer: Writer,
    leaf_spec: Spec,
) -> Step:
    step = Step(rule, part.name, weights, factors, writer, leaf_spec, 0, 0)
    stored = sum(inputs.sources[source].stored_bytes(name) for source, name in step.reads)
    return replace(step, bytes_read=stored, memory=_memory(inputs, step))


def _memory(inputs: Inputs, step: Step) -> int:
    """Bytes that a step has in memory at its fullest."""
    specs = [inputs.spec(read) for read in (step.factors.reads if step.factors else ())]
    # a leaf's factors are read whole; a module's are read a pair at a time
    factors = sum(s.nbytes for s in specs) if isinstance(step.factors, LeafFactors) else 0
    one = max((spec.size for spec in step.specs.values()), default=0)
    if step.weights is None:
        return factors + 6 * one * FLOAT32.itemsize
    assert isinstance(step.writer, TensorWriter | LeafWriter)
    source, name = step.weights.reads[0]
    slab = inputs.sources[source].buffered_bytes(name)
    return slab + factors + step.writer.held(step.rule, step.sizes) + TILES


def _dtype(rule: Rule, stored: np.dtype, dtype: str) -> np.dtype:
    if dtype == "keep":
        return stored
    wanted = WEIGHT_DTYPES[dtype]
    held = WEIGHT_DTYPES[rule.hold] if rule.hold is not None else wanted
    return held if held.itemsize > wanted.itemsize else wanted


def _written_names(model: Model, layout: Layout, name: str) -> tuple[str, ...]:
    """The names a weight is written under: its own, and its aliases where the layout does not tie."""
    aliases = () if layout.ties else tuple(alias for alias, of in model.tied.items() if of == name)
    return tuple(dict.fromkeys(layout.rename(each) for each in (name, *aliases)))


def _collect(model: Model, steps: tuple[Step, ...]) -> dict[str, Spec]:
    """Every tensor that the steps write, each once."""
    specs: dict[str, Spec] = {}
    for step in steps:
        for name, spec in step.specs.items():
            if name in specs:
                raise ValueError(f"model {model.name}: two rules write {name}")
            specs[name] = spec
    return specs


def _json(value: Any) -> bytes:
    import json

    return (json.dumps(value, indent=2) + "\n").encode()
