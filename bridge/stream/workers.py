"""Independent tasks on workers: the largest first, as many at once as memory allows."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from threadpoolctl import threadpool_limits

from bridge.errors import Problem, Refusal
from bridge.formats.disk.bucket import give_up_with
from bridge.stream.readers import Tick

R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called with the bytes processed so far, and their total."""


@dataclass(frozen=True)
class Load:
    """What a task costs, in bytes."""

    work: int
    """Processed in all."""
    memory: int
    """In memory at once."""


def schedule(
    submit: Callable[[int], Future[R]],
    loads: Sequence[Load],
    *,
    workers: int,
    budget: int,
    finished: Callable[[int], None] = lambda number: None,
) -> list[R]:
    """Run tasks and return their results, in the order of the loads.

    Args:
        submit: starts a task, by its number.
        loads: what each costs.
        workers: tasks at once.
        budget: bytes that tasks running at once may take; one that needs more runs alone.
        finished: called with the number of each task that is done.

    Raises:
        Exception: what the first task to fail raised; those under way go on, no other is started.
    """
    # the largest would otherwise run alone at the end
    order = deque(sorted(range(len(loads)), key=lambda number: (-loads[number].work, number)))
    results: dict[int, R] = {}
    running: dict[Future[R], int] = {}
    while order or running:
        while order and len(running) < workers:
            taken = sum(loads[number].memory for number in running.values())
            fits = next((n for n in order if not running or taken + loads[n].memory <= budget), None)
            if fits is None:
                break
            order.remove(fits)
            running[submit(fits)] = fits
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            number = running.pop(future)
            results[number] = future.result()
            finished(number)
    return [results[number] for number in range(len(loads))]


class Stopped(Refusal):
    """Raised inside a task that is not needed any more."""


#: what it says; from a process of its own it is pickled, so it is made as every refusal is
STOPPED = Problem("stopped", "see the first error")


class Counter:
    """Adds up bytes from several threads, and reports the sum.

    Args:
        total: bytes in all.
        progress: called with the sum and the total.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._count = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._count += count
            if self._progress is not None:
                self._progress(min(self._count, self._total), self._total)


def on_threads(
    call: Callable[[int, Tick], R], loads: Sequence[Load], *, workers: int, budget: int, tick: Tick
) -> list[R]:
    """Run tasks on threads of this process; see :func:`schedule`.

    Args:
        call: runs a task, by its number, and calls the function it is given as bytes are processed.
        loads: what each costs.
        workers: tasks at once.
        budget: bytes that tasks running at once may take.
        tick: called as bytes are processed, from any thread.
    """
    stop = threading.Event()

    def stoppable(count: int) -> None:
        if stop.is_set():
            raise Stopped(STOPPED)
        tick(count)

    # a worker is a thread already: threads of the linear algebra's own would only wait for each other
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(
            workers, thread_name_prefix="bridge", initializer=give_up_with, initargs=(stop,)
        ) as pool,
    ):
        try:
            return schedule(
                lambda number: pool.submit(call, number, stoppable), loads, workers=workers, budget=budget
            )
        finally:
            # on an error, tasks under way stop at their next slab, so that nothing outlives this call
            stop.set()
