"""``bridge diff``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.checkpoint.options import SourceOptions
from bridge.display import scientific

from .options import Command, options, report_option
from .show import common, emit, progress, say, table

if TYPE_CHECKING:
    from bridge import Comparison
    from bridge.compare.diff import Difference


@click.command(cls=Command)
@click.argument("a")
@click.argument("b")
@options(SourceOptions)
@click.option("--changed-only", is_flag=True, help="Leave out weights that are equal.")
@click.option("--only", type=click.Choice(["changed"]), hidden=True)
@report_option
@common
def diff(
    a: str,
    b: str,
    changed_only: bool,
    only: str | None,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what differs between the checkpoints A and B, in any two formats.

    Effective weights are compared, LoRA factors summed in; each line is one kind of weight, the most changed
    first. Exit status 0 whether they differ or not.
    """
    import bridge

    # --only changed is how --changed-only was spelled
    changed_only = changed_only or only is not None
    with progress("comparing", quiet=as_json) as show:
        comparison = bridge.diff(a, b, progress=show, **options)
    if report is not None:
        from bridge.report.pages import diff_report

        report.write_text(diff_report(comparison), encoding="utf-8")
    if as_json:
        found = comparison.as_json()
        if changed_only:
            found["differences"] = [each for each in found["differences"] if each["changed"]]
        emit(found)
    else:
        _print(comparison, changed_only=changed_only)
        if report is not None:
            say(f"report       {report}")


def _print(comparison: Comparison, *, changed_only: bool) -> None:
    say(f"a            {comparison.a}  {comparison.states[0]}")
    say(f"b            {comparison.b}  {comparison.states[1]}")
    say(
        f"model        {comparison.model}: {len(comparison.changed)} of {len(comparison.differences)} weights differ"
    )
    for note in comparison.notes:
        say(f"note         {note}")
    narrowed = [d for d in comparison.changed if d.dtype_a != d.dtype_b]
    if narrowed:
        say(f"             {len(narrowed)} of these are of another dtype, which alone may be why")
    say("")
    families: defaultdict[str, list[Difference]] = defaultdict(list)
    for each in comparison.differences:
        families[each.leaf].append(each)
    order = sorted(families.values(), key=lambda group: -max(each.relative for each in group))
    head = ("weights", "changed", "relative", "max_abs", "dtypes", "LoRA")
    rows = [head]
    for group in order:
        if changed_only and not any(each.changed for each in group):
            continue
        dtypes = dict.fromkeys(
            f"{d.dtype_a}" if d.dtype_a == d.dtype_b else f"{d.dtype_a} -> {d.dtype_b}" for d in group
        )
        lora = next((each.lora for each in group if each.lora), "")
        rows.append(
            (
                group[0].leaf,
                f"{sum(each.changed for each in group)}/{len(group)}",
                scientific(max(each.relative for each in group)),
                scientific(max(each.max_abs for each in group)),
                ", ".join(dtypes),
                {"both": "a, b"}.get(lora, lora),
            )
        )
    table(rows)
