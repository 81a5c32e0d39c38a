"""Parts of files, read through the page cache and around it: the same bytes."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bridge
from bridge.formats.disk import readahead
from bridge.formats.disk.readahead import ALIGN, open_range
from bridge.formats.disk.syscalls import is_cached, set_direct
from bridge.proof.verify import verify
from tests.kit.digest import digest
from tests.kit.golden import Golden

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
        if not set_direct(file.fileno(), True):
            pytest.skip("this file system reads through the page cache only")
    monkeypatch.setattr(readahead, "is_cached", lambda *_: False)
    monkeypatch.setattr(readahead, "MIN_BYTES", 0)
    monkeypatch.setattr(readahead, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(readahead, "_spare", [])


def _read(path: Path, offset: int, length: int, step: int) -> bytes:
    found = bytearray()
    into = memoryview(bytearray(step))
    with closing(open_range(path, offset, length)) as opened:
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
    with closing(open_range(big[0], offset, SIZE - offset)) as opened:
        assert isinstance(opened, readahead._DirectReader)
        into = memoryview(bytearray(SIZE))
        while opened.readinto(into):
            pass
        assert not set_direct(opened._file.fileno(), True), "the flag was taken off"


@pytest.mark.parametrize("offset", [0, 12_345])
def test_through_the_cache_too(big: tuple[Path, bytes], offset: int) -> None:
    path, data = big
    path.read_bytes()
    assert _read(path, offset, SIZE - offset, SIZE) == data[offset:]


def test_a_file_that_ends_too_soon_gives_what_it_has(big: tuple[Path, bytes], direct: None) -> None:
    path, data = big
    assert _read(path, 5, SIZE + BLOCK, SIZE) == data[5:]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, int]:
    """A file of four blocks on a disk, of which pages can be dropped from the cache."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * readahead.BLOCK_BYTES))
    _drop(path)
    with path.open("rb") as file:
        if is_cached(file.fileno(), 0, 4 * readahead.BLOCK_BYTES) or not set_direct(file.fileno(), True):
            pytest.skip("this file system keeps everything in memory, or does not say")
    return path, 4 * readahead.BLOCK_BYTES


def _drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _is_direct(path: Path, length: int) -> bool:
    with closing(open_range(path, 0, length)) as opened:
        into = memoryview(bytearray(length))
        while opened.readinto(into):
            pass
        return isinstance(opened, readahead._DirectReader)


def test_what_lies_in_the_cache_is_read_from_there(stored: tuple[Path, int]) -> None:
    path, length = stored
    assert _is_direct(path, length)
    path.read_bytes()
    assert not _is_direct(path, length)
    _drop(path)
    assert _is_direct(path, length)


def test_looking_does_not_fill_the_cache(stored: tuple[Path, int]) -> None:
    path, length = stored
    assert all(_is_direct(path, length) for _ in range(20))


def test_what_fits_in_a_block_is_read_plainly(stored: tuple[Path, int]) -> None:
    assert not _is_direct(stored[0], readahead.MIN_BYTES)
    assert readahead.buffered_bytes(readahead.MIN_BYTES) == 0


