"""Planning an adapter: what it leaves out, what must stand beside it, and what servers will say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bridge import converters
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.scales import Scale
from bridge.conversion.model_card import model_card
from bridge.conversion.outputs import Output, adapter_output, tensor_output
from bridge.errors import OutputRefused, Problem, refuse_if
from bridge.graph import State
from bridge.peft.config import module_of
from bridge.rules.model import Layout
from bridge.rules.names import grouped
from bridge.stream.inputs import Inputs
from bridge.stream.writers import AdapterWriter

if TYPE_CHECKING:
    from bridge.conversion.options import Options

BASE = "base"

#: vLLM's default for --max-lora-rank
SERVER_RANK = 16


def adapter_outputs(
    inputs: Inputs,
    reference: Checkpoint | None,
    target: State,
    layout: Layout,
    dtype: str,
    scales: Mapping[str, Scale],
    options: Options,
    destination: Path | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[tuple[Output, ...], list[str]]:
    """The adapter, and its base where asked for; with what a user must know of them."""
    notes: list[str] = []
    replaced: tuple[str, ...] = ()
    if reference is not None:
        replaced, found = _compared(inputs.source, reference, options, progress)
        notes += found
    base_name = options.base_name
    if base_name is None:
        base_name = str(destination / BASE) if options.with_base and destination is not None else ""
    adapter = adapter_output(
        inputs.source,
        target,
        layout,
        dtype,
        scales,
        keep_alpha=options.keep_alpha,
        rank=options.compress_to,
        base_name=base_name,
        replaced=replaced,
    )
    outputs: tuple[Output, ...] = (adapter,)
    if options.with_base:
        base = tensor_output(inputs, converters.TORCH_BASE, layout, "keep", {}, fold=False)
        outputs += (replace(base, where=BASE),)
    elif reference is None:
        notes.append(
            "no base is written: LoRA runs train vision tower, projector and projections in full, so on any base "
            "but this checkpoint's own the adapter is another policy; --with-base writes it"
        )
    if layout.name == "lerobot" and not base_name:
        notes.append(
            "LeRobot needs base_model_name_or_path, and it is empty: give --base-name, or --with-base"
        )
    notes += _rank_notes(adapter)
    if options.compress_to is not None:
        from bridge.compare.base import compression_errors

        adapter = replace(adapter, approximated=compression_errors(inputs, adapter))
        notes += _compression_notes(adapter.approximated)
    outputs = (
        adapter.with_files({"README.md": model_card(inputs.source, adapter, scales, options)}),
        *outputs[1:],
    )
    return outputs, notes


def _compared(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    options: Options,
    progress: Callable[[int, int], None] | None,
) -> tuple[tuple[str, ...], list[str]]:
    """The weights that differ from the reference, and what to say or refuse about them."""
    from bridge.compare.base import differences

    found = differences(checkpoint, reference, progress)
    where = reference.source.location
    if not found:
        return (), [f"the weights beside the factors equal those of {where}"]
    worst = max(found, key=lambda name: found[name])
    notes = [
        f"{len(found)} weights differ from {where} (most: {worst}, relative {found[worst]:.1e}); "
        + ("they travel in modules_to_save" if options.modules_to_save else "the adapter needs its own base")
    ]
    notes += [f"differs: {name}" for name in grouped(found)]
    if not options.modules_to_save:
        return (), notes
    lora = {rule.leaf for _, rule in checkpoint.lora_rules()}
    refuse_if(_unsavable(checkpoint, found, lora, str(where)), OutputRefused)
    # PEFT saves and loads a module whole: its other tensors must be there as well
    modules = {module_of(name) for name in found}
    carried = tuple(name for name in _weights_of(checkpoint) if module_of(name) in modules)
    return carried, notes + _rounding_notes(checkpoint, reference, carried)


def _weights_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Every weight -> the array it lies in."""
    found = {}
    for part in checkpoint.model.parts:
        sizes = checkpoint.model.local_sizes(part.name, checkpoint.sizes)
        for rule in part.rules:
            for _, name in rule.weights(sizes):
                found[name] = checkpoint.stored[rule.leaf if checkpoint.layout is None else name]
    return found


def _rounding_notes(checkpoint: Checkpoint, reference: Checkpoint, carried: tuple[str, ...]) -> list[str]:
    """PEFT loads a saved module in the dtype that the base has."""
    ours, theirs = _weights_of(checkpoint), _weights_of(reference)
    dtypes = Counter(
        held.name
        for name in carried
        if (held := reference.source.specs[theirs[name]].dtype).itemsize
        < checkpoint.source.specs[ours[name]].dtype.itemsize
    )
    return [
        f"PEFT loads modules_to_save in the dtype of the base: {count} weights are rounded to {dtype} there, "
        "unless the base is loaded in float32"
        for dtype, count in dtypes.items()
    ]


def _unsavable(
    checkpoint: Checkpoint, found: Mapping[str, float], lora: set[str], where: str
) -> list[Problem]:
    """Differing weights that PEFT's modules_to_save cannot carry."""
    from bridge.rules.names import skeleton

    forms = {form: rule for rule in checkpoint.model.rules for form, _ in rule.template.skeletons()}
    tied = set(checkpoint.model.tied.values())
    carrying = [name for name in found if forms[skeleton(name)[0]].leaf in lora]
    problems = [
        Problem(
            f"{name} differs from {where}, and carries LoRA: the adapter was trained on another base",
            "give the base it was trained on, or write its own with --with-base",
        )
        for name in grouped(carrying)
    ]
    problems += [
        Problem(
            f"{name} differs from {where}, and is tied to the embedding: modules_to_save would untie it",
            "write the base with --with-base instead",
        )
        for name in found
        if name in tied
    ]
    return problems


def _rank_notes(adapter: Output) -> list[str]:
    ranks = [
        pair.spec_a.shape[0]
        for step in adapter.steps
        if isinstance(step.writer, AdapterWriter)
        for pair in step.writer.pairs.values()
    ]
    if max(ranks) <= SERVER_RANK:
        return []
    return [
        f"ranks go up to {max(ranks)} (an expert's heads stand side by side in q_proj): vLLM needs "
        f"--max-lora-rank {max(ranks)}, its default is {SERVER_RANK}"
    ]


def _compression_notes(errors: Mapping[str, float]) -> list[str]:
    """The relative error of every compressed module, worst first."""
    if not errors:
        return ["no module has a larger rank: nothing is compressed"]
    order = sorted(errors, key=lambda name: -errors[name])
    return [
        f"{len(errors)} modules are compressed, relative Frobenius error up to {errors[order[0]]:.2e}",
        *(f"compressed: {name} {errors[name]:.2e}" for name in order),
    ]
