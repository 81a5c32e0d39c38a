"""``bridge convert``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from bridge.converters import STATES, TARGETS
from bridge.errors import printable

from .options import lora, ranks
from .show import columns, common, progress, say

if TYPE_CHECKING:
    from bridge import Plan, Result

FORMATS = sorted({state.name for state in STATES})


@click.command()
@click.argument("src")
@click.argument("dst")
@click.option("--to", type=click.Choice(TARGETS), required=True, help="Format to make.")
@click.option("--from", "from_", type=click.Choice(FORMATS), help="Format of SRC; it tells itself as a rule.")
@click.option(
    "--dtype",
    type=click.Choice(("keep", "float32", "bfloat16", "float16")),
    help="dtype to write; default bfloat16, or float32 when LoRA is folded. The narrow ones keep in float32 "
    "what openpi's runtime holds in float32.",
)
@lora
@click.option("--layout", default="openpi", show_default=True, help="Names: openpi, lerobot or transformers.")
@click.option(
    "--base", metavar="PATH", help="Weights an adapter applies to; with --to peft-adapter, to compare with."
)
@click.option("--with-base", is_flag=True, help="Write the base an adapter applies to into DST/base.")
@click.option("--base-name", metavar="NAME", help="An adapter's base_model_name_or_path.")
@click.option("--keep-alpha", is_flag=True, help="Keep an adapter's factors bit for bit, the scale as alpha.")
@click.option(
    "--rank",
    multiple=True,
    metavar="[EXPERT=]RANK",
    callback=ranks,
    help="With --to peft-adapter: compress modules to this rank, by SVD. With --to orbax: rank of the LoRA leaves.",
)
@click.option(
    "--modules-to-save", is_flag=True, help="Put the weights that differ from --base into the adapter."
)
@click.option("--fold", is_flag=True, help="With --to orbax: sum the adapter into the weights.")
@click.option("--lossy", is_flag=True, help="With --to orbax: approximate factors that do not fit, by SVD.")
@click.option(
    "--value-suffix", is_flag=True, help="With --to orbax: end leaves in 'value', as training does."
)
@click.option("--action-horizon", type=click.IntRange(1), help="Length of an action chunk, for config.json.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--overwrite", is_flag=True, help="Replace DST, once the new one is whole, if bridge wrote it.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@common
def convert(
    src: str,
    dst: str,
    to: str,
    from_: str | None,
    dtype: str | None,
    lora_alpha: dict[str, float],
    rslora: bool,
    layout: str,
    base: str | None,
    with_base: bool,
    base_name: str | None,
    keep_alpha: bool,
    rank: int | dict[str, int] | None,
    modules_to_save: bool,
    fold: bool,
    lossy: bool,
    value_suffix: bool,
    action_horizon: int | None,
    dry_run: bool,
    overwrite: bool,
    workers: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint SRC into the new directory DST.

    SRC is a training step, its params/, a directory of steps (the newest finished one is taken),
    a gs:// URL of one, or an adapter's directory. Norm stats travel along. DST appears whole or
    not at all.
    """
    import bridge

    with progress("comparing", quiet=quiet or as_json or base is None) as show:
        plan = bridge.plan(
            src,
            dst,
            to=to,
            from_=from_,
            base=base,
            dtype=dtype,
            lora_alpha=lora_alpha or None,
            rslora=rslora,
            layout=layout,
            action_horizon=action_horizon,
            keep_alpha=keep_alpha,
            rank=rank,
            with_base=with_base,
            base_name=base_name,
            modules_to_save=modules_to_save,
            fold=fold,
            lossy=lossy,
            value_suffix=value_suffix,
            overwrite=overwrite,
            workers=workers,
            progress=show,
        )
    if dry_run:
        if as_json:
            click.echo(json.dumps(_plan_json(plan), indent=2))
        else:
            say(plan.text(columns()))
        return
    if not quiet:
        for line in plan.headline():
            say(line, as_json=as_json)
    with progress("converting", quiet=quiet or as_json) as show:
        result = plan.run(show)
    if not quiet:
        for line in _result_lines(result):
            say(line, as_json=as_json)
    if as_json:
        click.echo(json.dumps(_plan_json(plan, rules=False) | _result_json(result), indent=2))


