"""Plans carried out: the same bytes whoever does the work, within the memory asked for, or nothing at all."""

import dataclasses
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.checkpoint.inputs import Inputs
from bridge.conversion.plan import Plan
from bridge.conversion.run import run_steps
from bridge.errors import OutputRefused, SourceRefused
from bridge.formats.disk.location import Location
from bridge.formats.orbax import stream
from bridge.stream.step import Step
from tests.kit import checkpoints
from tests.kit.digest import digest
from tests.kit.memory import Kept

MB = 1 << 20


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = checkpoints.pi0_tree(frozen_dtype="bfloat16")
    return checkpoints.save(tree, tmp_path_factory.mktemp("run") / "7", quick=True)


def planned(step: Path, out: Path, **options: Any) -> Plan:
    return bridge.plan(step, out, **{"to": "torch-merged", "lora_alpha": 4.0, **options})


# The same bytes.


@pytest.mark.parametrize("workers", [1, 4])
def test_output_does_not_depend_on_workers_or_on_the_run(step: Path, tmp_path: Path, workers: int) -> None:
    first = planned(step, tmp_path / "a", workers=2).run()
    again = planned(step, tmp_path / "b", workers=workers).run()
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert first.checksum == again.checksum and first.tensors == again.tensors == 125


def test_processes_give_the_same_bytes(step: Path, tmp_path: Path) -> None:
    planned(step, tmp_path / "threads").run()
    seen: list[tuple[int, int]] = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        planned(step, tmp_path / "processes").run(lambda *at: seen.append(at), pool)
        assert seen[-1][0] == seen[-1][1]
        # a refusal crosses the process boundary whole, and leaves nothing
        plan = planned(step, tmp_path / "spoiled")
        source = plan.checkpoint.source
        gone = dataclasses.replace(source, location=Location.parse(tmp_path / "gone"))  # type: ignore[type-var]
        spoiled = dataclasses.replace(plan, inputs=Inputs(dataclasses.replace(plan.checkpoint, source=gone)))
        with pytest.raises(SourceRefused) as refused:
            spoiled.run(executor=pool)
        assert refused.value.problems[0].fix and "gone" in str(refused.value)
    assert digest(tmp_path / "threads") == digest(tmp_path / "processes")
    assert not (tmp_path / "spoiled").exists()


