"""What is said while a conversion runs and when it ends: bytes, rate and time left that are true."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bridge
from bridge.cli.convert import convert
from bridge.cli.show import progress
from bridge.conversion.plan import Plan
from bridge.conversion.run import Result
from bridge.formats.contract import Timings
from tests.kit import checkpoints

ALPHA = 4.0
ROUTES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fold": ("lora", "torch-merged", {"lora_alpha": ALPHA}),
    "lerobot": ("lora", "torch-merged", {"lora_alpha": ALPHA, "layout": "lerobot"}),
    "strip": ("lora", "torch-base", {}),
    "split": ("lora", "peft-adapter", {"lora_alpha": ALPHA, "with_base": True}),
    "compress": ("lora", "peft-adapter", {"lora_alpha": ALPHA, "rank": 2}),
    "carry": ("lora", "peft-adapter", {"lora_alpha": ALPHA, "base": "other", "modules_to_save": True}),
    "import": ("fold", "orbax", {}),
    "import-untied": ("lerobot", "orbax", {}),
    "join": ("split", "orbax", {"base": "split/base", "rank": dict(checkpoints.LORA)}),
    "merge": ("split", "torch-merged", {"base": "split/base"}),
    "merge-carried": ("carry", "torch-merged", {"base": "other"}),
    "merge-to-orbax": ("split", "orbax", {"base": "split/base", "fold": True}),
}
"""Name -> the source (made by hand, or by the route of that name), the target and options."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("progress")
    tree = checkpoints.pi0_tree(frozen_dtype="bfloat16")
    checkpoints.save(tree, home / "lora", quick=True)
    other = {name: array for name, array in tree.items() if "lora" not in name}
    checkpoints.save(other | {"state_proj/bias": other["state_proj/bias"] + 1}, home / "other", quick=True)
    return home


def test_the_count_of_every_route_ends_at_its_total(home: Path) -> None:
    for name, (source, to, options) in ROUTES.items():
        base = {"base": home / options["base"]} if "base" in options else {}
        plan = bridge.plan(home / source, home / name, to=to, **options | base)
        seen: list[tuple[int, int]] = []
        plan.run(lambda *at, seen=seen: seen.append(at))  # type: ignore[misc]
        counts = [done for done, _ in seen]
        assert counts == sorted(counts), name
        assert {total for _, total in seen} == {plan.bytes_decoded}, name
        assert counts[-1] == plan.bytes_decoded > 0, name


def test_comparing_counts_to_its_total(home: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = {"base": home / "other", "modules_to_save": True, "lora_alpha": ALPHA}
    bridge.plan(home / "lora", None, to="peft-adapter", progress=lambda *at: seen.append(at), **options)
    assert seen[-1][0] == seen[-1][1] > 0


# Lines, where there is no terminal.


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def test_lines_tell_bytes_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("converting", quiet=False) as show:
        assert show is not None
        for seconds, done in ((2, 500_000_000), (2, 520_000_000), (4, 1_000_000_000), (5, 2_000_000_000)):
            clock.now = 100.0 + seconds
            show(done, 2_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "converting: 20 %, 500 MB of 2 GB, 250 MB/s, 6 s left",
        "converting: 50 %, 1 GB of 2 GB, 250 MB/s, 4 s left",
        "converting: 100 %, 2 GB of 2 GB, 400 MB/s, finishing",
    ]


def test_a_short_run_and_a_quiet_one_say_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("converting", quiet=False) as show:
        assert show is not None
        clock.now += 0.9
        show(7, 7)
        show(0, 0)
    with progress("converting", quiet=True) as show:
        assert show is None
    assert capsys.readouterr() == ("", "")


# The end: how the run compares with what it read, wrote and decoded.


class Timed(Executor):
    """Runs steps at once, and says of each that it took so long."""

    def __init__(self, spent: Timings) -> None:
        self.spent, self.steps = spent, 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        done = function(*args, **kwargs)
        done.spent = self.spent
        future.set_result(done)
        self.steps += 1
        return future


def test_what_steps_spent_is_summed_over_all_outputs(home: Path, tmp_path: Path) -> None:
    executor = Timed(Timings(read=0.5, decode=16.0, write=2.0))
    options = {"with_base": True, "lora_alpha": ALPHA, "workers": 4}
    plan = bridge.plan(home / "lora", tmp_path / "out", to="peft-adapter", **options)
    result = plan.run(executor=executor)
    assert executor.steps == len(plan.steps) > len(plan.output.steps)
    assert (result.spent.read, result.spent.decode) == (0.5 * executor.steps, 16.0 * executor.steps)
    # making it durable at the end is writing as well
    assert 2.0 * executor.steps < result.spent.write < 2.0 * executor.steps + result.seconds
    expected = (result.spent.read + result.spent.decode + result.spent.write) / 4
    assert result.floor == expected, "shared by four workers"


def test_factors_take_time_to_read_and_decode_as_weights_do(home: Path, tmp_path: Path) -> None:
    result = bridge.plan(home / "lora", tmp_path / "out", to="peft-adapter", lora_alpha=ALPHA).run()
    assert min(result.spent.read, result.spent.decode, result.spent.write) > 0


@pytest.fixture
def ended(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Timings], str]]:
    """What the command prints about a run of seven seconds on two workers that spent so much."""

    def end(spent: Timings) -> str:
        result = Result(
            destination=tmp_path / "out",
            bytes_read=10,
            bytes_written=20,
            tensors=3,
            seconds=7.0,
            peak_memory=40,
            checksum="sum",
            spent=spent,
            workers=2,
        )
        monkeypatch.setattr(Plan, "run", lambda plan, progress=None, executor=None: result)
        arguments = [str(home / "lora"), str(tmp_path / "out"), "--to", "torch-base"]
        ran = CliRunner().invoke(convert, arguments)
        assert ran.exit_code == 0
        return ran.output

    yield end


@pytest.mark.parametrize(
    ("spent", "line"),
    [
        (
            Timings(3.1, 5.2, 1.9),
            "1.4 x its floor: 2 workers waited 3.1 s for reads, decoded 5.2 s, wrote 1.9 s",
        ),
        (
            Timings(0.5, 10.0, 0.5),
            "1.3 x its floor: 2 workers waited 0.5 s for reads, decoded 10.0 s, wrote 0.5 s",
        ),
    ],
)
def test_the_end_tells_the_ratio_to_the_floor(
    ended: Callable[[Timings], str], spent: Timings, line: str
) -> None:
    assert line in ended(spent)


def test_where_nothing_was_measured_nothing_is_said(ended: Callable[[Timings], str]) -> None:
    output = ended(Timings())
    assert "wrote" in output and "floor" not in output
