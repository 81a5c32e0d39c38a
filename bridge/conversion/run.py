"""Carrying out a job: steps over workers, within a memory budget, into an output that appears whole."""

from __future__ import annotations

import resource
import sys
import time
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from bridge.conversion.job import Job
from bridge.conversion.provenance import record_text
from bridge.errors import OutputRefused, Problem, Refusal, SourceRefused, ValueRefused, refuse_if
from bridge.formats.contract import Format, Sink, Timings, format_named
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import changed_files
from bridge.proof.peft import Proof
from bridge.publish.atomic import publishing
from bridge.publish.record import RECORD, combined, stale_arrays
from bridge.stream.output import Output
from bridge.stream.readers import Done, Tick
from bridge.stream.step import run_step
from bridge.stream.workers import STOPPED, Counter, Load, Progress, Stopped, on_threads, schedule

ABANDONED = ".abandoned"
"""In the private directory, once what is being made there is not wanted any more."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a conversion did."""

    destination: Path
    bytes_read: int
    bytes_written: int
    tensors: int
    seconds: float
    peak_memory: int
    """Highest resident memory of this process so far, in bytes."""
    checksum: str
    """xxh3-128 over the checksums of all tensors, in order of name."""
    spent: Timings = field(default_factory=Timings)
    """Of all workers together."""
    workers: int = 1
    notes: tuple[str, ...] = ()
    """What killed runs had left beside the destination, and what became of it."""

    proof: Proof | None = None
    """The proof of an adapter, made before the adapter is published."""

    @property
    def floor(self) -> float:
        """Seconds that waiting for reads, decoding and writing alone took, shared by the workers."""
        return (self.spent.read + self.spent.decode + self.spent.write) / self.workers

    @property
    def converting_seconds(self) -> float:
        """``seconds`` without the proof."""
        return self.seconds - (self.proof.seconds if self.proof is not None else 0.0)

    @property
    def bytes_per_second(self) -> float:
        return (self.bytes_read + self.bytes_written) / max(self.converting_seconds, 1e-9)


def run(job: Job, progress: Progress | None = None, executor: Executor | None = None) -> Result:
    """Carry out a plan. The output appears whole or not at all.

    Args:
        job (`Plan`): from :func:`bridge.plan`.
        progress (`Callable[[int, int], None]`, *optional*): called with the bytes converted, and their total.
        executor (`concurrent.futures.Executor`, *optional*): runs the steps; threads of this process by default.
            Steps can be pickled, and the output directory must be reachable from its workers. TensorStore does
            not survive a fork: a process pool needs ``mp_context=multiprocessing.get_context("spawn")``.

    Returns:
        `Result`: bytes, seconds, peak memory, a checksum and, for an adapter, its proof.

    Raises:
        Refusal: a value cannot be converted, the source cannot be read or changed meanwhile, the
            output cannot be written, another run writes it, or the destination has come to exist.
            Nothing is left behind.
        ValueError: the plan has no destination.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> plan = bridge.plan(sample, "my_base", to="torch-base")
        >>> result = bridge.run(plan)
        >>> result.destination.name, result.tensors, result.bytes_written == plan.bytes_written
        ('my_base', 107, True)
    """
    if job.destination is None:
        raise ValueError("this plan has no destination")
    began = time.perf_counter()
    counter = Counter(job.bytes_decoded, progress)
    spent = Timings()
    notes: list[str] = []
    proof = None
    # what a proof needs takes seconds to import: that begins while the output is made
    started = None if job.prover is None else job.prover.start()
    with publishing(job.destination, overwrite=job.overwrite, notes=notes) as directory:
        try:
            checksums = {
                output.where: _make(job, output, directory, counter.add, executor, spent)
                for output in job.outputs
            }
        except Exception as error:
            # whatever was found wrong with files that changed: that they did is the cause
            if problems := changed_files(job.stamps):
                raise SourceRefused(*problems) from error
            raise
        refuse_if(changed_files(job.stamps), SourceRefused)
        if job.prover is not None and started is not None:
            proof = job.prover.check(directory, job.output, job.inputs, job.workers, started)
    return Result(
        destination=job.destination,
        bytes_read=job.bytes_read,
        bytes_written=job.bytes_written,
        tensors=sum(len(output.specs) for output in job.outputs),
        seconds=time.perf_counter() - began,
        peak_memory=peak_memory(),
        checksum=checksums[""],
        notes=tuple(notes),
        spent=spent,
        workers=job.workers,
        proof=proof,
    )