@pytest.mark.parametrize("block", [1, 300, 1 << 23])
def test_blocks_of_any_size_give_the_same_bytes(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    expected = planned(step, tmp_path / "a").run()
    monkeypatch.setattr(stream, "SLAB_BYTES", block)
    monkeypatch.setattr(stream, "READ_BYTES", 64)
    assert planned(step, tmp_path / "b").run().checksum == expected.checksum
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize(
    "saved", [{"chunks": "grid"}, {"processes": 2}, {"layout": "zarr3"}, {"compress": False}]
)
def test_layouts_of_the_source_give_the_same_tensors(
    step: Path, tmp_path: Path, saved: dict[str, Any]
) -> None:
    expected = planned(step, tmp_path / "a").run()
    tree = checkpoints.pi0_tree(frozen_dtype="bfloat16")
    other = checkpoints.save(tree, tmp_path / "7", **{"quick": True, **saved})
    assert planned(other, tmp_path / "b").run().checksum == expected.checksum
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_every_step_can_be_pickled(step: Path, tmp_path: Path) -> None:
    plan = planned(step, tmp_path / "out")
    assert pickle.loads(pickle.dumps(plan.steps)) == plan.steps
    source = pickle.loads(pickle.dumps(plan.checkpoint.source))
    assert source.specs == plan.checkpoint.source.specs


# Progress.


def test_progress_counts_every_decoded_byte_once(step: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    plan = planned(step, tmp_path / "out", workers=4)
    plan.run(lambda done, total: seen.append((done, total)))
    counts = [done for done, _ in seen]
    assert counts == sorted(counts) and counts[-1] == plan.bytes_decoded
    assert {total for _, total in seen} == {plan.bytes_decoded}


def test_a_plan_without_a_destination_cannot_run(step: Path) -> None:
    with pytest.raises(ValueError, match="no destination"):
        bridge.plan(step, None, to="torch-merged", lora_alpha=4.0).run()


# Or nothing at all.


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
@pytest.mark.parametrize("workers", [1, 4])
def test_an_exception_in_a_step_leaves_nothing(
    step: Path, tmp_path: Path, error: type[BaseException], workers: int
) -> None:
    def fail(done: int, total: int) -> None:
        if done > total // 3:
            raise error("in a worker")

    with pytest.raises(error):
        planned(step, tmp_path / "made" / "out", workers=workers).run(fail)
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bridge")]


def test_ctrl_c_while_the_main_thread_waits_leaves_nothing(step: Path, tmp_path: Path) -> None:
    """The workers stop at the next slab: what is left is not converted first."""
    counts: list[int] = []
    plan = planned(step, tmp_path / "made" / "out", workers=2)

    def interrupt(done: int, total: int) -> None:
        if not counts:
            # to the thread that waits, as a terminal's is: one that is only noted may be noticed too late
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        counts.append(done)
        time.sleep(0.05)  # for the main thread to notice

    with pytest.raises(KeyboardInterrupt):
        plan.run(interrupt)
    assert list(tmp_path.iterdir()) == []
    assert counts[-1] < plan.bytes_decoded and len(counts) < len(plan.steps)


def test_ctrl_c_with_a_foreign_executor_leaves_nothing(step: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool, pytest.raises(KeyboardInterrupt):
        planned(step, tmp_path / "out").run(interrupt, pool)
    assert list(tmp_path.iterdir()) == []


def test_an_executor_that_takes_no_work_leaves_nothing(step: Path, tmp_path: Path) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(RuntimeError):
        planned(step, tmp_path / "made" / "out").run(executor=pool)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_while_it_is_loaded(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridge import api

    planned(step, tmp_path / "torch").run()
    file, inner = tmp_path / "torch" / "model.safetensors", api.run_steps

    def run_steps(*arguments: Any) -> Any:
        done = inner(*arguments)
        os.utime(file, ns=(0, 0))
        return done

    monkeypatch.setattr(api, "run_steps", run_steps)
    with pytest.raises(SourceRefused, match=r"model\.safetensors changed while it was read"):
        bridge.load_jax(tmp_path / "torch")


def test_an_output_that_came_to_exist_while_running(step: Path, tmp_path: Path) -> None:
    one, two = planned(step, tmp_path / "out"), planned(step, tmp_path / "out", dtype="bfloat16")
    one.run()
    before = digest(tmp_path / "out")
    with pytest.raises(OutputRefused, match="was created while bridge was running"):
        two.run()
    assert digest(tmp_path / "out") == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_to_one_output_at_once(step: Path, tmp_path: Path) -> None:
    second, refusals = planned(step, tmp_path / "out", workers=1), []

    def meet(done: int, total: int) -> None:
        # the first has begun, and has not ended
        if done == total:
            with pytest.raises(
                OutputRefused, match=rf"another bridge process \(pid {os.getpid()}\) is writing"
            ) as told:
                second.run()
            refusals.append(told.value)

    planned(step, tmp_path / "out", workers=1).run(meet)
    assert refusals
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    planned(step, tmp_path / "alone").run()
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")


# Memory.


class Recording(Executor):
    """Runs steps in threads, and records what they hold together at the most."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self.most_bytes = self.most_steps = 0
        self.order: list[int] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        step: Step = args[0]
        with self._lock:
            self.order.append(step.memory)
            self._held[step.rule.leaf] = step.memory
            self.most_bytes = max(self.most_bytes, sum(self._held.values()))
            self.most_steps = max(self.most_steps, len(self._held))

        def run() -> Any:
            time.sleep(0.002)
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    del self._held[step.rule.leaf]

        return self._pool.submit(run)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def with_memory(plan: Plan, memory: Callable[[int], int], workers: int) -> Plan:
    steps = tuple(dataclasses.replace(step, memory=memory(i)) for i, step in enumerate(plan.steps))
    output = dataclasses.replace(plan.output, steps=steps)
    return dataclasses.replace(plan, outputs=(output,), workers=workers)


@pytest.mark.parametrize(
    ("memory", "budget", "most"),
    [
        (lambda i: 200 * MB, 512 * MB, 2),  # as many as fit
        (lambda i: 600 * MB, 600 * MB, 1),  # one at a time, and none refused
        (lambda i: 1 * MB, 512 * MB, 6),  # workers are the limit
        (lambda i: 1000 * MB if i == 7 else (i % 5 + 1) * 60 * MB, 1000 * MB, 6),
        (lambda i: 0, 512 * MB, 6),
    ],
)
def test_steps_together_stay_within_the_budget(
    step: Path, tmp_path: Path, memory: Callable[[int], int], budget: int, most: int
) -> None:
    plan = with_memory(planned(step, tmp_path / "out"), memory, workers=6)
    assert plan.memory_budget == budget
    with Recording(6) as executor:
        plan.run(executor=executor)
    assert len(executor.order) == len(plan.steps)
    assert executor.most_bytes <= budget
    assert executor.most_steps <= most
    assert most == 1 or executor.most_steps > 1
    longest = max(plan.steps, key=lambda step: step.bytes_read + step.bytes_written)
    assert executor.order[0] == longest.memory, "the longest begins first"


def test_no_more_steps_at_once_than_workers(step: Path, tmp_path: Path) -> None:
    with Recording(8) as executor:
        planned(step, tmp_path / "out", workers=3).run(executor=executor)
    assert executor.most_steps <= 3


@pytest.mark.parametrize("workers", [0, -1])
def test_there_is_always_a_worker(step: Path, tmp_path: Path, workers: int) -> None:
    with pytest.raises(bridge.Refusal, match=f"--workers is {workers}"):
        planned(step, tmp_path / "out", workers=workers)
    assert planned(step, tmp_path / "out", workers=1).workers == 1


def test_run_steps_gives_results_in_the_order_of_the_plan(step: Path, tmp_path: Path) -> None:
    plan = bridge.plan(step, None, to="torch-merged", lora_alpha=4.0)
    sink = Kept(plan.specs)
    done = run_steps(plan, plan.output, sink, lambda count: None)
    assert [set(one.read) for one in done] == [set(step.reads) for step in plan.steps]
