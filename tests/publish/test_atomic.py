"""Outputs appear whole or not at all."""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

import bridge
from bridge.errors import OutputRefused
from bridge.publish import lock
from bridge.publish import rename as renaming
from bridge.publish.atomic import _prefix, lock_file, publishing, sweep
from bridge.publish.lock import check_lock, locked
from bridge.publish.record import RECORD, self_checksum
from tests.kit import checkpoints


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


def state(path: Path) -> tuple[int, ...]:
    """Which file it is, unchanged; looking at a link is an access to it."""
    stat = os.lstat(path)
    return stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns


def fill(directory: Path, text: str) -> None:
    """An output: a file that contains ``text``, and the record of it."""
    (directory / "assets").mkdir()
    (directory / "assets" / "stats.json").write_text(text)
    (directory / RECORD).write_text(record(text))


def record(text: str) -> str:
    files = {"assets/stats.json": xxhash.xxh3_128(text.encode()).hexdigest()}
    made = {"files": files, "container": [], "outputs": []}
    return json.dumps({**made, "record": self_checksum(made)})


def content(out: Path) -> str:
    return (out / "assets" / "stats.json").read_text()


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
        f"b/out/{RECORD}": record("new"),
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
        pytest.raises(OutputRefused, match="was created while bridge was running"),
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
        before = listing(out) if out.is_dir() else state(out)
    assert (listing(out) if out.is_dir() else state(out)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_something_else_in_the_place_of_what_should_be_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output(out)
    with pytest.raises(OutputRefused), publishing(out, overwrite=True) as directory:
        fill(directory, "new")
        (out / RECORD).unlink()
    assert listing(out) == {"assets": None, "assets/stats.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["running", "exchanged"])
def test_a_file_that_comes_into_the_old_output_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While the new output is made, and between the last look at the old one and the exchange."""
    out, real = tmp_path / "out", renaming._renameat2
    old = output(out)

    def rename(before: Path, after: Path, flags: int) -> bool:
        if not (out / "notes.md").exists() and moment == "exchanged":
            (out / "notes.md").write_text("mine")
        return real(before, after, flags)

    monkeypatch.setattr(renaming, "_renameat2", rename)
    with (
        pytest.raises(OutputRefused, match=r"out exists and contains 1 file that bridge .*: notes\.md\n"),
        publishing(out, overwrite=True) as directory,
    ):
        fill(directory, "new")
        if moment == "running":
            (out / "notes.md").write_text("mine")
    assert listing(out) == old | {"notes.md": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_comes_while_the_old_output_is_removed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that works in the old directory has it still, under another name."""
    out, notes = tmp_path / "out", []
    output(out)
    real = Path.unlink

    def unlink(self: Path, **options: bool) -> None:
        if self.name == "stats.json":
            self.with_name("eval.csv").write_text("mine")
        real(self, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with publishing(out, overwrite=True, notes=notes) as directory:
        fill(directory, "new")
    monkeypatch.undo()
    assert content(out) == "new"
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert listing(kept) == {"assets": None, "assets/eval.csv": "mine", RECORD: record("old")}
    assert notes == [f"kept {kept}: bridge did not write assets/eval.csv in it"]
    assert sweep(out) == notes and listing(kept)["assets/eval.csv"] == "mine"


def test_an_old_output_that_is_written_to_while_the_new_one_is_made(tmp_path: Path) -> None:
    """As by a training run that saves to the same directory."""
    out = tmp_path / "out"
    output(out)
    with (
        pytest.raises(OutputRefused, match=r"stats\.json changed while .*would have been replaced"),
        publishing(out, overwrite=True) as directory,
    ):
        fill(directory, "new")
        (out / "assets" / "stats.json").write_text("trained")
    assert content(out) == "trained"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("renameat2", [True, False])
def test_overwriting_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renameat2: bool) -> None:
    if not renameat2:  # as on a libc without it, or macOS
        monkeypatch.setattr(renaming.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    out = tmp_path / "out"
    output(out)
    with publishing(out, overwrite=True) as directory:
        fill(directory, "new")
        assert content(out) == "old"
    assert content(out) == "new"
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
    assert content(out) == "new"


def test_a_file_system_without_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and some FUSE mounts say EINVAL to renameat2's flags."""

    def refuse(*args: object) -> int:
        renaming.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(renaming.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace(renameat2=refuse))
    assert output(tmp_path / "out") == {"assets": None, "assets/stats.json": "old", RECORD: record("old")}


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


def test_no_call_writes_more_than_a_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux stops at 2 GiB, and macOS refuses more: a tensor goes out in several calls."""
    from bridge.formats.safetensors import torch

    assert torch.CALL_BYTES < 1 << 31
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    bridge.convert(step, tmp_path / "whole", to="torch-merged")
    monkeypatch.setattr(torch, "CALL_BYTES", 1000)
    real, most = os.pwrite, []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: most.append(len(data)) or real(fd, data, at))
    bridge.convert(step, tmp_path / "parts", to="torch-merged")
    assert max(most) == 1000
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
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


# What is left over.

DEAD = (1 << 22) + 7  # beyond the highest process number that Linux gives


def leftover(out: Path, pid: int, tail: str = "") -> Path:
    path = out.with_name(f"{_prefix(out)}{pid}-0123abcd{tail}")
    path.mkdir()
    fill(path, "half")
    return path


def test_leftovers_of_a_killed_run_are_removed_and_said(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = [leftover(out, DEAD), leftover(out, os.getpid())]
    lock_file(out).write_text(f"{DEAD} elsewhere\n")
    notes: list[str] = []
    with publishing(out, overwrite=False, notes=notes) as directory:
        fill(directory, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(notes) == [
        f"removed {path}, left over from a killed run (pid {pid})"
        for path, pid in sorted(zip(paths, (DEAD, os.getpid()), strict=True))
    ]


def test_leftovers_are_said_by_the_command_and_the_result(tmp_path: Path) -> None:
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    path = leftover(tmp_path / "out", DEAD)
    result = bridge.convert(step, tmp_path / "out", to="torch-merged")
    assert len(result.notes) == 1 and f"removed {path}" in result.notes[0]


@pytest.mark.parametrize(
    "name", ["other", "out2", "lock", "7-0123abc", "x-0123abcd", "7-0123ABCD", "7-0123abcd.d"]
)
def test_what_is_not_its_own_is_not_swept(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    if name in ("other", "out2"):
        paths = [leftover(tmp_path / name, DEAD)]
    elif name == "lock":
        paths = [
            out.with_name(f"{_prefix(out)}{DEAD}-0123abcd"),
            out.with_name(f"{_prefix(out)}{DEAD}-0123abce"),
        ]
        paths[0].write_text("a file")
        paths[1].symlink_to(tmp_path)
    else:
        paths = [out.with_name(_prefix(out) + name)]
        paths[0].mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert sweep(out) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_live_run_is_not_swept(tmp_path: Path) -> None:
    """The lock may be missing where a file system has none; the process number tells."""
    out = tmp_path / "out"
    path = leftover(out, os.getppid())
    notes: list[str] = []
    with publishing(out, overwrite=False, notes=notes) as directory:
        fill(directory, "new")
    assert path.is_dir() and len(notes) == 1 and f"process {os.getppid()} is running here" in notes[0]


def test_an_output_set_aside_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames that stand for an exchange where there is none."""
    out = tmp_path / "out"
    old = leftover(out, DEAD, "-old")
    leftover(out, DEAD)
    with (
        pytest.raises(OutputRefused, match="was created"),
        publishing(out, overwrite=False),
    ):
        pass
    assert content(out) == "half" and not old.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_the_fallback_of_an_exchange_puts_back_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    out = tmp_path / "out"
    old = output(out)
    monkeypatch.setattr(renaming, "_renameat2", lambda *arguments: False)
    real, calls = Path.rename, iter(range(1, 100))

    def rename(self: Path, target: Path) -> Path:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputRefused), publishing(out, overwrite=True) as directory:
        fill(directory, "new")
    monkeypatch.undo()
    if failing < 3:
        assert listing(out) == old
    else:  # the new one is in its place, and whole; the next run sweeps the old one
        assert content(out) == "new"
        assert len(sweep(out)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The lock.


def test_a_lock_that_its_holder_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the holder removed it, locked after: a third would make a new file and lock that."""
    path, real = tmp_path / "lock", lock.fcntl.flock
    calls = iter(range(10))

    def flock(fd: int, operation: int) -> None:
        if next(calls) == 0:
            path.unlink()
        real(fd, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(path, tmp_path / "out") as held:
        assert held and path.is_file()
        with (
            pytest.raises(OutputRefused, match=rf"another bridge process \(pid {os.getpid()}\)"),
            locked(path, tmp_path / "out"),
        ):
            pass
    assert not path.exists()


def test_a_holder_on_another_machine(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", tmp_path / "out"):
        (tmp_path / "lock").write_text("77 faraway\nthe tail of a longer line\n")
        with (
            pytest.raises(OutputRefused, match=r"\(pid 77 on faraway\)"),
            locked(tmp_path / "lock", tmp_path / "out"),
        ):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    path = leftover(tmp_path / "out", DEAD)
    output(tmp_path / "out")
    # without the lock no run can be told from one that was killed
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["out", path.name])


@pytest.mark.parametrize("lies", [False, True], ids=["new", "left over"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR, errno.EBADF])
def test_a_disk_that_fails_at_the_lock_is_no_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lies: bool
) -> None:
    """The error is raised; nobody goes on without a lock, and only a file made for it is removed."""
    path = tmp_path / "lock"
    if lies:
        path.write_text(f"{DEAD} elsewhere\n")
    opened: list[int] = []

    def flock(fd: int, operation: int) -> None:
        opened.append(fd)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))), locked(path, tmp_path / "out"):
        raise AssertionError("entered")
    assert path.exists() == lies
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[-1])  # closed


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_the_block_is_entered_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(tmp_path / "lock", tmp_path / "out") as held:
        assert held is False and (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def test_looking_at_a_lock_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "lock", tmp_path / "out"
    assert check_lock(path, out) == [] and not path.exists()
    path.write_text(f"{DEAD} elsewhere\n")
    assert check_lock(path, out) == []
    with locked(path, out):
        (problem,) = check_lock(path, out)
        assert problem.cause == f"another bridge process (pid {os.getpid()}) is writing {out}"
    # one who takes it in the instant in which another looks
    path.touch()
    looking = os.open(path, os.O_RDONLY)
    lock.fcntl.flock(looking, lock.fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: lock.fcntl.flock(looking, lock.fcntl.LOCK_UN))
    with locked(path, out) as held:
        assert held
    os.close(looking)


def test_a_lock_file_is_not_made_through_a_symlink(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lock_file(out).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputRefused, match="symbolic links"):
        output(out)
    assert not (tmp_path / "elsewhere").exists()


# After the rename.


def test_an_old_output_that_cannot_be_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, notes = tmp_path / "out", []
    output(out)

    real = Path.unlink

    def unlink(self: Path, **options: bool) -> None:
        if self.name == "stats.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(self, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with publishing(out, overwrite=True, notes=notes) as directory:
        fill(directory, "new")
    monkeypatch.undo()
    assert content(out) == "new"
    assert len(notes) == 1 and "could not remove" in notes[0]
    assert len(sweep(out)) == 1 and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_rename_that_does_not_reach_the_disk_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "out"
    old = output(out) if overwrite else None
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), os.stat(tmp_path)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(OutputRefused, match="Input/output error"),
        publishing(out, overwrite=overwrite) as directory,
    ):
        fill(directory, "new")
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert old is None or listing(out) == old


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    output(tmp_path / "out")


def test_an_interrupt_after_the_rename_says_that_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", renaming._renameat2
    output(out)

    def rename(old: Path, new: Path, flags: int) -> bool:
        real(old, new, flags)
        raise KeyboardInterrupt

    monkeypatch.setattr(renaming, "_renameat2", rename)
    with pytest.raises(KeyboardInterrupt) as interrupted, publishing(out, overwrite=True) as directory:
        fill(directory, "new")
    assert interrupted.value.__notes__ == [f"{out} was written completely"]
    assert content(out) == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_read_back_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bridge.conversion import run as runner

    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    plan, real = bridge.plan(step, tmp_path / "out", to="torch-merged"), runner.record_text

    def cut(plan: Any, output: Any, place: Path, *rest: Any) -> str:
        os.truncate(place / "model.safetensors", 5000)
        return real(plan, output, place, *rest)

    monkeypatch.setattr(runner, "record_text", cut)
    with pytest.raises(OutputRefused, match=r"model\.safetensors is not a valid safetensors file"):
        plan.run()
    assert [path.name for path in tmp_path.iterdir()] == ["7"]
