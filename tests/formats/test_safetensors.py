"""safetensors files, held against the reference library, and bad files, refused."""

import ctypes
import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.arrays import BFLOAT16, WEIGHT_DTYPES, Spec, box
from bridge.errors import SourceRefused
from bridge.formats.disk import syscalls
from bridge.formats.disk.location import Location
from bridge.formats.safetensors import torch as torch_format
from bridge.formats.safetensors.header import compose, read_header
from bridge.formats.safetensors.torch import FILE, create, open_torch
from tests.kit.headers import BAD, GOOD, packed

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {
        "b.weight": generator.standard_normal((3, 5)).astype(np.float32),
        "a.weight": generator.standard_normal((7, 2)).astype(np.float16),
        "layers.10.w": generator.standard_normal(11).astype(BFLOAT16),
        "layers.9.w": generator.standard_normal((2, 3, 5)).astype(np.float64),
        "scalar": np.asarray(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.asarray([True, False, True]),
        "ids": np.arange(5, dtype=np.int64),
        "é ü": np.arange(3, dtype=np.uint8),
    }


def write(directory: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] = METADATA) -> Path:
    """As a plan's steps do: any order, some tensors row by row."""
    sink = create(directory, {name: Spec(a.shape, a.dtype) for name, a in tensors.items()}, metadata, ())
    for number, (name, array) in enumerate(reversed(tensors.items())):
        if array.ndim and number % 2:
            for row in reversed(range(len(array))):
                sink.write(name, array[row : row + 1], (row, *(0,) * (array.ndim - 1)))
        else:
            sink.write(name, array)
    sink.finish()
    return sink.path


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# Round trips.


def test_the_reference_reads_what_is_written(tmp_path: Path) -> None:
    expected = arrays()
    path = write(tmp_path, expected)
    read = safetensors.torch.load_file(path)
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        assert torch.equal(read[name], as_torch(array)), name
    plain = {name: array for name, array in expected.items() if array.dtype != BFLOAT16}
    path.unlink()
    for name, array in safetensors.numpy.load_file(write(tmp_path, plain)).items():
        assert array.dtype == plain[name].dtype
        np.testing.assert_array_equal(array, plain[name])
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == METADATA


def test_what_the_reference_writes_is_read(tmp_path: Path) -> None:
    expected = arrays()
    path = tmp_path / FILE
    safetensors.torch.save_file({name: as_torch(array) for name, array in expected.items()}, path, METADATA)
    source = open_torch(Location.parse(tmp_path))
    assert read_header(path).metadata == METADATA == dict(source.metadata)
    assert source.specs == {name: Spec(a.shape, a.dtype) for name, a in expected.items()}
    for name, array in expected.items():
        assert source.read(name).tobytes() == array.tobytes()
        assert source.read(name).shape == array.shape


def test_rows_and_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = arrays()
    write(tmp_path, expected)
    source = open_torch(Location.parse(tmp_path))
    source = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(torch_format, "SLAB_BYTES", 45)
    for name, array in expected.items():
        # as it is, and as an array of other axes: the bytes come in order either way
        for shape in (None, (1, array.size)):
            slabs = [(at, values.copy()) for at, values in source.slabs(name, shape)]
            assert b"".join(values.tobytes() for _, values in slabs) == array.tobytes()
            assert all(values.nbytes <= 45 for _, values in slabs)
            put_together = np.empty(array.shape if shape is None else shape, array.dtype)
            for at, values in slabs:
                put_together[box(at, values.shape)] = values
            assert put_together.tobytes() == array.tobytes()
        if array.ndim and len(array):
            for rows in (0, -1, slice(1, 3), slice(-2, None), slice(0, 99), slice(2, 1)):
                np.testing.assert_array_equal(source.read(name, rows), array[rows])


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_the_file_is_the_references_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    """For tensors of one dtype, the reference's order is by name alone."""
    tensors = {
        f"layers.{n}.w": np.random.default_rng(n).standard_normal((n + 1, 3)).astype(WEIGHT_DTYPES[dtype])
        for n in range(12)
    }
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({name: as_torch(a) for name, a in tensors.items()}, theirs, METADATA)
    assert write(tmp_path, tensors).read_bytes() == theirs.read_bytes()


def test_the_file_is_the_references_for_a_policy_in_two_dtypes(tmp_path: Path) -> None:
    tensors = {
        name: np.ones((n + 2, 3), dtype)
        for n, (name, dtype) in enumerate(
            (("z", BFLOAT16), ("a", np.float32), ("m", BFLOAT16), ("k", np.float32))
        )
    }
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({name: as_torch(a) for name, a in tensors.items()}, theirs, METADATA)
    assert write(tmp_path, tensors).read_bytes() == theirs.read_bytes()


