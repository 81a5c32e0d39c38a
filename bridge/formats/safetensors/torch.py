"""PyTorch checkpoints in safetensors: a directory with ``model.safetensors`` or shards, or one file.

Nothing here needs torch. Reads are ``pread`` calls of a few megabytes; writes put every tensor at
its final offset in a file that is laid out first.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import Spec, cells, raw, run_shape
from bridge.errors import Problem, SourceRefused, reason, refuse_if
from bridge.formats.contract import SLAB_BYTES, Format, Slab, Timings
from bridge.formats.disk.links import link_problems
from bridge.formats.disk.location import Location, is_safe_path, open_regular
from bridge.formats.disk.readahead import RangeReader, buffered_bytes, fill, open_range
from bridge.formats.disk.stamps import Stamp, take_stamps
from bridge.formats.disk.syscalls import WriteBehind, allocate
from bridge.formats.safetensors.header import (
    MAX_TENSORS,
    Header,
    TensorEntry,
    compose,
    pickle_problem,
    read_header,
)
from bridge.graph import Form, State
from bridge.strict_json import parse, parse_object, shown

FILE = "model.safetensors"
#: of an index of shards
INDEX_SUFFIX = ".safetensors.index.json"
CONFIG = "config.json"
#: bytes of one write call: Linux stops at 2 GiB, other systems reject that much
CALL_BYTES = 32 << 20
#: suffixes of pickles, which are never loaded
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_INDEX = 64 << 20
MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class TorchSource:
    """One or several safetensors files open for reading."""

    location: Location
    root: Location
    files: Mapping[str, tuple[Path, TensorEntry]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: str = "torch"
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        return {name: entry.spec for name, (_, entry) in self.files.items()}

    def stored_bytes(self, name: str) -> int:
        return self.files[name][1].spec.nbytes

    def how(self, name: str) -> str:
        return "streamed"

    def buffered_bytes(self, name: str) -> int:
        nbytes = self.files[name][1].spec.nbytes
        return min(nbytes, SLAB_BYTES) + buffered_bytes(nbytes)

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        spec = self.files[name][1].spec
        if rows is None or not spec.shape:
            return self._rows(name, 0, spec.shape[0] if spec.shape else 1).reshape(spec.shape)
        if isinstance(rows, int):
            at = range(spec.shape[0])[rows]
            row: np.ndarray = self._rows(name, at, at + 1)[0]
            return row
        start, stop, step = rows.indices(spec.shape[0])
        if step != 1:
            raise IndexError(f"rows of {name} must be contiguous: step {step} is not supported")
        return self._rows(name, start, max(start, stop))

    def sample(self, name: str, at: np.ndarray) -> np.ndarray | None:
        path, entry = self.files[name]
        spec = entry.spec
        numbers = np.ravel_multi_index(tuple(at.T), spec.shape) if spec.shape else np.zeros(len(at), int)
        values = np.empty(len(at), spec.dtype)
        into = raw(values)
        with self._named(name), open_regular(path) as file:
            for start, stop in _runs(numbers):
                part = into[start * spec.dtype.itemsize : stop * spec.dtype.itemsize]
                offset = entry.offset + int(numbers[start]) * spec.dtype.itemsize
                if os.preadv(file.fileno(), [part], offset) != len(part):
                    raise OSError(errno.EIO, "it is truncated")
        return values

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Timings | None = None
    ) -> Iterator[Slab]:
        entry = self.files[name][1]
        spec = Spec(entry.spec.shape if shape is None else shape, entry.spec.dtype)
        slab = run_shape(spec, SLAB_BYTES)
        buffer = np.empty(math.prod(slab), spec.dtype)
        with self._range(name, entry.offset, entry.spec.nbytes) as reader:
            for at, region in cells(spec.shape, slab):
                values = buffer[: math.prod(region)]
                began = time.perf_counter()
                self._fill(name, reader, raw(values))
                if spent is not None:
                    spent.read += time.perf_counter() - began
                yield at, values.reshape(region)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        spec = self.files[name][1].spec
        shape = spec.shape or (1,)
        rows = np.empty((stop - start, *shape[1:]), spec.dtype)
        offset = self.files[name][1].offset + start * (spec.nbytes // max(shape[0], 1))
        with self._range(name, offset, rows.nbytes) as reader:
            self._fill(name, reader, raw(rows))
        return rows

    @contextlib.contextmanager
    def _range(self, name: str, offset: int, length: int) -> Iterator[RangeReader]:
        with self._named(name):
            reader = open_range(self.files[name][0], offset, length)
        with contextlib.closing(reader):
            yield reader

    def _fill(self, name: str, reader: RangeReader, into: memoryview) -> None:
        with self._named(name):
            missing = fill(reader.readinto, into)
        if missing:
            raise SourceRefused(
                Problem(
                    f"{self.files[name][0]}: {name} is truncated by {missing} bytes", "copy the file again"
                )
            )

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Name the tensor and the file in an error."""
        try:
            yield
        except OSError as error:
            raise SourceRefused(
                Problem(
                    f"{self.files[name][0]}: {name} cannot be read: {error.strerror}",
                    "check the file and its permissions",
                )
            ) from error


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and stop of every run of consecutive numbers."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return itertools.pairwise([0, *cuts.tolist(), len(numbers)])


