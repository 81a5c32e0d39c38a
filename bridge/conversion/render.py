"""A job as text: the same lines for ``print(job)``, ``--dry-run`` and bug reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from bridge.arrays import Spec
from bridge.conversion.job import Job
from bridge.conversion.options import compress_to
from bridge.display import byte_size, printable
from bridge.graph import Form, Loss
from bridge.rules.names import grouped, numberless
from bridge.stream.output import Output
from bridge.stream.step import Step


def plan_text(job: Job, width: int) -> str:
    """The whole job. Each rule takes one line, or two where they do not fit the width."""
    shown = [line for output in job.outputs for line in ("", *_rules(job, output, width))]
    return "\n".join(map(printable, (*_head(job), *shown, "", *_totals(job))))


def head(job: Job) -> Iterator[str]:
    """Lines: a line break in a path does not make one."""
    return map(printable, _head(job))


def _head(job: Job) -> Iterator[str]:
    checkpoint, base = job.checkpoint, job.inputs.base
    yield f"source       {checkpoint.source.location}"
    yield f"             {checkpoint.state}, model {job.inputs.model.name}"
    if base is not None:
        yield f"base         {base.source.location}"
        yield f"             {base.state}"
    if job.destination is not None:
        yield f"destination  {job.destination}" + (" (replaced)" if job.overwrite else "")
    way = " -> ".join([str(job.route[0].source), *(f"{c.name} -> {c.target}" for c in job.route)])
    yield f"route        {way}"
    yield f"loss         {job.loss.name.lower()}: {_loss(job)}"
    yield f"dtype        {job.dtype}, layout {job.layout.name}"
    for scale in job.scales.values():
        yield f"lora scale   {scale}"
    family = job.inputs.weights.family
    if any(_is_unscaled(step) for step in job.steps):
        if job.scales and family.unscaled:
            yield f"             {family.unscaled}: 1, {family.runtime} applies no scale there"
        elif not job.scales and checkpoint.in_jax:
            yield f"lora scale   1: {family.runtime} applies no scale"
    for fact in job.facts.values():
        yield f"{family.noun:<12} {fact.kind.title}: {fact.text} ({fact.origin})"
    for note in job.notes:
        yield f"note         {note}"


def _is_unscaled(step: Step) -> bool:
    return step.factors is not None and step.rule.lora is not None and not step.rule.lora.scaled


def _loss(job: Job) -> str:
    rank = compress_to(job.options)
    if rank is not None and job.output.state.form is Form.ADAPTER:
        return f"modules of a rank above {rank} are approximated, by SVD"
    if job.options["lossy"] and job.loss is Loss.ROUNDED:
        return "factors that do not fit the rank of their leaves are approximated, by SVD"
    return {
        Loss.EXACT: "every value is kept bit for bit",
        Loss.EQUIVALENT: "the same function, different factors",
        Loss.ROUNDED: "values are rounded once, to the dtype written",
        Loss.LOSSY: "; ".join([*(edge.summary for edge in job.route), *_cut(job)]),
    }[job.loss]


def _cut(job: Job) -> Iterator[str]:
    inputs = job.inputs
    return (f"{axis} cut from {inputs.weights.sizes[axis]} to {inputs.resized[axis]}" for axis in inputs.cut)


def _rules(job: Job, output: Output, width: int) -> Iterator[str]:
    if output.where:
        yield f"{output.where}/: {output.state}"
    for part in job.inputs.model.parts:
        steps = [step for step in output.steps if step.part == part.name]
        if not steps:
            continue
        lines = _merged(
            (_taken_names(step), _taken(job, step), name, str(spec))
            for step in steps
            for name, spec in _shown(step).items()
        )
        leaves = _common([taken for taken, *_ in lines], "/" if "/" in lines[0][0] else ".")
        weights = _common([name for _, _, name, _ in lines], "/" if "/" in lines[0][2] else ".")
        yield f"{part.name}: {leaves}* -> {weights}*"
        rows = [
            (taken.removeprefix(leaves), what, "-> " + name.removeprefix(weights), spec)
            for taken, what, name, spec in lines
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
        yield f"file: {name} {byte_size(len(data))}"


Line = tuple[str, str, str, str]
"""What a rule takes and from where, what it writes and in which shape."""


def _merged(lines: Iterable[Line]) -> list[Line]:
    """Lines of leaves that differ in their numbers alone, as one: a leaf for each layer."""
    alike: dict[tuple[object, ...], list[Line]] = {}
    for taken, what, name, spec in lines:
        key = numberless(taken), what, numberless(name), spec
        alike.setdefault(key, []).append((taken, what, name, spec))
    return [
        (_braced(grouped(line[0] for line in same)), what, _braced(grouped(line[2] for line in same)), spec)
        for same in alike.values()
        for _, what, _, spec in same[:1]
    ]


def _shown(step: Step) -> dict[str, Spec]:
    """What a step writes, a line a shape: the names shortened, with their spec."""
    shapes: dict[Spec, list[str]] = {}
    for name, spec in step.specs.items():
        shapes.setdefault(spec, []).append(name)
    return {_braced(grouped(names)): spec for spec, names in shapes.items()}


def _taken_names(step: Step) -> str:
    """Where a step's weights come from: its leaf, or the tensors it is made of."""
    return step.rule.leaf if step.weights is None else _braced(grouped(step.weights.names(step.rule)))


def _taken(job: Job, step: Step) -> str:
    """What a step takes: the leaf, its factors, and the scale of their product."""
    scale = None if step.factors is None else step.factors.scale
    scaled = step.rule.lora is not None and step.rule.lora.scaled and scale is not None
    product = f"{scale:g} a b" if scaled else "a b"
    if step.weights is None:
        return product
    spec = step.weights.spec(step.leaf_spec, job.inputs.sources)
    return f"{spec}" + (f" + {product}" if step.factors is not None else "")


def _totals(job: Job) -> Iterator[str]:
    sources = job.inputs.sources
    tensors = sum(len(output.specs) for output in job.outputs)
    ways = Counter(sources[which].how(name) for step in job.steps for which, name in step.reads)
    how = ", ".join(f"{count} arrays {way}" for way, count in ways.items())
    yield f"reads        {byte_size(job.bytes_read)} ({byte_size(job.bytes_decoded)} decoded): {how}"
    yield f"writes       {byte_size(job.bytes_written)}: {tensors} tensors by {len(job.steps)} rules"
    yield f"memory       about {byte_size(job.memory)} at most"


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
