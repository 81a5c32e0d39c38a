"""Planning a PEFT adapter: its factors, what must stand beside it, and what servers will say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bridge.arrays import FLOAT32, Spec
from bridge.checkpoint.adapter_base import BASE, base_name
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.identity import header_of
from bridge.compare.base import differences
from bridge.conversion.model_card import model_card
from bridge.conversion.options import compress_to
from bridge.conversion.request import Built, Request
from bridge.conversion.to_state_dict import state_dict_output
from bridge.errors import OutputRefused, Problem, refuse_if
from bridge.formats.contract import states
from bridge.formats.safetensors.peft import CONFIG
from bridge.graph import Form, Loss
from bridge.lora.algebra import compress
from bridge.peft.config import PREFIX, A, B, Target, compose_config, module_of
from bridge.proof.peft import PEFT
from bridge.rules.model import Bound
from bridge.rules.names import grouped
from bridge.stream.factor_writers import AdapterWriter, Pair
from bridge.stream.output import Output, collect
from bridge.stream.readers import Done
from bridge.stream.step import Step
from bridge.stream.writers import TensorWriter

#: vLLM's default for --max-lora-rank
SERVER_RANK = 16


def named_base(request: Request) -> str | None:
    """What the adapter's config calls its base; None for what the source calls it."""
    options = request.options
    return base_name(
        request.inputs.source.source,
        request.destination,
        options["base_name"],
        with_base=options["with_base"],
        absolute=request.layout.needs_base_name,
    )


def base_name_notes(request: Request, name: object) -> list[str]:
    """What a layout wants of the name of a base."""
    layout, options = request.layout, request.options
    if not layout.needs_base_name:
        return []
    if not name:
        return [
            f"{layout.name} needs base_model_name_or_path, which is empty: give --base-name or --with-base"
        ]
    if options["with_base"] and options["base_name"] is None:
        return [
            f"base_model_name_or_path is {name}: {layout.name} looks for it from the working directory, so set it "
            "anew when the adapter is moved"
        ]
    return []


def build_adapter(request: Request) -> Built:
    """The adapter, and its base where asked for."""
    options, checkpoint = request.options, request.inputs.source
    family = checkpoint.family
    notes: list[str] = []
    replaced: tuple[str, ...] = ()
    if request.reference is not None:
        replaced, compared = _compared(request, request.reference)
        notes += compared
    name = named_base(request) or ""
    notes += base_name_notes(request, name)
    adapter = _adapter_output(request, name, replaced)
    if not options["with_base"] and request.reference is None:
        trained = (
            f" ({family.runtime} trains {family.trained_beside} in full)" if family.trained_beside else ""
        )
        notes.append(
            f"no base is written: on any base but this checkpoint's own{trained} the adapter is another "
            f"{family.noun}; --with-base writes it"
        )
    notes += rank_notes(request, adapter)
    if compress_to(options) is not None:
        adapter = replace(adapter, approximated=compression_errors(request, adapter))
        notes += compression_notes(adapter.approximated)
    card = model_card(request, adapter)
    outputs = (
        adapter.with_files({"README.md": card}),
        *([base_output(request)] if options["with_base"] else []),
    )
    return Built(
        outputs=outputs,
        notes=tuple(notes),
        loss=Loss.EXACT if compress_to(options) is None else Loss.ROUNDED,
        prover=PEFT,
    )


def base_output(request: Request) -> Output:
    """The source's own weights, without its factors."""
    stripped = next(state for state in states() if state.form is Form.STATE_DICT and state.stripped)
    base = replace(request, target=stripped, dtype="keep", scales={}, fold=False)
    return replace(state_dict_output(base), where=BASE)


def _adapter_output(request: Request, base_name: str, replaced: tuple[str, ...]) -> Output:
    """LoRA factors as PEFT's tensors, and the weights that it carries whole."""
    checkpoint, layout = request.inputs.source, request.layout
    steps: list[Step] = []
    targets: list[Target] = []
    for bound in checkpoint.bound():
        made = _step(request, bound)
        if made is not None:
            steps.append(made[0])
            targets.append(made[1])
    modules = tuple(dict.fromkeys(module_of(layout.rename(name)) for name in replaced))
    steps += _replaced_steps(request, replaced)
    config = compose_config(targets, base_name, modules)
    return Output(
        state=request.target,
        layout=layout,
        dtype=request.dtype,
        steps=tuple(steps),
        specs=collect(checkpoint.model.name, tuple(steps)),
        header={"format": "pt", **header_of(request.inputs)},
        files={CONFIG: json_bytes(config)},
    )


def _step(request: Request, bound: Bound) -> tuple[Step, Target] | None:
    """The step that writes the factors of one leaf's weights, and what the config says of them."""
    checkpoint, rule, options = request.inputs.source, bound.rule, request.options
    factors = checkpoint.factor_reader("source", bound, request.scales.get(bound.part.name))
    if factors is None or factors.scale is None:
        return None
    limit = compress_to(options)
    leaf_spec = Spec(bound.leaf_shape, request.inputs.spec(factors.reads[1]).dtype)
    blocks = 1
    for axis in rule.factor_axes.kept:
        blocks *= bound.sizes[axis]
    full = checkpoint.rank(bound.part, rule) * blocks
    rank = full if limit is None else min(full, limit)
    runtime = factors.scale if options["keep_alpha"] else 1.0
    out, into = bound.weight_shape
    written = request.factor_dtype(leaf_spec.dtype)
    pairs = {}
    for index, name in bound.names.items():
        module = PREFIX + module_of(request.layout.rename(name))
        pairs[index] = Pair(
            a=module + A,
            b=module + B,
            spec_a=Spec((rank, into), written),
            spec_b=Spec((out, rank), written),
            runtime=runtime,
        )
    step = request.step(bound, None, factors, AdapterWriter(pairs, limit), leaf_spec)
    template = replace(rule.template, text=request.layout.rename(rule.weight))
    return step, Target(template, rank, runtime * rank)


