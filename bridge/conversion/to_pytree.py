"""Planning a JAX pytree as its runtime restores it, with LoRA leaves where an adapter is joined."""

from __future__ import annotations

from collections.abc import Iterable

from bridge.arrays import Spec, widest
from bridge.conversion.lora_leaves import fit_notes, start_notes, summed_notes
from bridge.conversion.request import Built, Request
from bridge.graph import Loss
from bridge.rules.factoring import RANK
from bridge.rules.family import Tree
from bridge.rules.model import Bound
from bridge.stream.factor_writers import FactorWriter
from bridge.stream.output import Output, collect
from bridge.stream.readers import FactorReader, ModuleFactors
from bridge.stream.step import Step
from bridge.stream.writers import LeafWriter


def build_pytree(request: Request) -> Built:
    """Every leaf; factors are folded into the weights, or become leaves of their own at the ranks asked for.

    Those of weights that have no such leaves in the runtime are folded in any case.
    """
    inputs = request.inputs
    steps: list[Step] = []
    for bound in inputs.bound():
        factors = inputs.factor_reader(bound, request.scales.get(bound.part.name))
        folded = factors if request.fold or bound.rule.lora is None else None
        steps.append(weight_step(request, bound, folded))
        if not request.fold and bound.rule.lora is not None and bound.part.name in request.ranks:
            rank = request.ranks[bound.part.name]
            steps.append(factor_step(request, bound, factors or ModuleFactors({}), rank))
    output = pytree_output(request, steps)
    if not request.ranks:
        return Built(outputs=(output,))
    approximated = fit_notes(inputs, output)
    summed = summed_notes(inputs)
    started = start_notes(inputs, output, request.options["seed"])
    return Built(
        outputs=(output,),
        notes=(*summed, *started, *approximated),
        loss=Loss.ROUNDED if summed or approximated else Loss.EXACT,
    )


def pytree_output(request: Request, steps: Iterable[Step]) -> Output:
    """The output that steps fill."""
    model, steps = request.inputs.model, tuple(steps)
    return Output(
        state=request.target,
        layout=model.written[0],
        dtype=request.dtype,
        steps=steps,
        specs=collect(model.name, steps),
    )


def weight_step(request: Request, bound: Bound, folded: FactorReader | None) -> Step:
    """The step that writes a leaf, with factors summed into it where there are some."""
    inputs = request.inputs
    weights, _ = inputs.weights_reader(bound, flat=False)
    stored = widest(inputs.spec(read).dtype for read in weights.reads)
    spec = Spec(bound.leaf_shape, request.weight_dtype(bound.rule, stored, folded=folded is not None))
    writer = LeafWriter(stored_name(request, bound.rule.leaf), spec)
    return request.step(bound, weights, folded, writer, Spec(spec.shape, stored))


def factor_step(request: Request, bound: Bound, factors: FactorReader, rank: int) -> Step:
    """The step that writes both factors of a leaf, at a rank."""
    rule, inputs = bound.rule, request.inputs
    assert rule.lora is not None and rule.factor_leaves is not None
    axes = rule.factor_axes
    shape_a, shape_b = axes.shapes(bound.sizes, rank)
    # an adapter's own dtype is kept unless another is asked for
    stored = widest(inputs.spec(read).dtype for read in factors.reads)
    written = request.factor_dtype(stored)
    a, b = (stored_name(request, leaf) for leaf in rule.factor_leaves)
    writer = FactorWriter(
        a=a,
        b=b,
        spec_a=Spec(shape_a, written),
        spec_b=Spec(shape_b, written),
        axes=axes,
        sizes={**bound.sizes, RANK: rank},
        runtime=request.scales[bound.part.name].value if rule.lora.scaled else 1.0,
        start=rule.lora.start,
        seed=request.options["seed"],
        family=inputs.weights.family.runtime,
        lossy=request.options["lossy"],
    )
    return request.step(bound, None, factors, writer, Spec(bound.leaf_shape, stored))


def stored_name(request: Request, leaf: str) -> str:
    tree: Tree = request.inputs.weights.family.tree
    return tree.root + leaf + (tree.suffix if request.options["value_suffix"] else "")