def _result_lines(result: Result) -> list[str]:
    from bridge.conversion.render import size

    rate = size(result.bytes_per_second)
    lines = [
        *(f"note         {printable(note)}" for note in result.notes),
        f"{click.style('wrote', fg='green')}        {printable(str(result.destination))}, {result.tensors} tensors",
        f"             read {size(result.bytes_read)}, wrote {size(result.bytes_written)} "
        f"in {result.converting_seconds:.3g} s, {rate}/s, peak memory {size(result.peak_memory)}",
        *_floor_lines(result),
        f"             checksum {result.checksum}",
    ]
    if result.proof is not None:
        proof = result.proof
        lines.append(
            f"{click.style('proof', fg='green')}        {proof}, {proof.seconds:.3g} s "
            f"({proof.importing:.2g} s of it waiting for PEFT to be imported)"
        )
    return lines


def _floor_lines(result: Result) -> list[str]:
    """How the run compares with its own reading and writing, where that was measured."""
    spent, workers = result.spent, result.workers
    # of a moment's work the ratio says nothing
    if not result.floor or result.converting_seconds < 1:
        return []
    return [
        f"             {result.converting_seconds / result.floor:.1f} x its floor: {workers} workers waited "
        f"{spent.read:.1f} s for reads, decoded {spent.decode:.1f} s, wrote {spent.write:.1f} s"
    ]


def _result_json(result: Result) -> dict[str, Any]:
    proof = result.proof
    return {
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "seconds": result.seconds,
        "floor": result.floor,
        "spent": vars(result.spent),
        "bytes_per_second": result.bytes_per_second,
        "peak_memory": result.peak_memory,
        "checksum": result.checksum,
        "leftovers": list(result.notes),
        "proof": None
        if proof is None
        else {
            "peft": proof.peft,
            "modules": len(proof.errors),
            "largest_error": proof.largest,
            "largest_output_error": max(proof.outputs.values()),
            "seconds": proof.seconds,
            "importing": proof.importing,
        },
    }


def _plan_json(plan: Plan, *, rules: bool = True) -> dict[str, Any]:
    made: dict[str, Any] = {
        "source": str(plan.checkpoint.source.location),
        "destination": str(plan.destination),
        "model": plan.inputs.model.name,
        "state": str(plan.checkpoint.state),
        "route": [edge.name for edge in plan.route],
        "loss": plan.loss.name.lower(),
        "dtype": plan.dtype,
        "layout": plan.layout.name,
        "scales": {
            name: {"rank": s.rank, "alpha": s.alpha, "rslora": s.rslora, "scale": s.value, "origin": s.origin}
            for name, s in plan.scales.items()
        },
        "tensors": sum(len(output.specs) for output in plan.outputs),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory": plan.memory,
        "notes": list(plan.notes),
    }
    if rules:
        made["rules"] = [
            {
                "part": step.part,
                "leaf": step.rule.leaf,
                "axes": step.rule.axes,
                "shape": list(step.leaf_spec.shape),
                "dtype": step.leaf_spec.dtype.name,
                "lora": step.factors is not None,
                "scale": getattr(step.factors, "scale", None),
                "reads": [
                    {"from": which, "name": name, "how": plan.inputs.sources[which].how(name)}
                    for which, name in step.reads
                ],
                "tensors": {
                    name: {"dtype": spec.dtype.name, "shape": list(spec.shape)}
                    for name, spec in step.specs.items()
                },
                "output": output.where,
            }
            for output in plan.outputs
            for step in output.steps
        ]
        made["zeros"] = {name: why for output in plan.outputs for name, why in output.zeros.items()}
        made["files"] = sorted(
            f"{output.where}/{name}".lstrip("/") for output in plan.outputs for name in output.files
        )
    return made
