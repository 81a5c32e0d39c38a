"""Steps on executors of others: the same bytes from processes and from dask's workers, or nothing at all.

`bridge.run` knows no pool of its own but threads; whoever has more machines brings the executor.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from bridge.checkpoint.inputs import Inputs
from bridge.conversion.plan import Plan
from bridge.errors import Refusal, SourceRefused, ValueRefused
from bridge.formats.contract import Slab
from tests.kit import checkpoints
from tests.kit.digest import digest

ALPHA = 4.0
VOCAB = 997
"""Rows of the largest leaf, which is begun first."""


class Pickling(Executor):
    """Threads that only get what went through pickle, and whose results go through it as well."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        sent = pickle.dumps((function, args, kwargs))

        def run() -> Any:
            function, args, kwargs = pickle.loads(sent)
            return pickle.loads(pickle.dumps(function(*args, **kwargs)))

        return self._pool.submit(run)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def pickling() -> Iterator[Executor]:
    with Pickling() as executor:
        yield executor


def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        yield executor


def dask() -> Iterator[Executor]:
    from distributed import Client, LocalCluster

    options = {"processes": True, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(n_workers=2, **options) as cluster, Client(cluster) as client:
        yield client.get_executor()


@dataclasses.dataclass(frozen=True)
class Slow:
    """A source that takes its time, and notes what is read of it."""

    source: Any
    notes: Path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        with self._noted(name):
            array: np.ndarray = self.source.read(name, rows)
            return array

    def slabs(self, name: str, *cut: Any) -> Iterator[Slab]:
        with self._noted(name):
            for (first, *rest), values in self.source.slabs(name, *cut):
                for number in range(len(values)):
                    self._note("row", name)
                    yield (first + number, *rest), values[number : number + 1]

    @contextlib.contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        self._note("began", name)
        try:
            yield
        finally:
            self._note("ended", name)

    def _note(self, word: str, name: str) -> None:
        time.sleep(0.05)
        with self.notes.open("a") as file:
            file.write(f"{word} {name}\n")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(make, id=make.__name__, marks=marks)
        for make, marks in ((pickling, ()), (processes, pytest.mark.slow), (dask, pytest.mark.slow))
    ],
)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    yield from request.param()


ROUTES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fold": ("lora", "torch-merged", {"lora_alpha": ALPHA}),
    "export": ("plain", "torch-merged", {}),
    "split": ("lora", "peft-adapter", {"lora_alpha": ALPHA, "with_base": True, "base_name": "mine"}),
    "import": ("export", "orbax", {}),
    "join": ("split", "orbax", {"base": "split/base", "rank": dict(checkpoints.LORA)}),
    "merge": ("split", "torch-merged", {"base": "split/base"}),
}
"""Name -> the source (made by hand, or by the route of that name), the target and options."""


def planned(route: str, home: Path, out: Path) -> Plan:
    source, to, options = ROUTES[route]
    base = {"base": home / options["base"]} if "base" in options else {}
    return bridge.plan(home / source, out, to=to, **options | base)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in every form: two made by hand, and what threads made of them."""
    home = tmp_path_factory.mktemp("executors")
    checkpoints.save(checkpoints.pi0_tree(frozen_dtype="bfloat16", vocab=VOCAB), home / "lora", quick=True)
    checkpoints.save(checkpoints.pi0_tree(lora={}), home / "plain", quick=True)
    for route in ROUTES:
        planned(route, home, home / route).run()
    return home


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_bytes_that_threads_give(
    home: Path, executor: Executor, tmp_path: Path, route: str
) -> None:
    plan = planned(route, home, tmp_path / "out")
    seen: list[tuple[int, int]] = []
    plan.run(lambda *at: seen.append(at), executor)
    assert digest(tmp_path / "out") == digest(home / route)
    counts = [done for done, _ in seen]
    assert counts == sorted(counts) and seen[-1] == (plan.bytes_decoded, plan.bytes_decoded)


# Or nothing at all.


@pytest.mark.parametrize("route", ["fold", "import"])
def test_a_source_that_breaks_is_refused_and_nothing_is_left(
    home: Path, executor: Executor, tmp_path: Path, route: str
) -> None:
    source = ROUTES[route][0]
    shutil.copytree(home / source, tmp_path / source)
    out = tmp_path / "made" / "out"
    plan = planned(route, tmp_path, out)
    for path in (tmp_path / source).rglob("*"):
        if path.is_file() and path.stat().st_size > 4096 and path.suffix != ".json":
            os.truncate(path, path.stat().st_size // 3)
    before = digest(tmp_path)
    with pytest.raises(SourceRefused) as refused:
        plan.run(executor=executor)
    with pytest.raises(SourceRefused) as by_threads:
        plan.run()
    # which of the steps at work fails first is a matter of chance; that the files changed is the cause
    assert refused.value.problems == by_threads.value.problems
    assert all(
        str(tmp_path / source) in problem.cause and "changed while it was read" in problem.cause
        for problem in refused.value.problems
    )
    assert digest(tmp_path) == before and not out.parent.exists()


def test_values_that_cannot_be_converted_are_refused_as_threads_refuse_them(
    executor: Executor, tmp_path: Path
) -> None:
    tree = checkpoints.pi0_tree(lora={})
    for name in ("state_proj/kernel", "PaliGemma/llm/layers/attn/kv_einsum/w"):
        tree[name].flat[3] = np.nan
    step = checkpoints.save(tree, tmp_path / "7", quick=True)
    before = digest(tmp_path)

    def refused(**how: Any) -> Refusal:
        with pytest.raises(ValueRefused) as caught:
            bridge.plan(step, tmp_path / "made" / "out", to="torch-merged").run(**how)
        return caught.value

    found = refused(executor=executor).problems
    assert found == refused().problems and len(found) == 2
    assert digest(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["7"]


@pytest.mark.parametrize("route", ["fold", "import"])
def test_interrupted_it_leaves_no_step_at_work_and_nothing_behind(
    home: Path, executor: Executor, tmp_path: Path, route: str
) -> None:
    plan = planned(route, home, tmp_path / "made" / "out")
    notes = tmp_path / "notes"
    slow = Slow(plan.checkpoint.source, notes)
    slowed = dataclasses.replace(plan, inputs=Inputs(dataclasses.replace(plan.checkpoint, source=slow)))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slowed.run(interrupt, executor)
    seen = Counter(line.split()[0] for line in notes.read_text().splitlines())
    assert seen["began"] == seen["ended"] > 0, "a step is still at work"
    assert seen["row"] < VOCAB, "the step under way was not stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    # the executor is as good as before
    plan.run(executor=executor)
    assert digest(tmp_path / "made" / "out") == digest(home / route)