def test_a_file_system_that_does_not_say_is_read_plainly(
    stored: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with stored[0].open("rb") as file:
        monkeypatch.setattr(os, "preadv", preadv)
        assert is_cached(file.fileno(), 0, stored[1])


def _refusing(error: int, times: int) -> Callable[..., int]:
    """``os.preadv`` that fails a few times where it would go around the cache."""
    real, left = os.preadv, [times]

    def preadv(fd: int, buffers: list[Any], offset: int, *flags: int) -> int:
        if left[0] and set_direct(fd, True) is False:
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


@pytest.mark.parametrize("short", [1, ALIGN, ALIGN + 100])
def test_a_file_system_that_gives_less_than_it_could(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[Any], offset: int, *flags: int) -> int:
        return real(fd, [buffers[0][: max(len(buffers[0]) - short, 1)]], offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    assert _read(big[0], 77, SIZE - 77, SIZE) == big[1][77:]


def test_a_file_that_shrinks_ends_there(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing that lies elsewhere is taken for what is missing."""
    path = tmp_path / "file"
    path.write_bytes(big[1])
    real, cut = os.preadv, BLOCK + 100

    def preadv(fd: int, buffers: list[Any], offset: int, *flags: int) -> int:
        os.truncate(path, cut)
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    assert _read(path, 50, SIZE - 50, SIZE) == big[1][50:cut]


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
    with closing(open_range(big[0], 0, SIZE)) as opened:
        assert not isinstance(opened, readahead._DirectReader)
    assert _read(big[0], 1, SIZE - 1, SIZE) == big[1][1:]


def test_a_part_that_is_not_read_to_its_end_leaves_its_buffers(big: tuple[Path, bytes], direct: None) -> None:
    for _ in range(5):
        with closing(open_range(big[0], 0, SIZE)) as opened:
            assert opened.readinto(memoryview(bytearray(10))) == 10
    before = len(readahead._spare)
    assert len({id(buffer) for buffer in readahead._spare}) == before
    assert _read(big[0], 0, SIZE, SIZE) == big[1]
    assert len(readahead._spare) == before


def test_nothing_is_read_into_a_buffer_that_was_given_back(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stopping = os.preadv, threading.Event()
    shutdown = ThreadPoolExecutor.shutdown
    spare_at_the_end: list[int] = []

    def slow(fd: int, buffers: list[Any], offset: int, *flags: int) -> int:
        assert stopping.wait(60)
        time.sleep(0.05)  # for who does not wait
        got = real(fd, buffers, offset, *flags)
        spare_at_the_end.append(len(readahead._spare))
        return got

    def stop(pool: ThreadPoolExecutor, *arguments: Any, **keywords: Any) -> None:
        stopping.set()
        shutdown(pool, *arguments, **keywords)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", stop)
    with closing(open_range(big[0], 0, SIZE)):
        pass
    assert spare_at_the_end == [0]
    assert len(readahead._spare) == 2


def test_where_no_memory_can_be_had_reads_are_plain(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(readahead, "_buffer", refuse)
    assert _read(big[0], 1, SIZE - 1, SIZE) == big[1][1:]


@pytest.mark.parametrize("offset", [0, 1, ALIGN, 12_345])
@pytest.mark.parametrize("length", [1, ALIGN, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_no_byte_is_read_twice_and_none_beyond_the_part(
    big: tuple[Path, bytes], direct: None, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    """By count: whole aligned blocks from the part's first byte to its last, each once."""
    asked: list[tuple[int, int]] = []
    real = os.preadv

    def counted(fd: int, buffers: list[Any], at: int, *flags: int) -> int:
        asked.append((at, sum(map(len, buffers))))
        return real(fd, buffers, at, *flags)

    monkeypatch.setattr(os, "preadv", counted)
    assert _read(big[0], offset, length, SIZE) == big[1][offset : offset + length]
    first, stop = offset // ALIGN * ALIGN, -(-(offset + length) // ALIGN) * ALIGN
    assert [at for at, _ in sorted(asked)] == list(range(first, stop, BLOCK))
    assert sum(count for _, count in asked) == stop - first


def test_few_buffers_are_kept(big: tuple[Path, bytes], direct: None) -> None:
    opened = [open_range(big[0], 0, SIZE) for _ in range(readahead.MAX_SPARE)]
    for one in opened:
        one.close()
    assert len(readahead._spare) == readahead.MAX_SPARE


def test_conversion_and_proof_read_the_same_around_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    golden = Golden("pi0_lora")
    for to in ("torch-merged", "peft-adapter"):
        bridge.convert(golden.checkpoint, tmp_path / "through" / to, to=to, **golden.options)
    bridge.convert(tmp_path / "through" / "torch-merged", tmp_path / "through" / "orbax", to="orbax")
    request.getfixturevalue("direct")
    opened: list[readahead.RangeReader] = []

    def noted(*arguments: Any) -> readahead.RangeReader:
        opened.append(open_range(*arguments))
        return opened[-1]

    monkeypatch.setattr("bridge.formats.safetensors.torch.open_range", noted)
    monkeypatch.setattr("bridge.formats.orbax.stream.open_range", noted)
    for to in ("torch-merged", "peft-adapter"):
        bridge.convert(golden.checkpoint, tmp_path / "around" / to, to=to, **golden.options)
    bridge.convert(tmp_path / "around" / "torch-merged", tmp_path / "around" / "orbax", to="orbax")
    assert opened
    assert all(isinstance(one, readahead._DirectReader) for one in opened)
    for form in ("torch-merged", "peft-adapter", "orbax"):
        assert digest(tmp_path / "around" / form) == digest(tmp_path / "through" / form)
    assert verify(golden.checkpoint, tmp_path / "around" / "torch-merged").holds
