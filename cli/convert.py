"""``bridge convert``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from bridge.conversion.options import OUTPUT, Options
from bridge.display import byte_size

from .options import Command, GroupedOption, Names, attributes, options, spellings, write_section
from .show import columns, common, emit, progress, say, style

if TYPE_CHECKING:
    from bridge import Plan, Result


def targets() -> tuple[str, ...]:
    """The formats that can be written."""
    from bridge.conversion.converters import targets

    return targets()


class Convert(Command):
    """``bridge convert``, with the options of the families that are installed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from bridge.conversion.settings import family_options

        own = (
            GroupedOption(
                spellings(keyword, option),
                **attributes(option, f"Models of {' and '.join(family.name for family in sharing)}"),
            )
            for keyword, (option, sharing) in family_options().items()
        )
        return [*super().get_params(ctx), *own]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from bridge.rules.family import families

        rows = []
        for family in families():
            models = ", ".join(dict.fromkeys(model.name for model in family.models))
            layouts = dict.fromkeys(layout.name for model in family.models for layout in model.written)
            rows.append((family.name, f"models {models}; layouts {', '.join(layouts)}"))
        write_section(formatter, "Installed families", rows)


@click.command(cls=Convert)
@click.argument("src")
@click.argument("dst")
@click.option(
    "--to",
    cls=GroupedOption,
    group=OUTPUT,
    type=Names(targets),
    required=True,
    help="Format to write.",
)
@options(Options)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@common
def convert(src: str, dst: str, to: str, dry_run: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint SRC into the new directory DST.

    SRC is a training step, its params/, a directory of steps (the latest complete step is used), a gs:// URL
    of any of these, a directory of PyTorch weights or of an adapter, a trainer's run with such directories in
    it, or a repository's folder in the hub's cache. Files that belong to the model, such as norm stats, are
    copied too. DST is written atomically.
    """
    import bridge

    with progress("comparing", quiet=quiet or as_json or options["base"] is None) as show:
        plan = bridge.plan(src, dst, to=to, progress=show, **options)
    if dry_run:
        if as_json:
            emit(_plan_json(plan))
        else:
            for line in plan.text(columns()).split("\n"):
                say(line)
        return
    if not quiet:
        # where nobody reads, the output is made all the same, and what is said at the end fails again
        with contextlib.suppress(BrokenPipeError):
            for line in plan.headline():
                say(line, as_json=as_json)
    with progress("converting", quiet=quiet or as_json) as show:
        result = plan.run(show)
    if not quiet:
        for line in _result_lines(result):
            say(line, as_json=as_json)
    if as_json:
        emit(_plan_json(plan, rules=False) | _result_json(result))


def _result_lines(result: Result) -> list[str]:
    rate = byte_size(result.bytes_per_second)
    lines = [
        *(f"note         {note}" for note in result.notes),
        f"{style('wrote', fg='green')}        {result.destination}, {result.tensors} tensors",
        f"             read {byte_size(result.bytes_read)}, wrote {byte_size(result.bytes_written)} "
        f"in {result.converting_seconds:.3g} s, {rate}/s, peak memory {byte_size(result.peak_memory)}",
        *_floor_lines(result),
        f"             checksum {result.checksum}",
    ]
    if result.proof is not None:
        proof = result.proof
        lines.append(
            f"{style('proof', fg='green')}        {proof}, {proof.seconds:.3g} s "
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
        "facts": {key: fact.as_json() for key, fact in plan.facts.items()},
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
