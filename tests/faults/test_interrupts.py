"""The first signal cleans up, the second leaves at once; nothing keeps a failed process alive."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge
from tests.kit import checkpoints
from tests.kit.digest import digest

#: seconds after which a process does not end by itself, however busy the machine: what it waits for takes an hour
PATIENCE = 250

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

RUN = """
import sys, threading, time, os, signal
from bridge.conversion import run as runner
from bridge.publish import atomic as publish
from bridge.cli.main import main
{patch}
sys.argv = ["bridge", "convert", "--to", "torch-merged", *sys.argv[1:]]
main()
"""
#: a step that waits, as for a disk that does not answer
WAITS = """
inner = runner.run_steps
def run_steps(*arguments, **keywords):
    print("running", flush=True)
    time.sleep(3600)
runner.run_steps = run_steps
"""
#: so does the removal of what was begun
STUCK = (
    WAITS
    + """
def remove(path):
    print("removing", flush=True)
    time.sleep(3600)
publish._remove = remove
"""
)
#: a signal when all is done, and not yet said
AFTER = """
def peak_memory():
    os.kill(os.getpid(), signal.SIGTERM)
runner.peak_memory = peak_memory
"""
#: a thread of a library that nothing can stop
THREAD = """
def run_steps(*arguments, **keywords):
    threading.Thread(target=time.sleep, args=(3600,)).start()
    raise OSError(5, "Input/output error")
runner.run_steps = run_steps
"""


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path_factory.mktemp("run") / "7", quick=True)


Started = subprocess.Popen[str]


@pytest.fixture
def started(step: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Started]:
    code = RUN.format(patch=request.param)
    process = subprocess.Popen(
        [sys.executable, "-c", code, step, tmp_path / "made" / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def wait_for(process: Started, word: str) -> None:
    assert process.stdout is not None
    assert any(line.strip() == word for line in process.stdout), process.stderr


def end(process: Started) -> str:
    """What it says last. What keeps it alive would do so until it is killed, and this test with it."""
    return process.communicate(timeout=PATIENCE)[1]


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("started", [WAITS], indirect=True, ids=["waits"])
def test_the_first_cleans_up(started: Started, tmp_path: Path, number: signal.Signals) -> None:
    wait_for(started, "running")
    started.send_signal(number)
    said = end(started)
    assert started.returncode == STATUS[number] and "nothing was written" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("started", [STUCK], indirect=True, ids=["stuck"])
def test_the_second_leaves_at_once(
    started: Started, step: Path, tmp_path: Path, second: signal.Signals
) -> None:
    wait_for(started, "running")
    started.send_signal(signal.SIGTERM)
    wait_for(started, "removing")
    started.send_signal(second)
    end(started)
    assert started.returncode == STATUS[second]
    out = tmp_path / "made" / "out"
    assert not out.exists() and len(list(out.parent.iterdir())) == 2  # the lock's file and the begun output
    result = bridge.convert(step, out, to="torch-merged")
    assert f"left over from a killed run (pid {started.pid})" in result.notes[0]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("started", [AFTER], indirect=True, ids=["after"])
def test_what_is_written_is_not_denied(started: Started, tmp_path: Path) -> None:
    said = end(started)
    assert started.returncode == STATUS[signal.SIGTERM] and said == "terminated\n"
    assert (tmp_path / "made" / "out" / "bridge.json").is_file()


@pytest.mark.parametrize("started", [THREAD], indirect=True, ids=["thread"])
def test_a_thread_does_not_keep_a_failed_process_alive(started: Started, tmp_path: Path) -> None:
    said = end(started)
    assert started.returncode == 1 and "Input/output error" in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_ignored_stays_ignored(step: Path, tmp_path: Path) -> None:
    """As `nohup` asks for hangups, and a shell for interrupts of a job in the background."""
    code = RUN.format(
        patch="inner = runner.run_steps\n"
        "def run_steps(*arguments, **keywords):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return inner(*arguments, **keywords)\n"
        "runner.run_steps = run_steps\n"
    )
    run = subprocess.run(
        ["sh", "-c", """trap '' HUP; exec "$@\"""", "sh", sys.executable, "-c", code, step, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "bridge.json").is_file()


def test_two_runs_at_once_one_wins_whole(step: Path, tmp_path: Path) -> None:
    """Two commands, started together: neither knows of the other."""
    out = tmp_path / "made" / "out"
    command = [Path(sys.executable).with_name("bridge"), "convert", "--to", "torch-merged", step, out]
    runs = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) for _ in "ab"
    ]
    said = [run.communicate(timeout=PATIENCE)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 1], said
    loser = said[codes.index(1)]
    pid = runs[codes.index(0)].pid
    assert f"another bridge process (pid {pid}) is writing {out}" in loser or f"{out} was created" in loser or (
        f"{out} exists" in loser
    )  # fmt: skip
    bridge.convert(step, tmp_path / "alone", to="torch-merged")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert digest(out) == digest(tmp_path / "alone")
