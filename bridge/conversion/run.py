"""Carrying out a plan: steps over workers, within a memory budget, into an output that appears whole."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from bridge import converters
from bridge.conversion.job import Plan
from bridge.conversion.outputs import Output
from bridge.errors import OutputRefused, Problem, Refusal, SourceRefused, ValueRefused, refuse_if
from bridge.formats.contract import Format, Sink, Spent
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import changed
from bridge.plugins import formats
from bridge.publish.atomic import RECORD, publishing
from bridge.publish.record import combined, record_text
from bridge.stream.readers import Done, Tick
from bridge.stream.step import Step, run_step
from bridge.stream.workers import Load, schedule

if TYPE_CHECKING:
    from bridge.proof.peft import Proof

ABANDONED = ".abandoned"
"""In the private directory, once what is being made there is not wanted any more."""

Progress = Callable[[int, int], None]
"""Called with the decoded source bytes dealt with so far, and their total."""


@dataclass(frozen=True)
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
    spent: Spent = field(default_factory=Spent)
    """Of all workers together."""
    workers: int = 1
    notes: tuple[str, ...] = ()
    """What killed runs had left beside the destination, and what was done about it."""

    proof: Proof | None = None
    """What the proof of an adapter found; it stands before the adapter is published."""

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


def run(plan: Plan, progress: Progress | None = None, executor: Executor | None = None) -> Result:
    """Carry out a plan.

    Args:
        plan: from :func:`bridge.plan`.
        progress: called as bytes are dealt with.
        executor: runs the steps; threads of this process by default. Steps can be pickled and
            the output directory must be reachable from its workers. TensorStore does not survive
            a fork: a process pool needs ``mp_context=multiprocessing.get_context("spawn")``.

    Raises:
        Refusal: a value cannot be converted, the source cannot be read or changed meanwhile, the
            output cannot be written, another run writes it, or the destination has come to exist.
            Nothing is left behind.
    """
    if plan.destination is None:
        raise ValueError("this plan has no destination")
    began = time.perf_counter()
    counter = _Counter(plan.bytes_decoded, progress)
    spent = Spent()
    notes: list[str] = []
    proof = importing = None
    if plan.output.state is converters.PEFT:
        from bridge.proof.peft_skeleton import import_peft

        importing = import_peft()
    with publishing(plan.destination, overwrite=plan.overwrite, notes=notes) as directory:
        try:
            checksums = {
                output.where: _make(plan, output, directory, counter.add, executor, spent)
                for output in plan.outputs
            }
        except Exception as error:
            # whatever was found wrong with files that changed: that they did is the cause
            if problems := changed(plan.stamps):
                raise SourceRefused(*problems) from error
            raise
        refuse_if(changed(plan.stamps), SourceRefused)
        if importing is not None:
            from bridge.proof.peft import prove_adapter

            proof = prove_adapter(directory, plan, importing)
    return Result(
        destination=plan.destination,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        tensors=sum(len(output.specs) for output in plan.outputs),
        seconds=time.perf_counter() - began,
        peak_memory=peak_memory(),
        checksum=checksums[""],
        notes=tuple(notes),
        spent=spent,
        workers=plan.workers,
        proof=proof,
    )


def _make(
    plan: Plan, output: Output, directory: Path, tick: Tick, executor: Executor | None, spent: Spent
) -> str:
    """Write one output below the private directory; returns its checksum, and adds up what was spent."""
    format = next(known for known in formats() if known.name == output.state.format)
    assert format.create is not None
    place = directory / output.where
    place.mkdir(exist_ok=True)
    sink = format.create(place, output.specs, output.header, output.zeros)
    done = run_steps(plan, output, sink, tick, executor, place / ABANDONED)
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
    (place / RECORD).write_text(record_text(plan, output, place, done, sums))
    _reopen(format, place, output)
    return combined(sums)


def _reopen(format: Format, place: Path, output: Output) -> None:
    """Open what was written as any reader would: an output that this refuses is not published."""
    try:
        found = dict(format.open(Location.parse(place)).specs)
    except Refusal as refused:
        raise OutputRefused(*refused.problems) from refused
    if found != output.specs:
        name = next(name for name in {**output.specs, **found} if found.get(name) != output.specs.get(name))
        raise OutputRefused(
            Problem(
                f"{place}: {name} is {found.get(name, 'missing')} when read back, "
                f"not {output.specs.get(name, 'planned')}",
                "check the disk, and convert again; where it stays, report it",
            )
        )


def run_steps(
    plan: Plan,
    output: Output,
    sink: Sink,
    tick: Tick,
    executor: Executor | None = None,
    abandoned: Path | None = None,
) -> list[Done]:
    """Run every step of an output into its sink, as many at once as workers and memory budget allow.

    Args:
        plan: what the output belongs to.
        output: whose steps to run.
        sink: takes what they write.
        tick: called with decoded source bytes dealt with.
        executor: runs the steps; threads of this process by default.
        abandoned: a file that is made to tell steps on an executor to stop.

    Raises:
        ValueRefused: weights whose values cannot be converted, all of them.
        Refusal: the source cannot be read.
    """
    sources, steps = plan.inputs.sources, output.steps
    loads = [Load(step.bytes_read + step.bytes_written, step.memory) for step in steps]
    if executor is None:
        done = _on_threads(plan, steps, loads, sink, tick)
    else:
        unless = None if abandoned is None else _Unless(abandoned)
        submitted: list[Future[Done]] = []

        def submit(number: int) -> Future[Done]:
            submitted.append(executor.submit(run_step, steps[number], sources, sink, unless))
            return submitted[-1]

        def finished(number: int) -> None:
            tick(sum(plan.inputs.spec(read).nbytes for read in steps[number].reads))

        try:
            done = schedule(submit, loads, workers=plan.workers, budget=plan.memory_budget, finished=finished)
        except BaseException:
            # not cancelled: dask calls a step cancelled that works on, in a directory that is about to go
            if abandoned is not None:
                abandoned.touch()
            wait(submitted)
            raise
    refuse_if((problem for each in done for problem in each.problems), ValueRefused)
    return done


def _on_threads(
    plan: Plan, steps: Sequence[Step], loads: Sequence[Load], sink: Sink, tick: Tick
) -> list[Done]:
    stop = threading.Event()
    stoppable = _stoppable(tick, stop)

    # a worker is a thread already: threads of the linear algebra's own would only wait for each other
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(plan.workers, thread_name_prefix="bridge") as pool,
    ):

        def submit(number: int) -> Future[Done]:
            return pool.submit(run_step, steps[number], plan.inputs.sources, sink, stoppable)

        try:
            return schedule(submit, loads, workers=plan.workers, budget=plan.memory_budget)
        finally:
            # on an error, steps under way stop at their next slab, so that nothing outlives this call
            stop.set()


class _Stopped(Refusal):
    """Raised inside a step that is not needed any more."""


def _stoppable(tick: Tick, stop: threading.Event) -> Tick:
    def check(count: int) -> None:
        if stop.is_set():
            raise _Stopped(Problem("stopped", "see the first error"))
        tick(count)

    return check


@dataclass(frozen=True)
class _Unless:
    """A tick for workers that share nothing with this process but the output's directory."""

    abandoned: Path

    def __call__(self, count: int) -> None:
        if self.abandoned.exists():
            raise _Stopped(Problem("stopped", "see the first error"))


class _Counter:
    """Adds up bytes from several threads, and passes the sum on."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._count = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._count += count
            if self._progress is not None:
                self._progress(self._count, self._total)


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
