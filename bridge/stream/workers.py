"""Independent tasks on an executor: the largest first, as many at once as memory allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class Load:
    """What a task costs, in bytes."""

    work: int
    """Dealt with in all."""
    memory: int
    """Held at once."""


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
        budget: bytes that tasks running at once may hold; one that needs more runs alone.
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
            held = sum(loads[number].memory for number in running.values())
            fits = next((n for n in order if not running or held + loads[n].memory <= budget), None)
            if fits is None:
                break
            order.remove(fits)
            running[submit(fits)] = fits
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            number = running.pop(future)
            results[number] = future.result()
            finished(number)
    return [results[number] for number in range(len(loads))]