def claims(location: Location) -> bool:
    """Whether the path is a safetensors file, or a directory with one that is not an adapter."""
    names = location.names()
    if any(name.startswith("adapter_model.") for name in names):
        return False
    if FILE not in names and any(name.startswith("adapter_") for name in names):
        return False
    return location.name.endswith(".safetensors") or any(
        name.endswith((".safetensors", INDEX_SUFFIX)) for name in names
    )


def pickles(location: Location) -> list[str]:
    """The names of pickles, by suffix: the path itself, or files in it."""
    return [name for name in location.names() or [location.name] if name.endswith(PICKLES)]


def open_torch(location: Location) -> TorchSource:
    """Open a file, or a directory with ``model.safetensors`` or an index of shards.

    Raises:
        SourceRefused: there is no safetensors file, several without an index, or a damaged one.
    """
    if location.local is None:
        raise SourceRefused(
            Problem(f"{location}: PyTorch checkpoints can be read from local disk only", "download it first")
        )
    path = location.local
    names = location.names()
    if not names and path.exists() and not path.is_dir():
        if path.name.endswith(PICKLES):
            raise SourceRefused(pickle_problem(str(path)))
        return source_of(location, location.parent, [path], None)
    if FILE in names:
        return source_of(location, location, [path / FILE], None)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        stamps = take_stamps([path / indexes[0]])
        shards, total = _shards(location / indexes[0])
        source = source_of(location, location, sorted(set(shards.values())), shards)
        nbytes = sum(entry.spec.nbytes for _, entry in source.files.values())
        if total is not None and total != nbytes:
            note = f"{indexes[0]} has total_size {total}, but its tensors have {nbytes} bytes"
            source = replace(source, notes=(*source.notes, note))
        return replace(source, stamps={**source.stamps, **stamps})
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        return source_of(location, location, [path / files[0]], None)
    if not files and (names := pickles(location)):
        raise SourceRefused(pickle_problem(str(location / names[0])))
    what = (
        f"contains {len(files)} safetensors files but no index" if files else "contains no safetensors file"
    )
    raise SourceRefused(
        Problem(f"{location} {what}", f"give one file, or the directory that contains {FILE}")
    )


def _shards(path: Location) -> tuple[dict[str, Path], int | None]:
    """Tensor name -> its file, and the total size in the index."""
    text = path.read_bytes(MAX_INDEX)
    try:
        described = parse_object(text or b"", 2 * MAX_TENSORS)
        pairs = [(name, _file_name(file)) for name, file in described["weight_map"].items()]
        if len(pairs) > MAX_TENSORS:
            raise ValueError(f"it lists {len(pairs)} tensors; the limit is {MAX_TENSORS}")
        metadata = described.get("metadata") or {}
        total = metadata.get("total_size")
        if total is not None and (type(total) not in (int, float) or not math.isfinite(total)):
            raise ValueError(f"total_size is {shown(total)}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise SourceRefused(
            Problem(f"{path} is damaged: {reason(error)}", "copy the checkpoint again")
        ) from error
    files = sorted({file for _, file in pairs})
    problems = [
        Problem(f"{path} lists an unsafe file name: {file!r}", "do not trust this checkpoint")
        for file in files
        if not is_safe_path(file) or "/" in file or "\\" in file or not file.isprintable()
    ]
    refuse_if(problems, SourceRefused)
    problems += [
        Problem(f"{path} lists {file}, which is missing", "copy the checkpoint again")
        for file in files
        if not (path.parent / file).is_file()
    ]
    refuse_if(problems, SourceRefused)
    directory = Path(str(path.parent))
    return {name: directory / file for name, file in pairs}, None if total is None else int(total)


def _file_name(value: object) -> str:
    if not isinstance(value, str) or len(value) > 255:
        raise ValueError(f"{shown(value)} is not a file name")
    return value