def test_the_header_does_not_depend_on_the_order_of_the_plan() -> None:
    specs = {name: Spec(a.shape, a.dtype) for name, a in arrays().items()}
    metadata = {"format": "pt", "alias": "b.weight"}
    first, header = compose(specs, metadata)
    assert compose(dict(reversed(specs.items())), dict(reversed(metadata.items()))) == (first, header)


@given(
    st.dictionaries(
        st.text(
            st.characters(codec="utf-8", categories=["L", "N", "P", "S"], exclude_characters="/."), min_size=1
        ),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from([*WEIGHT_DTYPES.values(), np.dtype(bool)]),
        ),
        max_size=6,
    ),
    st.dictionaries(st.text(), st.text(), max_size=2),
)
def test_any_header_reads_back(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Any], metadata: dict[str, str]
) -> None:
    specs = {
        name: Spec(tuple(shape), dtype) for name, (shape, dtype) in drawn.items() if name != "__metadata__"
    }
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    sink = create(tmp_path_factory.mktemp("any"), specs, metadata, ())
    sink.finish()
    assert read_header(sink.path) == sink.header
    with safetensors.safe_open(sink.path, "np") as opened:
        assert set(opened.keys()) == set(specs)
        assert (opened.metadata() or {}) == metadata


def test_tensors_begin_aligned() -> None:
    specs = {name: Spec(a.shape, a.dtype) for name, a in arrays().items()}
    _, header = compose(specs, METADATA)
    assert all(placed.offset % placed.spec.dtype.itemsize == 0 for placed in header.tensors.values())


def test_unwritten_tensors_are_zeros_and_take_no_blocks(tmp_path: Path) -> None:
    specs = {name: Spec((1 << 22,), np.dtype(np.float32)) for name in ("a", "z1", "b", "z2")}
    sink = create(tmp_path, specs, {}, {"z1", "z2"})
    # what will be written has its blocks already: a full disk is found before the first byte
    assert 2 << 24 <= sink.path.stat().st_blocks * 512 < (2 << 24) + (1 << 20)
    for name in ("a", "b"):
        sink.write(name, np.ones(1 << 22, np.float32))
    sink.finish()
    assert sink.path.stat().st_size > 4 << 24 and sink.path.stat().st_blocks * 512 < (2 << 24) + (1 << 20)
    source = open_torch(Location.parse(tmp_path))
    assert {name: bool(source.read(name).all()) for name in specs} == {
        "a": True,
        "z1": False,
        "b": True,
        "z2": False,
    }
    assert not source.read("z1").any()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, None])
def test_a_system_without_the_calls_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """Allocation, early write-back and read-ahead are helps: without them the bytes are the same."""
    (tmp_path / "with").mkdir()
    expected = write(tmp_path / "with", arrays()).read_bytes()

    def refuse(*arguments: object) -> int:
        ctypes.set_errno(code or 0)
        return -1

    monkeypatch.setattr(syscalls, "_libc", lambda *_: None if code is None else refuse)
    monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "without").mkdir()
    path = write(tmp_path / "without", arrays())
    assert path.read_bytes() == expected
    source = open_torch(Location.parse(path))
    assert all(b"".join(v.tobytes() for _, v in source.slabs(n)) == a.tobytes() for n, a in arrays().items())


def test_a_full_disk_is_found_when_the_file_is_laid_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(syscalls, "_libc", lambda *_: refuse)
    with pytest.raises(OSError, match="No space left"):
        create(tmp_path, {"w": Spec((3, 2), np.dtype(np.float32))}, {}, ())


def test_a_sink_refuses_what_was_not_declared(tmp_path: Path) -> None:
    sink = create(tmp_path, {"w": Spec((3, 2), np.dtype(np.float32))}, {}, ())
    for array, at in (
        (np.zeros((3, 2), np.float16), (0, 0)),
        (np.zeros((3, 3), np.float32), (0, 0)),
        (np.zeros((2, 2), np.float32), (2, 0)),
        (np.zeros((2, 2), np.float32), (-1, 0)),
        (np.zeros(6, np.float32), None),
        (np.zeros((3, 1), np.float32), (0, 0)),  # a column is no run in C order
    ):
        with pytest.raises(ValueError, match="w"):
            sink.write("w", array, at)
    with pytest.raises(FileExistsError):
        create(tmp_path, {}, {}, ())


def test_a_sink_finds_a_file_that_changed_under_it(tmp_path: Path) -> None:
    sink = create(tmp_path, {"w": Spec((3, 2), np.dtype(np.float32))}, {}, ())
    sink.path.write_bytes(sink.path.read_bytes()[:-1])
    with pytest.raises((SourceRefused, OSError)):
        sink.finish()


