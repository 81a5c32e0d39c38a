"""``bridge verify``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.display import scientific
from bridge.proof.options import CHECKS, VerifyOptions

from .options import Command, GroupedOption, options, report_option
from .show import common, emit, progress, say, style, table

if TYPE_CHECKING:
    from bridge import Verdict
    from bridge.proof.checks import Check

#: modules named one by one when the proof fails
SHOWN = 12


@click.command(cls=Command)
@click.argument("src")
@click.argument("dst", required=False)
@options(VerifyOptions)
@click.option(
    "--full-model",
    cls=GroupedOption,
    group=CHECKS,
    is_flag=True,
    help="Also run the whole model on a recorded input, and compare its output with --reference.",
)
@report_option
@common
def verify(
    src: str, dst: str | None, full_model: bool, report: Path | None, as_json: bool, **options: Any
) -> None:
    """Prove that SRC and DST are the same policy; exit status 1 when they are not.

    Random inputs go through the JAX runtime's equations on one side and through torch on the other; all other
    weights must be equal after the cast; checksums and the files beside the weights are compared. SRC alone is
    checked against its own bridge.json.
    """
    import bridge

    if full_model != (options["reference"] is not None):
        raise click.UsageError(
            "--full-model and --reference go together: the model is run on what was recorded"
        )
    with progress("verifying", quiet=as_json) as show:
        verdict = bridge.verify(src, dst, progress=show, **options)
    if report is not None:
        from bridge.report.pages import verify_report

        report.write_text(verify_report(verdict), encoding="utf-8")
    if as_json:
        emit(verdict.as_json())
    else:
        _print(verdict)
        if report is not None:
            say(f"report       {report}")
    if not verdict.holds:
        raise click.exceptions.Exit(1)


def _print(verdict: Verdict) -> None:
    say(f"source       {verdict.source}")
    if verdict.destination != verdict.source:
        say(f"destination  {verdict.destination}")
    for note in verdict.notes:
        say(f"note         {note}")
    for scale in verdict.scales:
        say(f"lora scale   {scale}")
    if verdict.checks:
        counts = verdict.counts
        say(
            f"checked      {len(verdict.checks)} weights of {verdict.model}: {counts.get('runtime', 0)} run by both "
            f"runtimes, {counts.get('equal', 0)} compared after the cast; none unchecked"
        )
    for name, why in verdict.unused.items():
        say(f"not used     {name}: {why}")
    for axis, (least, most) in verdict.shared.items():
        say(
            f"not shared   entries {least} to {most - 1} of {axis}: one side was resized, and has none of them"
        )
    if verdict.checks:
        say("")
        _table(verdict)
        say("")
        _precision(verdict)
    for name, good in verdict.files.items():
        say(f"file         {'verified' if good else style('failed', fg='red')}: {name}")
    if verdict.actions is not None:
        actions = verdict.actions
        say(
            f"full model   {verdict.output}: max_abs {actions['max_abs']:.1e}, mean_abs {actions['mean_abs']:.1e} "
            f"({actions['allowed']:.0e} allowed), run by {verdict.runtime}"
        )
    if verdict.holds:
        say(style("the same policy" if verdict.checks else "matches its bridge.json", fg="green", bold=True))
        return
    for problem in verdict.problems[:SHOWN]:
        say(f"{style('fails', fg='red')}        {problem.cause}")
    if len(verdict.problems) > SHOWN:
        say(f"             and {len(verdict.problems) - SHOWN} more: --json lists them all")
    for fix in dict.fromkeys(problem.fix for problem in verdict.problems):
        say(f"fix          {fix}")
    conclusion = "not the same policy" if verdict.checks else "does not match its bridge.json"
    say(style(conclusion, fg="red", bold=True))


def _precision(verdict: Verdict) -> None:
    """The largest relative errors in the two precisions."""
    worst = verdict.worst("runtime")
    if worst is None:
        return
    say(f"float32      max relative error {worst.relative:.1e} (tolerance {worst.allowed:.1e})")
    narrow = max((check.bfloat16 or 0.0 for check in verdict.checks), default=0.0)
    say(f"bfloat16     max relative error {narrow:.1e} when both sides compute in it, as at inference")


def _table(verdict: Verdict) -> None:
    groups: defaultdict[tuple[str, str], list[Check]] = defaultdict(list)
    for check in verdict.checks:
        key = check.leaf if check.kind == "runtime" else f"{check.part}, equality"
        groups[check.kind, key].append(check)
    head = ("weights", "count", "max_abs", "mean_abs", "relative", "allowed", "in bfloat16")
    rows = [head]
    colours: list[str | None] = [None]
    for (kind, key), checks in groups.items():
        worst = max(checks, key=lambda check: check.relative)
        narrow = max((check.bfloat16 or 0.0 for check in checks), default=0.0)
        allowed = scientific(worst.allowed) if kind == "runtime" or worst.allowed else "equal"
        rows.append(
            (
                key,
                str(len(checks)),
                scientific(max(check.max_abs for check in checks)),
                scientific(max(check.mean_abs for check in checks)),
                scientific(worst.relative),
                allowed,
                scientific(narrow) if kind == "runtime" else "",
            )
        )
        colours.append(None if all(check.holds for check in checks) else "red")
    table(rows, right=True, colours=colours)
