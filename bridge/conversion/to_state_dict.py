"""Planning the weights of a PyTorch state_dict."""

from __future__ import annotations

from bridge.arrays import Spec, widest
from bridge.conversion.request import Built, Request
from bridge.rules.model import Bound, Layout, Model
from bridge.stream.output import Output, collect
from bridge.stream.step import Step
from bridge.stream.writers import TensorWriter


def build_state_dict(request: Request) -> Built:
    """The weights, with factors folded into them where the route says so."""
    return Built(outputs=(state_dict_output(request),))


def state_dict_output(request: Request) -> Output:
    inputs, layout = request.inputs, request.layout
    model = inputs.model
    steps = tuple(_step(request, bound) for bound in inputs.bound())
    specs = collect(model.name, steps)
    # as safetensors' save_model records a tensor that is stored under another name
    header = {"format": "pt"}
    for alias, of in model.tied.items():
        if layout.rename(alias) not in specs:
            header[layout.rename(alias)] = layout.rename(of)
    zeros = {}
    for unused in model.unused:
        name = layout.rename(unused.weight)
        shape = tuple(inputs.weights.sizes[model.canonical.get(axis, axis)] for axis in unused.axes)
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


def _step(request: Request, bound: Bound) -> Step:
    inputs = request.inputs
    weights, used = inputs.weights_reader(bound, flat=True)
    scale = request.scales.get(bound.part.name)
    factors = inputs.factor_reader(used, scale) if request.fold else None
    stored = widest(inputs.spec(read).dtype for read in weights.reads)
    spec = Spec(used.weight_shape, request.weight_dtype(bound.rule, stored))
    names = {index: _names(inputs.model, request.layout, name) for index, name in used.names.items()}
    leaf_spec = Spec(used.leaf_shape, stored)
    return request.step(used, weights, factors, TensorWriter(names, spec), leaf_spec)


def _names(model: Model, layout: Layout, name: str) -> tuple[str, ...]:
    """The names a weight is written under: its own, and its aliases where the layout does not tie."""
    aliases = () if layout.ties else tuple(alias for alias, of in model.tied.items() if of == name)
    return tuple(dict.fromkeys(layout.rename(each) for each in (name, *aliases)))