# Bad files.


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(GOOD)
    assert set(read_header(path).tensors) == {"a", "b"}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, cause = BAD[name]
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(SourceRefused) as refused:
        open_torch(Location.parse(tmp_path))
    (problem,) = refused.value.problems
    assert str(path) in problem.cause and cause in problem.cause
    assert "\n" not in problem.cause and len(problem.cause) < 500 and problem.fix


@pytest.mark.parametrize("keep", range(0, len(GOOD), 5))
def test_every_truncation_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / FILE
    path.write_bytes(GOOD[:keep])
    with pytest.raises(SourceRefused):
        read_header(path)


@given(st.binary(max_size=200))
def test_any_header_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / FILE
    path.write_bytes(packed(b"{" + text, bytes(8)))
    with pytest.raises(SourceRefused):
        read_header(path)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_what_the_reference_refuses_is_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    """One damaged byte: never a crash, and never more lenient than the reference."""
    path = tmp_path_factory.mktemp("flip") / FILE
    content = bytearray(GOOD)
    content[position] ^= flip
    path.write_bytes(content)
    try:
        read_header(path)
    except SourceRefused:
        return
    safetensors.numpy.load_file(path)


# Shards.


def shards(directory: Path, weight_map: dict[str, Any], files: dict[str, list[str]]) -> Path:
    for file, names in files.items():
        safetensors.numpy.save_file(
            {name: np.full((2, 3), len(name), np.float32) for name in names}, directory / file
        )
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": ONE, "bb": TWO, "ccc": ONE}, {ONE: ["a", "ccc"], TWO: ["bb"]})
    source = open_torch(Location.parse(tmp_path))
    assert set(source.specs) == {"a", "bb", "ccc"}
    for name in source.specs:
        assert (source.read(name) == len(name)).all()
    assert open_torch(Location.parse(tmp_path / TWO)).specs.keys() == {"bb"}


@pytest.mark.parametrize(
    ("weight_map", "files", "cause"),
    [
        ({"a": ONE, "b": TWO}, {ONE: ["a"]}, f"lists {TWO}, which is missing"),
        ({"a": ONE, "b": "../x.safetensors"}, {ONE: ["a"]}, "unsafe file name"),
        ({"a": ONE, "b": "/etc/passwd"}, {ONE: ["a"]}, "unsafe file name"),
        ({"a": ONE, "b": ".."}, {ONE: ["a"]}, "unsafe file name"),
        ({"a": ONE, "b": ""}, {ONE: ["a"]}, "unsafe file name"),
        ({"a": ONE, "b": "sub/x.safetensors"}, {ONE: ["a"]}, "unsafe file name"),
        ({"a": ONE, "b": TWO}, {ONE: ["a", "b"], TWO: ["b"]}, "b, which the index does not list there"),
        ({"a": ONE}, {ONE: ["a", "b"]}, "b, which the index does not list there"),
        ({"a": ONE, "b": ONE}, {ONE: ["a"]}, "does not contain b, which the index lists there"),
        ({"a": ONE, "b": 3}, {ONE: ["a"]}, ""),
        ({"a": ONE, "b": None}, {ONE: ["a"]}, ""),
    ],
)
def test_bad_shards(
    tmp_path: Path, weight_map: dict[str, Any], files: dict[str, list[str]], cause: str
) -> None:
    shards(tmp_path, weight_map, files)
    with pytest.raises(SourceRefused) as refused:
        open_torch(Location.parse(tmp_path))
    assert all(str(tmp_path) in p.cause and "\n" not in p.cause and p.fix for p in refused.value.problems)
    assert any(cause in problem.cause for problem in refused.value.problems)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 100_000, '"x"', "\xff\xfe"]
)
def test_bad_indexes(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(SourceRefused, match=r"index\.json is damaged"):
        open_torch(Location.parse(tmp_path))


def test_several_files_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path, {}, {ONE: ["a"], TWO: ["b"]})
    (tmp_path / INDEX).unlink()
    with pytest.raises(SourceRefused, match="contains 2 safetensors files but no index"):
        open_torch(Location.parse(tmp_path))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"w": np.ones((100, 3), np.float32)})
    source = open_torch(Location.parse(tmp_path))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(SourceRefused, match="w is truncated by 100 bytes"):
        source.read("w")
    with pytest.raises(SourceRefused, match="w is truncated by 100 bytes"):
        list(source.slabs("w"))
    path.unlink()
    with pytest.raises(SourceRefused):
        source.read("w")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_a_config_that_is_not_json(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"w": np.ones(3, np.float32)})
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SourceRefused, match=r"config\.json is damaged: (not JSON|nested too deeply)"):
        open_torch(Location.parse(tmp_path))
