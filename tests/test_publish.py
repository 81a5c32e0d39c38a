"""Outputs appear whole or not at all."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bridge
from bridge import renaming
from bridge.destination import check_destination, check_space
from bridge.errors import OutputRefused
from bridge.publish import RECORD, publishing
from tests import checkpoints


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def listing(directory: Path) -> dict[str, str | None]:
    return {
        str(path.relative_to(directory)): path.read_text() if path.is_file() else None
        for path in directory.rglob("*")
    }


def fill(directory: Path, text: str) -> None:
    (directory / "assets").mkdir()
    (directory / "assets" / "stats.json").write_text(text)
    (directory / RECORD).write_text(text)


def output(path: Path, text: str = "old") -> dict[str, str | None]:
    with publishing(path, overwrite=False) as directory:
        fill(directory, text)
    return listing(path)


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with publishing(out, overwrite=False) as directory:
        assert directory.parent == out.parent  # the same file system, or the rename would copy
        assert not out.exists()
        fill(directory, "new")
        assert not out.exists()
    assert listing(tmp_path / "a") == {
        "b": None,
        "b/out": None,
        "b/out/assets": None,
        "b/out/assets/stats.json": "new",
        f"b/out/{RECORD}": "new",
    }


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publishing(tmp_path / "a" / "b" / "out", overwrite=False) as directory:
        fill(directory, "new")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError), publishing(tmp_path / "a" / "b" / "c" / "out", overwrite=False):
        (tmp_path / "a" / "b" / "mine").write_text("x")
        raise ValueError
    assert listing(tmp_path) == {"a": None, "a/b": None, "a/b/mine": "x"}


def test_parents_are_removed_when_not_all_can_be_made(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputRefused, match="too long"),
        publishing(tmp_path / "a" / ("b" * 300) / "out", overwrite=False),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["empty", "full", "file", "symlink"])
def test_what_came_to_exist_meanwhile_stands(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputRefused, match="came to exist while bridge was running"),
        publishing(out, overwrite=False) as directory,
    ):
        fill(directory, "new")
        if kind in ("empty", "full"):
            out.mkdir()
        if kind == "full":
            (out / "mine").write_text("x")
        if kind == "file":
            out.write_text("x")
        if kind == "symlink":
            out.symlink_to("nowhere")
        before = listing(out) if out.is_dir() else os.lstat(out)
    assert (listing(out) if out.is_dir() else os.lstat(out)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_something_else_in_the_place_of_what_should_be_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output(out)
    with pytest.raises(OutputRefused), publishing(out, overwrite=True) as directory:
        fill(directory, "new")
        (out / RECORD).unlink()
    assert listing(out) == {"assets": None, "assets/stats.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("renameat2", [True, False])
def test_overwriting_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renameat2: bool) -> None:
    if not renameat2:  # as on a libc without it, or macOS
        monkeypatch.setattr(renaming.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    out = tmp_path / "out"
    output(out)
    with publishing(out, overwrite=True) as directory:
        fill(directory, "new")
        assert (out / RECORD).read_text() == "old"
    assert (out / RECORD).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_removed_meanwhile_is_made_all_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output(out)
    with publishing(out, overwrite=True) as directory:
        fill(directory, "new")
        (out / "assets" / "stats.json").unlink()
        (out / "assets").rmdir()
        (out / RECORD).unlink()
        out.rmdir()
    assert (out / RECORD).read_text() == "new"


def test_a_file_system_without_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and some FUSE mounts say EINVAL to renameat2's flags."""

    def refuse(*args: object) -> int:
        renaming.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(renaming.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace(renameat2=refuse))
    assert output(tmp_path / "out") == {"assets": None, "assets/stats.json": "old", RECORD: "old"}


def test_a_rename_that_fails_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    old = output(out)

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(renaming, "_renameat2", fail)
    with (
        pytest.raises(OutputRefused, match="Input/output error"),
        publishing(out, overwrite=True) as directory,
    ):
        fill(directory, "new")
    assert listing(out) == old and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", ["fsync", "pwrite", "ftruncate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, code: int
) -> None:
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    plan = bridge.plan(step, tmp_path / "made" / "out", to="torch-merged")
    real = getattr(os, failing)
    calls = iter(range(1000))

    def fail(*args: Any) -> Any:
        if next(calls) == (3 if failing == "pwrite" else 0):
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises((OSError, bridge.Refusal)):
        plan.run()
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    expected = bridge.convert(step, tmp_path / "whole", to="torch-merged")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: len(data) // 2 + 1], offset))
    assert bridge.convert(step, tmp_path / "short", to="torch-merged").checksum == expected.checksum
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "short")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, renaming._renameat2

    def record_sync(fd: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def record_rename(old: Path, new: Path, flags: int) -> bool:
        events.append("rename")
        return rename(old, new, flags)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(renaming, "_renameat2", record_rename)
    out = tmp_path / "out"
    with publishing(out, overwrite=False) as directory:
        fill(directory, "new")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    inside = {directory, directory / "assets", directory / "assets" / "stats.json", directory / RECORD}
    assert set(before) == {str(path) for path in inside}
    assert after == [str(tmp_path)]


@pytest.mark.parametrize(("mask", "file", "directory"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, file: int, directory: int) -> None:
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    with umask(mask):
        bridge.convert(step, tmp_path / "made" / "out", to="torch-merged", layout="transformers")
    made = [tmp_path / "made", *(tmp_path / "made").rglob("*")]
    assert {path.name for path in made} >= {"model.safetensors", RECORD, "norm_stats.json", "config.json"}
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (directory if path.is_dir() else file), path


@pytest.mark.parametrize("shape", ["relative", "slash", "dots", "symlinked parent"])
def test_ways_to_name_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path)
    name, made = {
        "relative": ("there/out", "there/out"),
        "slash": (f"{tmp_path}/there/out/", "there/out"),
        "dots": (f"{tmp_path}/7/../there/./out", "there/out"),
        "symlinked parent": ("link/out", "there/out"),
    }[shape]
    result = bridge.convert(step, name, to="torch-merged")
    assert (tmp_path / made / RECORD).is_file() and result.destination.is_absolute()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "link", "there"]


def test_check_destination_counts_every_fault(tmp_path: Path) -> None:
    source = tmp_path / "run" / "7"
    source.mkdir(parents=True)
    assert check_destination(tmp_path / "out", source, overwrite=False) == []
    assert check_destination(tmp_path / "run" / "8", source, overwrite=False) == []
    assert check_destination(tmp_path / "run" / "7_torch", source, overwrite=False) == []
    assert check_destination(tmp_path / "out", None, overwrite=False) == []
    assert len(check_destination(source, source, overwrite=False)) == 2


def test_check_space(tmp_path: Path) -> None:
    assert check_space(tmp_path / "not" / "yet" / "out", 1) == []
    (problem,) = check_space(tmp_path / "not" / "yet" / "out", 1 << 60)
    assert "needs 1152921504.61 GB" in problem.cause and problem.fix
