"""A plan as text: the same lines for ``print(plan)``, ``--dry-run`` and people's bug reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bridge.arrays import Spec
from bridge.errors import printable
from bridge.rules.names import grouped
from bridge.stream.readers import LeafFactors, LeafWeights

if TYPE_CHECKING:
    from bridge.conversion.job import Plan
    from bridge.conversion.outputs import Output
    from bridge.stream.step import Step


def size(count: float) -> str:
    """Bytes, for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def plan_text(plan: Plan, width: int) -> str:
    """The whole plan. Each rule takes one line, or two where they do not fit the width."""
    shown = [line for output in plan.outputs for line in ("", *_rules(plan, output, width))]
    return "\n".join((*head(plan), *shown, "", *_totals(plan)))


def head(plan: Plan) -> Iterator[str]:
    """Lines: a line break in a path does not make one."""
    return map(printable, _head(plan))


def _head(plan: Plan) -> Iterator[str]:
    checkpoint, base = plan.checkpoint, plan.inputs.base
    yield f"source       {checkpoint.source.location}"
    yield f"             {checkpoint.state}, model {plan.inputs.model.name}"
    if base is not None:
        yield f"base         {base.source.location}"
        yield f"             {base.state}"
    if plan.destination is not None:
        yield f"destination  {plan.destination}" + (" (replaced)" if plan.overwrite else "")
    way = " -> ".join([str(plan.route[0].source), *(f"{c.name} -> {c.target}" for c in plan.route)])
    yield f"route        {way}"
    yield f"loss         {plan.loss.name.lower()}: {_loss(plan)}"
    yield f"dtype        {plan.dtype}, layout {plan.layout.name}"
    for scale in plan.scales.values():
        yield f"lora scale   {scale}"
    if plan.scales and any(
        step.factors is not None and step.rule.lora and not step.rule.lora.scaled for step in plan.steps
    ):
        yield "             feed-forward: 1, openpi's runtime applies no scale there"
    for note in plan.notes:
        yield f"note         {note}"


def _loss(plan: Plan) -> str:
    if plan.options.compress_to is not None and plan.output.state.holds == "lora":
        return f"modules of a rank above {plan.options.compress_to} are approximated, by SVD"
    if plan.options.lossy and plan.loss.name == "ROUND":
        return "factors that do not fit openpi's rank are approximated, by SVD"
    return {
        "EXACT": "every value is kept bit for bit",
        "GAUGE": "the same function, numbers that cancel out may differ",
        "ROUND": "values are rounded once, to the dtype written",
        "DROP": "; ".join(edge.summary for edge in plan.route),
    }[plan.loss.name]


def _rules(plan: Plan, output: Output, width: int) -> Iterator[str]:
    if output.where:
        yield f"{output.where}/: {output.state}"
    for part in plan.inputs.model.parts:
        steps = [step for step in output.steps if step.part == part.name]
        if not steps:
            continue
        shown = [(step, name, spec) for step in steps for name, spec in _shown(step).items()]
        taken = [_taken_names(step) for step in steps for _ in _shown(step)]
        leaves = _common(taken, "/" if "/" in taken[0] else ".")
        weights = _common([name for _, name, _ in shown], "/" if "/" in shown[0][1] else ".")
        yield f"{part.name}: {leaves}* -> {weights}*"
        rows = [
            (
                name_taken.removeprefix(leaves),
                _taken(plan, step),
                "-> " + name.removeprefix(weights),
                str(spec),
            )
            for name_taken, (step, name, spec) in zip(taken, shown, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        one_line = sum(widths) + 2 * len(widths) <= width
        for row in rows:
            if one_line:
                yield ("  " + "  ".join(map(str.ljust, row, widths))).rstrip()
            else:
                yield f"  {row[0]}  {row[1]}"
                yield f"    {row[2]}  {row[3]}"
    for name, reason in output.zeros.items():
        yield f"zeros: {name} {output.specs[name]}: {reason}"
    for alias, name in output.header.items():
        if name in output.specs:
            yield f"tied: {alias} is {name}"
    for name, data in output.files.items():
        yield f"file: {name} {size(len(data))}"


def _shown(step: Step) -> dict[str, Spec]:
    """What a step writes, a line a shape: the names shortened, with their spec."""
    shapes: dict[Spec, list[str]] = {}
    for name, spec in step.specs.items():
        shapes.setdefault(spec, []).append(name)
    return {_braced(grouped(names)): spec for spec, names in shapes.items()}


def _taken_names(step: Step) -> str:
    """Where a step's weights come from: its leaf, or the tensors it is made of."""
    if step.weights is None or isinstance(step.weights, LeafWeights):
        return step.rule.leaf
    return _braced(grouped(name for _, name in step.weights.reads))


def _taken(plan: Plan, step: Step) -> str:
    """What a step takes: the leaf, its factors, and the scale of their product."""
    scale = step.factors.scale if isinstance(step.factors, LeafFactors) else 1.0
    scaled = step.rule.lora is not None and step.rule.lora.scaled
    product = f"{scale:g} a b" if scaled and isinstance(step.factors, LeafFactors) else "a b"
    if step.weights is None:
        return product
    spec = (
        step.leaf_spec if isinstance(step.weights, LeafWeights) else plan.inputs.spec(step.weights.reads[0])
    )
    return f"{spec}" + (f" + {product}" if step.factors is not None else "")


def _totals(plan: Plan) -> Iterator[str]:
    sources = plan.inputs.sources
    tensors = sum(len(output.specs) for output in plan.outputs)
    ways = Counter(sources[which].how(name) for step in plan.steps for which, name in step.reads)
    how = ", ".join(f"{count} arrays {way}" for way, count in ways.items())
    yield f"reads        {size(plan.bytes_read)} ({size(plan.bytes_decoded)} decoded): {how}"
    yield f"writes       {size(plan.bytes_written)}: {tensors} tensors by {len(plan.steps)} rules"
    yield f"memory       about {size(plan.memory)} at most"


def _common(names: Sequence[str], separator: str) -> str:
    """The longest prefix that all names share, cut at a separator."""
    first, last = min(names), max(names)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind(separator, 0, shared) + 1]


def _braced(names: list[str]) -> str:
    """Names that differ in one segment as one: ``x.{k_proj|v_proj}.weight``."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=False)]
    if len({len(p) for p in parts}) == 1 and sum(len(column) > 1 for column in columns) == 1:
        return ".".join(c[0] if len(c) == 1 else "{" + "|".join(c) + "}" for c in columns)
    return ", ".join(names)
