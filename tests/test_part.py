"""Parts of files, read through the page cache and around it: the same bytes."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bridge
from bridge.formats import part
from bridge.formats.part import ALIGN, open_part
from bridge.formats.syscalls import go_direct, is_cached
from bridge.verify import verify
from tests.golden import Golden
from tests.test_runner import digest

BLOCK = 3 * ALIGN
SIZE = 5 * BLOCK + 2_347


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("part") / "file"
    data = np.random.default_rng(7).bytes(SIZE)
    path.write_bytes(data)
    return path, data


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch, big: tuple[Path, bytes]) -> None:
    """Everything that is read is read around the cache."""
    with big[0].open("rb") as file:
        if not go_direct(file.fileno(), True):
            pytest.skip("this file system reads through the page cache only")
    monkeypatch.setattr(part, "is_cached", lambda *_: False)
    monkeypatch.setattr(part, "LEAST_BYTES", 1)
    monkeypatch.setattr(part, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(part, "_spare", [])


def _read(path: Path, offset: int, length: int, step: int) -> bytes:
    found = bytearray()
    into = memoryview(bytearray(step))
    with closing(open_part(path, offset, length)) as opened:
        while got := opened.readinto(into):
            found += into[:got]
    return bytes(found)


edges = st.sampled_from([0, 1, ALIGN - 1, ALIGN, BLOCK - 1, BLOCK, BLOCK + 1, SIZE - 1, SIZE])
offsets = st.one_of(edges, st.integers(0, SIZE))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=offsets, stop=offsets, step=st.sampled_from([97, 4099, BLOCK, SIZE]))
def test_any_part_around_the_cache_is_the_files_bytes(
    big: tuple[Path, bytes], direct: None, offset: int, stop: int, step: int
) -> None:
    path, data = big
    length = max(stop - offset, 0)
    assert _read(path, offset, length, step) == data[offset : offset + length]


@pytest.mark.parametrize("offset", [0, 12_345])
def test_the_disk_takes_every_read(big: tuple[Path, bytes], direct: None, offset: int) -> None:
    """None is refused and done over through the cache: not where the part begins, nor where the file ends."""
    with closing(open_part(big[0], offset, SIZE - offset)) as opened:
        assert isinstance(opened, part._Direct)
        into = memoryview(bytearray(SIZE))
        while opened.readinto(into):
            pass
        assert not go_direct(opened._file.fileno(), True), "the flag was taken off"


@pytest.mark.parametrize("offset", [0, 12_345])
def test_through_the_cache_too(big: tuple[Path, bytes], offset: int) -> None:
    path, data = big
    path.read_bytes()
    assert _read(path, offset, SIZE - offset, SIZE) == data[offset:]


def test_a_file_that_ends_too_soon_gives_what_it_has(big: tuple[Path, bytes], direct: None) -> None:
    path, data = big
    assert _read(path, 5, SIZE + BLOCK, SIZE) == data[5:]


def test_what_lies_in_the_cache_is_read_from_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    length = part.LEAST_BYTES
    path.write_bytes(bytes(length))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        file.read()
        assert is_cached(file.fileno(), 0, length)
        with closing(open_part(path, 0, length)) as opened:
            assert not isinstance(opened, part._Direct)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(file.fileno(), 0, length):
            pytest.skip("this file system keeps everything in memory")
        with closing(open_part(path, 0, length)) as opened:
            assert isinstance(opened, part._Direct)


def _refusing(error: int, times: int) -> Callable[..., int]:
    """``os.preadv`` that fails a few times where it would go around the cache."""
    real, left = os.preadv, [times]

    def preadv(fd: int, buffers: list[Any], offset: int, *flags: int) -> int:
        if left[0] and go_direct(fd, True) is False:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return real(fd, buffers, offset, *flags)

    return preadv


def test_a_file_system_that_takes_the_flag_and_refuses_the_read(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = big
    monkeypatch.setattr(os, "preadv", _refusing(errno.EINVAL, 1))
    assert _read(path, 3, SIZE - 3, SIZE) == data[3:]


def test_a_fault_of_the_disk_is_raised_to_who_reads(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", _refusing(errno.EIO, 99))
    with pytest.raises(OSError, match="Input/output"):
        _read(big[0], 0, SIZE, SIZE)


def test_where_no_thread_can_be_had_reads_are_plain(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with closing(open_part(big[0], 0, SIZE)) as opened:
        assert not isinstance(opened, part._Direct)
    assert _read(big[0], 1, SIZE - 1, SIZE) == big[1][1:]


def test_a_part_that_is_not_read_to_its_end_leaves_its_buffers(big: tuple[Path, bytes], direct: None) -> None:
    for _ in range(5):
        with closing(open_part(big[0], 0, SIZE)) as opened:
            assert opened.readinto(memoryview(bytearray(10))) == 10
    before = len(part._spare)
    assert len({id(buffer) for buffer in part._spare}) == before
    assert _read(big[0], 0, SIZE, SIZE) == big[1]
    assert len(part._spare) == before


def test_nothing_is_read_into_a_buffer_that_was_given_back(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, under_way = os.preadv, threading.Semaphore(0)
    ended: list[int] = []

    def slow(fd: int, buffers: list[Any], offset: int, *flags: int) -> int:
        under_way.release()
        time.sleep(0.2)
        got = real(fd, buffers, offset, *flags)
        ended.append(offset)
        return got

    monkeypatch.setattr(os, "preadv", slow)
    with closing(open_part(big[0], 0, SIZE)):
        under_way.acquire()
    assert ended == [0]
    assert len(part._spare) == 2


def test_conversion_and_proof_read_the_same_around_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    golden = Golden("pi0_lora")
    for to in ("torch-merged", "peft-adapter"):
        bridge.convert(golden.checkpoint, tmp_path / "through" / to, to=to, **golden.options)
    bridge.convert(tmp_path / "through" / "torch-merged", tmp_path / "through" / "orbax", to="orbax")
    request.getfixturevalue("direct")
    opened: list[part.Part] = []

    def noted(*arguments: Any) -> part.Part:
        opened.append(open_part(*arguments))
        return opened[-1]

    monkeypatch.setattr("bridge.formats.torch.open_part", noted)
    monkeypatch.setattr("bridge.formats.stream.open_part", noted)
    for to in ("torch-merged", "peft-adapter"):
        bridge.convert(golden.checkpoint, tmp_path / "around" / to, to=to, **golden.options)
    bridge.convert(tmp_path / "around" / "torch-merged", tmp_path / "around" / "orbax", to="orbax")
    assert opened
    assert all(isinstance(one, part._Direct) for one in opened)
    for form in ("torch-merged", "peft-adapter", "orbax"):
        assert digest(tmp_path / "around" / form) == digest(tmp_path / "through" / form)
    assert verify(golden.checkpoint, tmp_path / "around" / "torch-merged").holds
