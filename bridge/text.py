"""A plan as text: the same lines for ``print(plan)``, ``--dry-run`` and people's bug reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bridge.names import grouped

if TYPE_CHECKING:
    from bridge.planner import Plan
    from bridge.step import Step


def size(count: float) -> str:
    """Bytes, for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def plan_text(plan: Plan, width: int) -> str:
    """The whole plan. Each rule takes one line, or two where they do not fit the width."""
    return "\n".join((*head(plan), "", *_rules(plan, width), "", *_totals(plan)))


def head(plan: Plan) -> Iterator[str]:
    checkpoint = plan.checkpoint
    yield f"source       {checkpoint.source.location}"
    yield f"             {checkpoint.state}, model {checkpoint.model.name}"
    if plan.destination is not None:
        yield f"destination  {plan.destination}" + (" (replaced)" if plan.overwrite else "")
    way = " -> ".join([str(plan.route[0].source), *(f"{c.name} -> {c.target}" for c in plan.route)])
    yield f"route        {way}"
    yield f"loss         {plan.loss.name.lower()}: {_loss(plan)}"
    yield f"dtype        {plan.dtype}, layout {plan.layout.name}"
    for scale in plan.scales.values():
        yield f"lora scale   {scale}"
    if any(step.leaf.a is not None and step.rule.lora and not step.rule.lora.scaled for step in plan.steps):
        yield "             feed-forward: 1, openpi's runtime applies no scale there"
    for note in plan.notes:
        yield f"note         {note}"


def _loss(plan: Plan) -> str:
    return {
        "EXACT": "every value is kept bit for bit",
        "GAUGE": "the same function, numbers that cancel out may differ",
        "ROUND": "values are rounded once, to the dtype written",
        "DROP": "; ".join(edge.summary for edge in plan.route),
    }[plan.loss.name]


def _rules(plan: Plan, width: int) -> Iterator[str]:
    for part in plan.checkpoint.model.parts:
        steps = [step for step in plan.steps if step.part == part.name]
        if not steps:
            continue
        shown = [grouped(name for _, names in step.weights for name in names) for step in steps]
        leaves = _common([step.rule.leaf for step in steps], "/")
        weights = _common([name for names in shown for name in names], ".")
        yield f"{part.name}: {leaves}* -> {weights}*"
        rows = [
            (
                step.rule.leaf.removeprefix(leaves),
                f"{step.source_spec}{_lora(step)}",
                "-> " + _braced([name.removeprefix(weights) for name in names]),
                str(step.spec),
            )
            for step, names in zip(steps, shown, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        one_line = sum(widths) + 2 * len(widths) <= width
        for row in rows:
            if one_line:
                yield ("  " + "  ".join(map(str.ljust, row, widths))).rstrip()
            else:
                yield f"  {row[0]}  {row[1]}"
                yield f"    {row[2]}  {row[3]}"
    for name, reason in plan.zeros.items():
        yield f"zeros: {name} {plan.specs[name]}: {reason}"
    for alias, name in plan.header.items():
        if name in plan.specs:
            yield f"tied: {alias} is {name}"
    for name, data in plan.files.items():
        yield f"file: {name} {size(len(data))}"


def _lora(step: Step) -> str:
    if step.leaf.a is None:
        return ""
    return f" + {step.scale:g} a b" if step.rule.lora and step.rule.lora.scaled else " + a b"


def _totals(plan: Plan) -> Iterator[str]:
    source = plan.checkpoint.source
    ways = Counter(source.how(name) for step in plan.steps for name in step.leaf.names)
    how = ", ".join(f"{count} arrays {way}" for way, count in ways.items())
    yield f"reads        {size(plan.bytes_read)} ({size(plan.bytes_decoded)} decoded): {how}"
    yield f"writes       {size(plan.bytes_written)}: {len(plan.specs)} tensors by {len(plan.steps)} rules"
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