def _make(
    job: Job, output: Output, directory: Path, tick: Tick, executor: Executor | None, spent: Timings
) -> str:
    """Write one output below the private directory; returns its checksum, and adds up what was spent."""
    format = format_named(output.state.format)
    assert format.create is not None
    place = directory / output.where
    place.mkdir(exist_ok=True)
    sink = format.create(place, output.specs, output.header, output.zeros)
    done = run_steps(job, output, sink, tick, executor, place / ABANDONED)
    began = time.perf_counter()
    sink.finish()
    spent.write += time.perf_counter() - began
    for name, data in output.files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for each in done:
        spent.read += each.spent.read
        spent.decode += each.spent.decode
        spent.write += each.spent.write
    sums = {name: checksum for each in done for name, checksum in each.written.items()}
    (place / RECORD).write_text(record_text(job, output, place, done, sums))
    _reopen(format, place, output)
    return combined(sums)


def _reopen(format: Format, place: Path, output: Output) -> None:
    """Open what was written as any reader would: an output that this refuses is not published."""
    try:
        read = dict(format.open(Location.parse(place)).specs)
    except Refusal as refused:
        raise OutputRefused(*refused.problems) from refused
    if read != output.specs:
        name = next(name for name in {**output.specs, **read} if read.get(name) != output.specs.get(name))
        raise OutputRefused(
            Problem(
                f"{place}: {name} is {read.get(name, 'missing')} when read back, "
                f"not {output.specs.get(name, 'planned')}",
                "check the disk, and convert again; where it stays, report it",
            )
        )


def run_steps(
    job: Job,
    output: Output,
    sink: Sink,
    tick: Tick,
    executor: Executor | None = None,
    abandoned: Path | None = None,
) -> list[Done]:
    """Run every step of an output into its sink, as many at once as workers and memory budget allow.

    Args:
        job: what the output belongs to.
        output: whose steps to run.
        sink: takes what they write.
        tick: called with decoded source bytes processed.
        executor: runs the steps; threads of this process by default.
        abandoned: a file that is made to tell steps on an executor to stop.

    Raises:
        ValueRefused: weights whose values cannot be converted, all of them.
        SourceRefused: the source cannot be read, or is not what the record beside it says.
    """
    sources, steps = job.inputs.sources, output.steps
    loads = [Load(step.bytes_read + step.bytes_written, step.memory) for step in steps]
    if executor is None:
        done = on_threads(
            lambda number, stoppable: run_step(steps[number], sources, sink, stoppable),
            loads,
            workers=job.workers,
            budget=job.memory_budget,
            tick=tick,
        )
    else:
        unless = None if abandoned is None else _Unless(abandoned)
        submitted: list[Future[Done]] = []

        def submit(number: int) -> Future[Done]:
            submitted.append(executor.submit(run_step, steps[number], sources, sink, unless))
            return submitted[-1]

        def finished(number: int) -> None:
            tick(sum(job.inputs.spec(read).nbytes for read in steps[number].reads))

        try:
            done = schedule(submit, loads, workers=job.workers, budget=job.memory_budget, finished=finished)
        except BaseException:
            # not cancelled: dask calls a step cancelled that works on, in a directory that is about to go
            if abandoned is not None:
                abandoned.touch()
            wait(submitted)
            raise
    problems = [problem for each in done for problem in each.problems]
    if not job.options["no_check"]:
        read = {key: checksum for each in done for key, checksum in each.read.items()}
        stale = [
            problem
            for which, source in sources.items()
            for problem in stale_arrays(source, {name: read[of, name] for of, name in read if of == which})
        ]
        # values that are wrong, in a file that is not what it was: that it is not is the cause
        refuse_if([*stale, *problems] if stale else (), SourceRefused)
    refuse_if(problems, ValueRefused)
    return done


@dataclass(frozen=True)
class _Unless:
    """A tick for workers that share nothing with this process but the output's directory."""

    abandoned: Path

    def __call__(self, count: int) -> None:
        if self.abandoned.exists():
            raise Stopped(STOPPED)


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
