"""Planning the weights of a PyTorch state_dict."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bridge.arrays import Spec
from bridge.conversion.request import Built, Request
from bridge.rules.equation import Index
from bridge.rules.model import Bound, Layout, Model, Unused
from bridge.rules.rule import Rule
from bridge.stream.output import Output, collect
from bridge.stream.readers import TensorWeights
from bridge.stream.step import Step
from bridge.stream.writers import TensorWriter


def build_state_dict(request: Request) -> Built:
    """The weights, with factors folded into them where the route says so."""
    return Built(outputs=(state_dict_output(request),))


def state_dict_output(request: Request) -> Output:
    inputs, layout = request.inputs, request.layout
    model = inputs.model
    copied = [] if request.fold else _copied(request)
    steps = (
        *(step for bound in inputs.bound() for step in _steps(request, bound)),
        *(step for _, step in copied),
    )
    specs = collect(model.name, steps)
    # as safetensors' save_model records a tensor that is stored under another name
    header = {"format": "pt"}
    for alias, of in model.tied.items():
        if layout.rename(alias) not in specs:
            header[layout.rename(alias)] = layout.rename(of)
    zeros = {}
    for unused in model.unused:
        if any(unused is each for each, _ in copied):
            continue
        name = layout.rename(unused.weight)
        shape = tuple(inputs.sizes[model.canonical.get(axis, axis)] for axis in unused.axes)
        narrow = min((spec.dtype for spec in specs.values()), key=lambda dtype: (dtype.itemsize, dtype.name))
        specs[name] = Spec(shape, narrow)
        zeros[name] = unused.reason
    return Output(
        state=request.target,
        layout=layout,
        dtype=request.dtype,
        steps=steps,
        specs=dict(sorted(specs.items())),
        zeros=zeros,
        header=header,
    )


def _steps(request: Request, bound: Bound) -> Iterator[Step]:
    """The step that writes the weights of a leaf; one for each dtype, where they are stored in several."""
    inputs = request.inputs
    weights, used = inputs.weights_reader(bound, flat=True)
    scale = request.scales.get(bound.part.name)
    factors = inputs.factor_reader(used, scale) if request.fold else None
    by_dtype: dict[np.dtype, dict[Index, tuple[str, ...]]] = {}
    for index, name in used.names.items():
        names = by_dtype.setdefault(inputs.spec(weights.at(index)).dtype, {})
        names[index] = _names(inputs.model, request.layout, name)
    for stored, names in by_dtype.items():
        spec = Spec(used.weight_shape, request.weight_dtype(bound.rule, stored))
        reader = weights.only(names.keys()) if len(by_dtype) > 1 else weights
        leaf_spec = Spec(used.leaf_shape, stored)
        yield request.step(used, reader, factors, TensorWriter(names, spec), leaf_spec)


def _copied(request: Request) -> list[tuple[Unused, Step]]:
    """Weights that the runtime never uses, copied where the source has them: a file keeps all that is in it."""
    inputs, steps = request.inputs, []
    for unused in inputs.model.unused:
        name = inputs.weights.unused_weight(unused)
        if name is None:
            continue
        read = inputs.weights_key, name
        stored = inputs.spec(read)
        # of a part for the plan's text alone
        part = next(each for each in inputs.model.parts if unused.axes[-1].startswith(f"{each.name}."))
        rule = Rule.copying(unused.weight, len(stored.shape))
        bound = Bound(part, rule, dict(zip(rule.equation.left, stored.shape, strict=True)))
        spec = Spec(stored.shape, request.weight_dtype(bound.rule, stored.dtype))
        writer = TensorWriter({(): (request.layout.rename(unused.weight),)}, spec, checked=False)
        weights = TensorWeights({(): read}, bound.sizes)
        steps.append((unused, request.step(bound, weights, None, writer, stored)))
    return steps


def _names(model: Model, layout: Layout, name: str) -> tuple[str, ...]:
    """The names a weight is written under: its own, and its aliases where the layout does not tie."""
    aliases = () if layout.ties else tuple(alias for alias, of in model.tied.items() if of == name)
    return tuple(dict.fromkeys(layout.rename(each) for each in (name, *aliases)))