def source_of(
    location: Location, root: Location, paths: list[Path], shards: Mapping[str, Path] | None
) -> TorchSource:
    """Open files, and check their headers against each other and the index."""
    files: dict[str, tuple[Path, TensorEntry]] = {}
    metadata: dict[str, Any] = {}
    problems: list[Problem] = []
    if location.local is not None:
        # the file that a user names may be a link
        inside = [str(path) for path in paths if path != location.local]
        refuse_if(link_problems(inside, location.home or str(location)), SourceRefused)
    stamps = take_stamps([*paths, *([root.local / CONFIG] if root.local is not None else [])])
    for path in paths:
        header = read_header(path)
        metadata.update(header.metadata)
        for name, entry in header.tensors.items():
            if shards is not None and shards.get(name) != path:
                problems.append(
                    Problem(
                        f"{path} contains {name}, which the index does not list there",
                        "copy the checkpoint again, or rebuild its index",
                    )
                )
            files[name] = (path, entry)
    problems += [
        Problem(
            f"{path} does not contain {name}, which the index lists there",
            "copy the checkpoint again, or rebuild its index",
        )
        for name, path in (shards or {}).items()
        if name not in files
    ]
    refuse_if(problems, SourceRefused)
    config = (root / CONFIG).read_bytes(MAX_CONFIG)
    if config is not None:
        try:
            metadata[CONFIG] = parse(config)
        except ValueError as error:
            raise SourceRefused(
                Problem(f"{root / CONFIG} is damaged: {error}", "copy the file again, or correct its JSON")
            ) from error
    return TorchSource(location, root, files, metadata, stamps=stamps)


@dataclass(frozen=True)
class TorchSink:
    """A safetensors file of its final size, filled tensor by tensor."""

    path: Path
    header: Header
    behind: WriteBehind = field(default_factory=WriteBehind, compare=False)

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        entry = self.header.tensors[name]
        shape = entry.spec.shape
        at = at or (0,) * len(shape)
        if array.dtype != entry.spec.dtype or array.ndim != len(shape):
            raise ValueError(f"{name} is declared {entry.spec} but got {Spec(array.shape, array.dtype)}")
        cut = next((axis for axis, n in enumerate(array.shape) if n != 1), array.ndim)
        if array.shape[cut + 1 :] != shape[cut + 1 :] or any(
            a < 0 or a + n > total for a, n, total in zip(at, array.shape, shape, strict=True)
        ):
            raise ValueError(f"{name} is declared {entry.spec} but got {list(array.shape)} at {list(at)}")
        first = 0
        for a, total in zip(at, shape, strict=True):
            first = first * total + a
        fd = os.open(self.path, os.O_WRONLY)
        try:
            data, offset = raw(array), entry.offset + first * array.dtype.itemsize
            for start in range(0, len(data), CALL_BYTES):
                part = data[start : start + CALL_BYTES]
                _write_all(fd, part, offset + start)
                self.behind.wrote(fd, offset + start, len(part))
        finally:
            os.close(fd)

    def finish(self) -> None:
        self.behind.finish()
        fd = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        if read_header(self.path) != self.header:
            raise OSError(f"{self.path}: the header read back differs from the one written")


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + CALL_BYTES], offset + done)


def create(
    directory: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], zeros: Collection[str]
) -> TorchSink:
    """Lay out ``model.safetensors`` in a directory."""
    return lay_out(directory / FILE, specs, metadata, zeros)


def lay_out(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], zeros: Collection[str] = ()
) -> TorchSink:
    """Create a file of its final size, with its header. Tensors in ``zeros`` are holes and take no space."""
    first, header = compose(specs, metadata)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(fd, header.length)
        begin = 0
        for entry in sorted((header.tensors[name] for name in zeros), key=lambda entry: entry.offset):
            allocate(fd, begin, entry.offset - begin)
            begin = entry.offset + entry.spec.nbytes
        allocate(fd, begin, header.length - begin)
        _write_all(fd, first, 0)
    finally:
        os.close(fd)
    return TorchSink(path, header)


def file_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file of a few small arrays, in memory."""
    specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    first, header = compose(specs, {})
    return first + b"".join(bytes(raw(arrays[name])) for name in header.tensors)


FORMAT = Format(
    name="torch",
    states=(
        State(name="torch-merged", contents="base", format="torch", form=Form.STATE_DICT),
        State(name="torch-base", contents="base", format="torch", form=Form.STATE_DICT, stripped=True),
    ),
    claims=claims,
    open=open_torch,
    create=create,
)
