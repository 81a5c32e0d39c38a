"""Buckets over HTTP: read and listed like directories, and refused in time, with the cause."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import bridge
from bridge.cli.main import run
from bridge.errors import SourceRefused
from bridge.formats.disk.bucket import ENDPOINTS, give_up_with
from bridge.formats.disk.location import Location
from bridge.formats.orbax.source import open_orbax
from tests.kit import buckets

SAMPLE = next(Path(str(path)) for path in (files("bridge.cli") / "sample").iterdir() if path.is_dir())
RUN = SAMPLE / "checkpoint"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, and none looked for in a machine of a cloud."""
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def emulated() -> Iterator[str]:
    with buckets.emulator("runs") as url:
        buckets.upload(url, "runs", RUN, "mine/pi0")
        yield url


@pytest.fixture(scope="module")
def misbehaving() -> Iterator[tuple[str, list[str]]]:
    with buckets.misbehaving() as server:
        yield server


def test_a_checkpoint_in_a_bucket_is_listed_and_read(emulated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINTS["gs"], emulated)
    location = Location.parse("gs://runs/mine/pi0").waiting(5)
    local = Location.parse(RUN)
    assert location.files() == local.files() and location.names() == local.names()
    there, here = open_orbax(location), open_orbax(local)
    assert there.specs == here.specs
    for name in here.specs:
        assert np.array_equal(there.read(name), here.read(name))
    assert (location / "100/nothing").read_bytes(10) is None and not (location / "100/nothing").exists()


def test_an_item_of_another_name_is_a_finished_step_in_a_bucket_too(
    emulated: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody is told to let a save finish that has: items are seen as they are on a disk."""
    shutil.copytree(RUN / "100" / "params", tmp_path / "run" / "7" / "default")
    (tmp_path / "run" / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "run" / "9").mkdir()
    (tmp_path / "run" / "9" / "_CHECKPOINT_METADATA").write_text("{}")
    buckets.upload(emulated, "runs", tmp_path / "run", "items")
    monkeypatch.setenv(ENDPOINTS["gs"], emulated)
    here = open_orbax(Location.parse(tmp_path / "run"))
    for path, notes in (("items", 2), ("items/7", 1)):
        there = open_orbax(Location.parse(f"gs://runs/{path}").waiting(5))
        assert there.specs == here.specs and str(there.location) == "gs://runs/items/7/default"
        assert len(there.notes) == notes and "using item default" in there.notes[-1]
    with pytest.raises(SourceRefused, match="gs://runs/items/9 is not a checkpoint"):
        open_orbax(Location.parse("gs://runs/items/9").waiting(5))


def test_a_checkpoint_in_a_bucket_is_inspected_and_converted(
    emulated: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ENDPOINTS["gs"], emulated)
    there = bridge.describe("gs://runs/mine/pi0", timeout=5)
    here = bridge.describe(RUN)
    assert (there.state, there.parameters, there.parts) == (here.state, here.parameters, here.parts)
    assert there.assets == here.assets
    for source, name in (("gs://runs/mine/pi0", "there"), (RUN, "here")):
        bridge.convert(source, tmp_path / name, to="torch-base", timeout=5.0)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("there", "here"))
    assert one == other


#: what is asked for -> what is said, and the fix
REFUSED = {
    "gs://runs/elsewhere": ("gs://runs/elsewhere does not exist", "spelling"),
    "gs://nobodys/run": ("gs://nobodys/run does not exist", "spelling"),
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_not_there(url: str, emulated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINTS["gs"], emulated)
    says, fix = REFUSED[url]
    with pytest.raises(SourceRefused) as refused:
        bridge.describe(url, timeout=5)
    assert says in str(refused.value) and fix in str(refused.value)


#: bucket -> what is said of it, and the fix
CAUSES = {
    "bucket-401": (r"reading it is not permitted (HTTP 401)", "account that may read it"),
    "bucket-403": (r"reading it is not permitted (HTTP 403)", "account that may read it"),
    "bucket-503": (r"its server fails (HTTP 503)", "try again later"),
    "silent": (r"no answer within 0.5 s", "--timeout"),
}


@pytest.mark.parametrize("scheme", ENDPOINTS)
@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_told_in_time(
    name: str, scheme: str, misbehaving: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINTS[scheme], misbehaving[0])
    says, fix = CAUSES[name]
    with pytest.raises(SourceRefused) as refused:
        bridge.describe(f"{scheme}://{name}/run", timeout=0.5)
    (problem,) = refused.value.problems
    assert problem.cause == f"{scheme}://{name}/run: {says}" and fix in problem.fix
    assert any(name in request for request in misbehaving[1])


@pytest.mark.parametrize("scheme", ENDPOINTS)
@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:{port}", "its server refuses the connection"),
        ("http://no-such-host.invalid", "the name of its server cannot be resolved"),
    ],
    ids=["closed", "unresolved"],
)
def test_a_server_that_is_not_there(
    address: str, says: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINTS[scheme], address.format(port=buckets.free_port()))
    with pytest.raises(SourceRefused) as refused:
        bridge.describe(f"{scheme}://runs/1", timeout=0.5)
    (problem,) = refused.value.problems
    assert problem.cause.startswith(f"{scheme}://runs/1: {says}") and "network" in problem.fix


def test_a_bucket_that_s3_does_not_have(
    misbehaving: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINTS["s3"], misbehaving[0])
    with pytest.raises(SourceRefused, match="no such bucket or object"):
        bridge.describe("s3://bucket-404/run", timeout=0.5)


def test_the_command_has_the_option(
    misbehaving: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENDPOINTS["gs"], misbehaving[0])
    began = time.monotonic()
    assert run(["inspect", "gs://silent/run", "--timeout", "0.3"]) == 1
    assert time.monotonic() - began < 10  # by default, more than 30 s
    assert "no answer within 0.3 s" in capsys.readouterr().err
    assert run(["inspect", "gs://silent/run", "--timeout", "0"]) == 2
    assert "'--timeout': 0.0 is not a positive number" in capsys.readouterr().err


def test_a_worker_that_is_stopped_waits_no_longer(
    misbehaving: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINTS["gs"], misbehaving[0])
    stop, errors = threading.Event(), list[SourceRefused]()

    def work() -> None:
        give_up_with(stop)
        with pytest.raises(SourceRefused) as refused:
            Location.parse("gs://silent/stopped").files()
        errors.append(refused.value)

    worker = threading.Thread(target=work)
    worker.start()
    while not any("stopped" in request for request in misbehaving[1]):
        time.sleep(0.01)
    began = time.monotonic()
    stop.set()
    worker.join()
    assert time.monotonic() - began < 4 and len(errors) == 1  # of 30 s, and 5 s for the cause


def test_an_interrupt_ends_a_wait_at_once(misbehaving: tuple[str, list[str]]) -> None:
    """On a terminal, which is told that the command waits."""
    terminal, its = pty.openpty()
    environment = {**os.environ, ENDPOINTS["gs"]: misbehaving[0]}
    command = "from bridge.cli.main import main; main()"
    began = time.monotonic()
    waiting = subprocess.Popen(
        [sys.executable, "-c", command, "inspect", "gs://silent/run"], stderr=its, env=environment
    )
    try:
        os.close(its)
        said = b""
        while b"waiting for gs://silent/run: " not in said and time.monotonic() - began < 60:
            said += os.read(terminal, 4096)
        waiting.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert waiting.wait(20) == 130
        assert time.monotonic() - began < 15  # of the 30 s that it would have waited
        assert b"s of 30 s" in said
    finally:
        waiting.kill()
        waiting.wait()
        os.close(terminal)
