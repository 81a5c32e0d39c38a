"""Planning a PEFT adapter from a PEFT adapter: other names, dtype, or a smaller rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from bridge.arrays import Spec
from bridge.checkpoint.checkpoint import Module
from bridge.checkpoint.identity import header_of
from bridge.checkpoint.inputs import Inputs
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.conversion.model_card import card
from bridge.conversion.options import compress_to
from bridge.conversion.request import Built, Request
from bridge.conversion.to_adapter import (
    base_name_notes,
    base_output,
    compression_errors,
    compression_notes,
    json_bytes,
    named_base,
    rank_notes,
)
from bridge.formats.safetensors.peft import CONFIG
from bridge.graph import Loss
from bridge.peft.config import (
    PREFIX,
    A,
    AdapterConfig,
    B,
    Target,
    compose_config,
    module_of,
    read_config,
    targets_of,
)
from bridge.proof.peft import PEFT
from bridge.rules.equation import Index
from bridge.rules.model import Bound
from bridge.rules.names import Template
from bridge.stream.factor_writers import AdapterWriter, Pair
from bridge.stream.output import Output, collect
from bridge.stream.readers import ModuleFactors, TensorWeights
from bridge.stream.step import Step
from bridge.stream.writers import TensorWriter

#: fields of a config that change nothing which an adapter computes, and that training goes on with
CARRIED = ("base_model_name_or_path", "lora_dropout", "revision", "task_type")


@dataclass(frozen=True)
class _Planned:
    """One module as it will be written."""

    bound: Bound
    index: Index
    weight: str
    """In the rules."""
    module: Module
    rank: int
    alpha: float
    """As the config has it, with or without rsLoRA."""


def build_relaid_adapter(request: Request) -> Built:
    """Factors and whole weights as they are, under the layout's names; its base in that layout, where asked for."""
    adapter, options = request.inputs.source, request.options
    assert isinstance(adapter, AdapterCheckpoint)
    limit = compress_to(options)
    written = adapter.source.metadata[CONFIG]
    config, _ = read_config(written, CONFIG)
    assert config is not None  # what is wrong with it is among the source's problems
    modules = [_planned(adapter, config, weight, limit) for weight in adapter.modules]
    saved = {name: request.layout.rename(adapter.model.used(name)) for name in adapter.stored}
    steps = (
        *(_factor_step(request, each, limit) for each in modules),
        *(_saved_step(request, adapter, name, PREFIX + target) for name, target in saved.items()),
    )
    base_name = named_base(request)
    carried = [*CARRIED, *(["auto_mapping"] if request.layout == adapter.layout else [])]
    fields = compose_config(
        _targets(modules, request), "", dict.fromkeys(module_of(name) for name in saved.values())
    )
    fields |= {field: written[field] for field in carried if field in written}
    fields |= {"use_rslora": config.rslora} | (
        {} if base_name is None else {"base_model_name_or_path": base_name}
    )
    output = Output(
        state=request.target,
        layout=request.layout,
        dtype=request.dtype,
        steps=steps,
        specs=collect(adapter.model.name, steps),
        header={"format": "pt", **header_of(request.inputs)},
        files={CONFIG: json_bytes(fields)},
    )
    notes = rank_notes(request, output)
    if limit is not None:
        output = replace(output, approximated=compression_errors(request, output))
        notes += compression_notes(output.approximated)
    notes += base_name_notes(request, fields["base_model_name_or_path"])
    told = "Ranks and alphas are those of the adapter it was made from" + (
        f", but for modules of a rank above {limit}." if output.approximated else "."
    )
    base = "Its base is in `base/`." if options["with_base"] else "Apply it to the base it was trained on."
    text = card(request, output, _rows(modules), told, base)
    return Built(
        outputs=(output.with_files({"README.md": text}), *_base(request)),
        notes=tuple(notes),
        loss=Loss.ROUNDED if output.approximated else Loss.EXACT,
        prover=PEFT,
    )


def _planned(adapter: AdapterCheckpoint, config: AdapterConfig, weight: str, limit: int | None) -> _Planned:
    module = adapter.modules[weight]
    bound, index = adapter.place(weight)
    rank, alpha = module.rank, config.alpha_of(module.a.removeprefix(PREFIX).removesuffix(A))
    if limit is not None and limit < rank:
        # the scale of the product stays what it is
        rank, alpha = limit, module.scale * (math.sqrt(limit) if config.rslora else limit)
    return _Planned(bound, index, weight, module, rank, alpha)


def _factor_step(request: Request, planned: _Planned, limit: int | None) -> Step:
    inputs, module = request.inputs, planned.module
    path = PREFIX + module_of(request.layout.rename(planned.weight))
    stored_a, stored_b = (inputs.spec(("source", name)) for name in (module.a, module.b))
    pair = Pair(
        a=path + A,
        b=path + B,
        spec_a=Spec((planned.rank, stored_a.shape[1]), request.factor_dtype(stored_a.dtype)),
        spec_b=Spec((stored_b.shape[0], planned.rank), request.factor_dtype(stored_b.dtype)),
        runtime=module.scale,
    )
    factors = ModuleFactors({planned.index: (("source", module.a), ("source", module.b), module.scale)})
    # of the two, the one that is rounded
    narrowed = stored_a if pair.spec_a.dtype.itemsize < stored_a.dtype.itemsize else stored_b
    leaf_spec = Spec(planned.bound.leaf_shape, narrowed.dtype)
    return request.step(planned.bound, None, factors, AdapterWriter({planned.index: pair}, limit), leaf_spec)


def _saved_step(request: Request, adapter: AdapterCheckpoint, name: str, target: str) -> Step:
    bound, index = adapter.place(name)
    stored = adapter.spec(name)
    weights = TensorWeights({index: ("source", adapter.stored[name])}, bound.sizes)
    writer = TensorWriter({index: (target,)}, Spec(stored.shape, request.factor_dtype(stored.dtype)))
    return request.step(bound, weights, None, writer, Spec(bound.leaf_shape, stored.dtype))


def _targets(modules: Iterable[_Planned], request: Request) -> Iterator[Target]:
    """What the config says of the modules."""
    placed = []
    for each in modules:
        place = request.inputs.model.weight_index.find(each.weight)
        assert place is not None
        (_, rule), at = place
        placed.append((Template(request.layout.rename(rule.weight)), at, each.rank, each.alpha))
    return targets_of(placed)


def _rows(modules: Iterable[_Planned]) -> Iterator[str]:
    """A row for each part that has factors of one scale."""
    alike: dict[tuple[str, int, float, float], None] = dict.fromkeys(
        (each.bound.part.name, each.rank, each.alpha, each.module.scale) for each in modules
    )
    for part, rank, alpha, scale in alike:
        yield f"| {part} | {rank} | {alpha:g} | {scale:g} |"


def _base(request: Request) -> Iterator[Output]:
    """The base in the adapter's layout, as it is: the adapter's whole weights stand in for its own when loaded."""
    inputs = request.inputs
    if request.options["with_base"]:
        yield base_output(replace(request, inputs=Inputs(replace(inputs.source, stored={}), inputs.base)))
