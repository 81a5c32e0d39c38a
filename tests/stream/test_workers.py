"""Scheduling: the largest task first, within the memory budget, and nothing after a failure."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from bridge.stream.workers import Load, schedule


class Watched:
    """Runs numbers on threads; keeps what ran at once."""

    def __init__(self, loads: list[Load], fails: int | None = None) -> None:
        self.loads, self.fails = loads, fails
        self.order: list[int] = []
        self.running: set[int] = set()
        self.most = 0
        self.held = 0
        self.lock = threading.Lock()

    def submit(self, threads: ThreadPoolExecutor, number: int) -> Future[int]:
        self.order.append(number)
        with self.lock:
            self.running.add(number)
            self.most = max(self.most, len(self.running))
            self.held = max(self.held, sum(self.loads[n].memory for n in self.running))
        return threads.submit(self.work, number)

    def work(self, number: int) -> int:
        if number == self.fails:
            raise RuntimeError("it fails")
        with self.lock:
            self.running.discard(number)
        return number * number


LOADS = [Load(work, memory) for work, memory in ((3, 5), (50, 40), (7, 5), (20, 70), (1, 200), (9, 30))]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_schedule_runs_the_largest_first_within_its_budget(workers: int) -> None:
    watched = Watched(LOADS)
    with ThreadPoolExecutor(workers) as threads:
        results = schedule(lambda n: watched.submit(threads, n), LOADS, workers=workers, budget=100)
    assert results == [n * n for n in range(len(LOADS))]
    assert watched.order[0] == 1
    assert watched.most <= workers
    assert watched.held <= 200, "what needs more than the budget runs alone"
    if workers == 1:
        assert watched.order == sorted(range(len(LOADS)), key=lambda n: -LOADS[n].work)


def test_schedule_starts_nothing_after_a_failure() -> None:
    watched = Watched(LOADS, fails=1)
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="it fails"):
        schedule(lambda n: watched.submit(threads, n), LOADS, workers=1, budget=100)
    assert watched.order == [1]