def _replaced_steps(request: Request, replaced: tuple[str, ...]) -> Iterator[Step]:
    """Steps that write whole weights into an adapter, under the names modules_to_save has."""
    wanted = set(replaced)
    for bound in request.inputs.source.bound():
        names = {
            index: (PREFIX + request.layout.rename(name),)
            for index, name in bound.names.items()
            if name in wanted
        }
        if not names:
            continue
        weights, used = request.inputs.weights_reader(bound, flat=False)
        dtype = request.inputs.spec(weights.reads[0]).dtype
        writer = TensorWriter(names, Spec(used.weight_shape, dtype))
        yield request.step(used, weights, None, writer, Spec(used.leaf_shape, dtype))


def _compared(request: Request, reference: Checkpoint) -> tuple[tuple[str, ...], list[str]]:
    """The weights that differ from the reference and travel along, and notes about them."""
    checkpoint, options = request.inputs.source, request.options
    differing = differences(checkpoint, reference, request.progress)
    where = reference.source.location
    if not differing:
        return (), [f"the weights beside the factors equal those of {where}"]
    worst = max(differing, key=lambda name: differing[name])
    notes = [
        f"{len(differing)} weights differ from {where} (most: {worst}, relative {differing[worst]:.1e}); "
        + (
            "they travel in modules_to_save"
            if options["modules_to_save"]
            else "the adapter needs its own base"
        )
    ]
    notes += [f"differs: {name}" for name in grouped(differing)]
    if not options["modules_to_save"]:
        return (), notes
    lora = {rule.leaf for _, rule in checkpoint.lora_rules()}
    refuse_if(_unsavable(checkpoint, differing, lora, str(where)), OutputRefused)
    # PEFT saves and loads a module whole: its other tensors must be there as well
    modules = {module_of(name) for name in differing}
    carried = tuple(name for name in checkpoint.weight_specs() if module_of(name) in modules)
    return carried, notes + _rounding_notes(checkpoint, reference, carried)


def _rounding_notes(checkpoint: Checkpoint, reference: Checkpoint, carried: tuple[str, ...]) -> list[str]:
    """PEFT loads a saved module in the dtype that the base has."""
    ours, theirs = checkpoint.weight_specs(), reference.weight_specs()
    dtypes = Counter(
        theirs[name].dtype.name for name in carried if theirs[name].dtype.itemsize < ours[name].dtype.itemsize
    )
    return [
        f"PEFT loads modules_to_save in the dtype of the base: {count} weights are rounded to {dtype} there, "
        "unless the base is loaded in float32"
        for dtype, count in dtypes.items()
    ]


def _unsavable(
    checkpoint: Checkpoint, differing: Mapping[str, float], lora: set[str], where: str
) -> list[Problem]:
    """Differing weights that PEFT's modules_to_save cannot carry."""
    tied = set(checkpoint.model.tied.values())
    carrying = [
        name
        for bound in checkpoint.bound()
        if bound.rule.leaf in lora
        for name in bound.names.values()
        if name in differing
    ]
    problems = [
        Problem(
            f"{name} differs from {where} and carries LoRA: the adapter was trained on another base",
            "give the base it was trained on, or write its own with --with-base",
        )
        for name in grouped(carrying)
    ]
    problems += [
        Problem(
            f"{name} differs from {where} and is tied to another weight: modules_to_save would untie it",
            "write the base with --with-base instead",
        )
        for name in differing
        if name in tied
    ]
    return problems


def rank_notes(request: Request, adapter: Output) -> list[str]:
    ranks = [
        pair.spec_a.shape[0]
        for _, writer in adapter.steps_of(AdapterWriter)
        for pair in writer.pairs.values()
    ]
    if max(ranks) <= SERVER_RANK:
        return []
    kept = {axis for _, rule in request.inputs.source.lora_rules() for axis in rule.factor_axes.kept}
    why = f" (every {' and '.join(sorted(kept))} has factors of its own)" if kept else ""
    return [
        f"ranks go up to {max(ranks)}{why}: vLLM needs --max-lora-rank {max(ranks)}, its default is {SERVER_RANK}"
    ]


def compression_errors(request: Request, adapter: Output) -> dict[str, float]:
    """The relative Frobenius error of every module that an adapter's rank limit changes, by its path."""
    errors: dict[str, float] = {}
    limit = compress_to(request.options)
    for step, writer in adapter.steps_of(AdapterWriter):
        if limit is None or step.factors is None:
            continue
        change_at = step.factors.open(step.rule, request.inputs.sources, Done(), None)
        for index, pair in writer.pairs.items():
            change = change_at(index)
            assert change is not None
            matrices = change.matrices(FLOAT32)
            if len(matrices.a) > limit:
                module = pair.a.removesuffix(A).removeprefix(PREFIX)
                errors[module] = compress(matrices.a, matrices.b, limit)[2]
    return errors


def compression_notes(errors: Mapping[str, float]) -> list[str]:
    """The relative error of every compressed module, worst first."""
    if not errors:
        return ["no module has a larger rank: nothing is compressed"]
    order = sorted(errors, key=lambda name: -errors[name])
    return [
        f"{len(errors)} modules are compressed, relative Frobenius error up to {errors[order[0]]:.2e}",
        *(f"compressed: {name} {errors[name]:.2e}" for name in order),
    ]


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
