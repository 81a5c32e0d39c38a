"""Making a plan, in stages: what is opened, decided and built, and what its destination allows."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path
from typing import Unpack

from bridge.conversion.built import build
from bridge.conversion.decided import decide
from bridge.conversion.job import Job
from bridge.conversion.opened import open_inputs
from bridge.conversion.options import Options
from bridge.conversion.render import head, plan_text
from bridge.conversion.run import Result, run
from bridge.conversion.settings import read_options
from bridge.errors import OutputRefused, Problem, refuse_if
from bridge.publish.preflight import check_kept, check_space, check_twins, destination_at
from bridge.stream.workers import Progress


class Plan(Job):
    """A conversion before it is carried out. Printing it is the dry run. Made by :func:`bridge.plan`."""

    def __str__(self) -> str:
        return self.text()

    def headline(self) -> list[str]:
        """Source, route, loss, scales and notes: what a user must know before it runs."""
        return list(head(self))

    def text(self, width: int = 200) -> str:
        """The whole plan, for a terminal of this width."""
        return plan_text(self, width)

    def run(self, progress: Progress | None = None, executor: Executor | None = None) -> Result:
        """Carry it out: see :func:`bridge.run`."""
        return run(self, progress, executor)


def plan(
    src: str | Path,
    dst: str | Path | None,
    *,
    to: str,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Plan a conversion: every read, every write, every shape, dtype and byte count. Nothing is written.

    Names, shapes and dtypes are read, and of tensor data a few values of every leaf where an adapter is made
    or meets its base; more only where an option says so: ``base`` and ``rank`` to an adapter, and the factors
    of an adapter that are too large for the LoRA leaves.

    Args:
        src (`str` or `Path`): a step directory, its ``params``, a directory of steps, the URL of a bucket
            that has one of these, a directory of PyTorch weights or of an adapter, a trainer's run with such
            directories in it, or a repository's folder in the hub's cache.
        dst (`str`, `Path` or `None`): the directory to make; None plans without one.
        to (`str`): the format asked for: ``"torch-merged"``, ``"torch-base"``, ``"peft-adapter"`` or ``"orbax"``.
        progress (`Callable[[int, int], None]`, *optional*): called with the bytes compared with ``base``, and
            their total.
        **options: the fields of :class:`bridge.Options`, and the options of families by their keywords
            (for type checkers: in ``settings``, by their keywords).

    Returns:
        `Plan`: print it to see what a conversion will do; :meth:`Plan.run` carries it out.

    Raises:
        Refusal: with every problem.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> plan = bridge.plan(sample, None, to="torch-merged", lora_alpha=8)
        >>> plan.dtype, len(plan.specs)
        ('float32', 107)
        >>> [scale.value for scale in plan.scales.values()]  # alpha / rank, by part
        [2.0, 1.0]
    """
    if dst is not None and "://" in str(dst):
        raise OutputRefused(Problem(f"{dst}: outputs are written to local disk", "name a local path"))
    options = read_options(options)
    destination = None if dst is None else destination_at(dst)
    opened = open_inputs(src, to, options, destination)
    decided = decide(opened, destination, progress)
    built = build(opened, decided)
    planned = Plan(
        inputs=opened.inputs,
        destination=destination,
        route=opened.route,
        loss=built.loss,
        scales=decided.request.scales,
        facts=decided.beside.known.facts,
        outputs=built.outputs,
        notes=(*opened.notes, *decided.notes, *built.notes),
        options=opened.options,
        read_scales=built.read_scales,
        prover=built.prover,
        overwrite=options["overwrite"],
        workers=options["workers"],
        stamps=decided.stamps,
    )
    if destination is not None:
        _check_outputs(planned, destination)
    return planned


def _check_outputs(planned: Plan, destination: Path) -> None:
    """Raises OutputRefused: an output would replace what is read, has names that are one on disk, or is too large."""
    problems = check_kept(destination, planned.stamps)
    for output in planned.outputs:
        problems += check_twins(destination / output.where, (*output.specs, *output.files))
    refuse_if(problems, OutputRefused)
    refuse_if(check_space(destination, planned.bytes_written), OutputRefused)
