"""``bridge diff``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import lora
from .show import common, progress, say

if TYPE_CHECKING:
    from bridge.compare.diff import Comparison, Difference


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--base", metavar="PATH", help="Weights that an adapter among the two applies to.")
@lora
@click.option("--only", type=click.Choice(["changed"]), help="Leave out weights that are equal.")
@click.option(
    "--workers", type=click.IntRange(1), default=2, show_default=True, help="Leaves compared at once."
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML report.")
@common
def diff(
    a: str,
    b: str,
    base: str | None,
    lora_alpha: dict[str, float],
    rslora: bool,
    only: str | None,
    workers: int,
    report: Path | None,
    as_json: bool,
) -> None:
    """Show what differs between the checkpoints A and B, in any two formats.

    Effective weights are compared, LoRA factors summed in; each line is one kind of weight, the
    most changed first. Exit status 0 whether they differ or not.
    """
    from bridge.compare.diff import diff as compare

    with progress("comparing", quiet=as_json) as show:
        comparison = compare(
            a,
            b,
            base=base,
            lora_alpha=lora_alpha or None,
            rslora=rslora,
            workers=workers,
            progress=show,
        )
    if report is not None:
        from bridge.report.pages import diff_report

        report.write_text(diff_report(comparison), encoding="utf-8")
    if as_json:
        found = comparison.as_json()
        if only:
            found["differences"] = [each for each in found["differences"] if each["changed"]]
        click.echo(json.dumps(found, indent=2))
    else:
        _print(comparison, only_changed=only is not None)
        if report is not None:
            say(f"report       {report}")


def _print(comparison: Comparison, *, only_changed: bool) -> None:
    say(f"a            {comparison.a}  {comparison.states[0]}")
    say(f"b            {comparison.b}  {comparison.states[1]}")
    say(
        f"model        {comparison.model}: {len(comparison.changed)} of {len(comparison.differences)} weights differ"
    )
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
        if only_changed and not any(each.changed for each in group):
            continue
        dtypes = dict.fromkeys(
            f"{d.dtype_a}" if d.dtype_a == d.dtype_b else f"{d.dtype_a} -> {d.dtype_b}" for d in group
        )
        lora = next((each.lora for each in group if each.lora), "")
        rows.append(
            (
                group[0].leaf,
                f"{sum(each.changed for each in group)}/{len(group)}",
                _number(max(each.relative for each in group)),
                _number(max(each.max_abs for each in group)),
                ", ".join(dtypes),
                {"both": "a, b"}.get(lora, lora),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        say(click.style(line, dim=True) if number == 0 else line)


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"
