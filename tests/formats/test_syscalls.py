"""Write-behind: bounded in bytes and descriptors, and an error of the disk is raised."""

import ctypes
import errno
import os
import pickle
from pathlib import Path

import pytest

from bridge.formats.disk import syscalls


def test_what_is_written_behind_is_bounded_and_a_fault_of_the_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "MIN_RANGE_BYTES", 50)
    behind = syscalls.WriteBehind(limit=100)
    waited: list[int] = []

    def sync_file_range(fd: int, offset: int, length: int, flags: int) -> int:
        if flags & 1:
            waited.append(offset)
        if offset == 150 and flags & 1:
            ctypes.set_errno(errno.EIO)
            return -1
        return 0

    monkeypatch.setattr(syscalls, "_libc", lambda *_: sync_file_range)
    before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "file").open("wb") as file:
        for offset in (0, 50, 100, 150):
            behind.wrote(file.fileno(), offset, 50)
        assert waited == [0, 50]  # all but a hundred bytes
        copy = pickle.loads(pickle.dumps(behind))
        copy.finish()
        assert waited == [0, 50]
        with pytest.raises(OSError, match="Input/output error"):
            behind.finish()
        assert waited == [0, 50, 100, 150]
    del behind, copy
    assert len(os.listdir("/proc/self/fd")) == before


def test_write_behind_holds_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of many small tensors must not take one for each."""
    behind = syscalls.WriteBehind()
    with (tmp_path / "file").open("wb") as file:
        before = len(os.listdir("/proc/self/fd"))
        for start in range(0, 100_000, 100):
            behind.wrote(file.fileno(), start, 100)
        assert len(os.listdir("/proc/self/fd")) == before
        monkeypatch.setattr(syscalls, "MIN_RANGE_BYTES", 100)
        for start in range(0, 100_000, 100):
            behind.wrote(file.fileno(), start, 100)
        assert len(os.listdir("/proc/self/fd")) <= before + syscalls.MAX_RANGES
        behind.finish()
        assert len(os.listdir("/proc/self/fd")) == before
