"""PyTorch checkpoints in safetensors: a directory with ``model.safetensors``, shards, or one file.

Nothing here needs torch. Reading goes through the system's ``pread``, a few megabytes at a
time; writing puts every tensor at its final offset of a file that is laid out first.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import Spec, cells, raw, run_shape
from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.formats.contract import SLAB_BYTES, Format, Slab, Spent
from bridge.formats.disk.location import Location
from bridge.formats.disk.readahead import Part, buffered_bytes, fill, open_part
from bridge.formats.disk.stamps import Stamp, take
from bridge.formats.disk.syscalls import WriteBehind, allocate
from bridge.formats.safetensors.header import (
    MAX_TENSORS,
    Header,
    Placed,
    compose,
    pickle_problem,
    read_header,
)
from bridge.graph import Form, State
from bridge.strict_json import parse, parse_object, shown

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
#: the most that one call writes: Linux itself stops at 2 GiB, other systems refuse that much
CALL_BYTES = 32 << 20
#: names of pickles, which are never opened
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_INDEX = 64 << 20
MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class TorchSource:
    """Tensors of one or several safetensors files, opened for reading."""

    location: Location
    root: Location
    files: Mapping[str, tuple[Path, Placed]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: str = "torch"
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {name: placed.spec for name, (_, placed) in self.files.items()}

    def stored_bytes(self, name: str) -> int:
        return self.files[name][1].spec.nbytes

    def how(self, name: str) -> str:
        return "streamed"

    def buffered_bytes(self, name: str) -> int:
        held = self.files[name][1].spec.nbytes
        return min(held, SLAB_BYTES) + buffered_bytes(held)

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        spec = self.files[name][1].spec
        if rows is None or not spec.shape:
            return self._rows(name, 0, spec.shape[0] if spec.shape else 1).reshape(spec.shape)
        if isinstance(rows, int):
            at = range(spec.shape[0])[rows]
            one: np.ndarray = self._rows(name, at, at + 1)[0]
            return one
        start, stop, step = rows.indices(spec.shape[0])
        if step != 1:
            raise IndexError(f"rows of {name} are read in order: no step {step}")
        return self._rows(name, start, max(start, stop))

    def slabs(
        self, name: str, shape: tuple[int, ...] | None = None, spent: Spent | None = None
    ) -> Iterator[Slab]:
        placed = self.files[name][1]
        spec = Spec(placed.spec.shape if shape is None else shape, placed.spec.dtype)
        slab = run_shape(spec, SLAB_BYTES)
        buffer = np.empty(math.prod(slab), spec.dtype)
        with self._part(name, placed.offset, placed.spec.nbytes) as part:
            for at, region in cells(spec.shape, slab):
                values = buffer[: math.prod(region)]
                began = time.perf_counter()
                self._fill(name, part, raw(values))
                if spent is not None:
                    spent.read += time.perf_counter() - began
                yield at, values.reshape(region)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        spec = self.files[name][1].spec
        shape = spec.shape or (1,)
        rows = np.empty((stop - start, *shape[1:]), spec.dtype)
        offset = self.files[name][1].offset + start * (spec.nbytes // max(shape[0], 1))
        with self._part(name, offset, rows.nbytes) as part:
            self._fill(name, part, raw(rows))
        return rows

    @contextlib.contextmanager
    def _part(self, name: str, offset: int, length: int) -> Iterator[Part]:
        with self._named(name):
            part = open_part(self.files[name][0], offset, length)
        with contextlib.closing(part):
            yield part

    def _fill(self, name: str, part: Part, into: memoryview) -> None:
        with self._named(name):
            missing = fill(part.readinto, into)
        if missing:
            raise SourceRefused(
                Problem(f"{self.files[name][0]}: {name} ends {missing} bytes too soon", "copy it again")
            )

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Say which tensor cannot be read."""
        try:
            yield
        except OSError as error:
            raise SourceRefused(
                Problem(
                    f"{self.files[name][0]}: {name} cannot be read: {error.strerror}",
                    "check the file and its permissions",
                )
            ) from error


def claims(location: Location) -> bool:
    """Whether the path is a safetensors file or a directory that holds one, and no adapter."""
    names = location.names()
    if any(name.startswith("adapter_") for name in names):
        return False
    return location.name.endswith(".safetensors") or any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in names
    )


def pickles(location: Location) -> list[str]:
    """The path itself or the files in it that are pickles by their names."""
    return [name for name in location.names() or [location.name] if name.endswith(PICKLES)]


def open_torch(location: Location) -> TorchSource:
    """Open a file, or a directory with ``model.safetensors`` or an index of shards.

    Raises:
        SourceRefused: there is no such file, several and no index, or one is damaged.
    """
    if location.local is None:
        raise SourceRefused(
            Problem(f"{location}: PyTorch checkpoints are read from local disk", "copy it here first")
        )
    path = location.local
    names = location.names()
    if not names and path.exists() and not path.is_dir():
        if path.name.endswith(PICKLES):
            raise SourceRefused(pickle_problem(str(path)))
        return source_of(location, location.parent, [path], None)
    if FILE in names:
        return source_of(location, location, [path / FILE], None)
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(indexes) == 1:
        stamps = take([path / indexes[0]])
        shards, note = _shards(path / indexes[0])
        source = source_of(location, location, sorted(set(shards.values())), shards)
        held = sum(placed.spec.nbytes for _, placed in source.files.values())
        if note is not None and note != held:
            said = f"{indexes[0]} says total_size {note}, and its tensors have {held} bytes"
            source = replace(source, notes=(*source.notes, said))
        return replace(source, stamps={**source.stamps, **stamps})
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        return source_of(location, location, [path / files[0]], None)
    if not files and (found := pickles(location)):
        raise SourceRefused(pickle_problem(str(location / found[0])))
    what = f"holds {len(files)} safetensors files and no index" if files else "holds no safetensors file"
    raise SourceRefused(Problem(f"{location} {what}", f"give one file, or the directory that holds {FILE}"))


def _shards(path: Path) -> tuple[dict[str, Path], int | None]:
    """Tensor name -> its file, and the bytes that the index says they have."""
    text = Location.parse(path).read_bytes(MAX_INDEX)
    try:
        described = parse_object(text or b"", 2 * MAX_TENSORS)
        pairs = [(name, _file_name(file)) for name, file in described["weight_map"].items()]
        if len(pairs) > MAX_TENSORS:
            raise ValueError(f"it lists {len(pairs)} tensors")
        metadata = described.get("metadata") or {}
        total = metadata.get("total_size")
        if total is not None and (type(total) not in (int, float) or not math.isfinite(total)):
            raise ValueError(f"total_size is {shown(total)}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise SourceRefused(Problem(f"{path} is damaged: {error!r}", "copy the checkpoint again")) from error
    files = sorted({file for _, file in pairs})
    problems = [
        Problem(f"{path} points to {file!r}, outside its directory", "do not trust this checkpoint")
        for file in files
        if "/" in file or "\\" in file or file in ("", ".", "..") or not file.isprintable()
    ]
    refuse_if(problems, SourceRefused)
    problems += [
        Problem(f"{path} names {file}, which is missing", "copy the checkpoint again")
        for file in files
        if not (path.parent / file).is_file()
    ]
    refuse_if(problems, SourceRefused)
    return {name: path.parent / file for name, file in pairs}, None if total is None else int(total)


def _file_name(value: object) -> str:
    if not isinstance(value, str) or len(value) > 255:
        raise ValueError(f"a file is {shown(value)}")
    return value


def source_of(
    location: Location, root: Location, paths: list[Path], shards: Mapping[str, Path] | None
) -> TorchSource:
    """A source over files whose headers are read and checked against each other and the index."""
    files: dict[str, tuple[Path, Placed]] = {}
    metadata: dict[str, Any] = {}
    problems = []
    stamps = take([*paths, *([root.local / CONFIG] if root.local is not None else [])])
    for path in paths:
        header = read_header(path)
        metadata.update(header.metadata)
        for name, placed in header.tensors.items():
            if shards is not None and shards.get(name) != path:
                problems.append(
                    Problem(f"{path} holds {name}, which the index puts elsewhere", "rewrite the index")
                )
            files[name] = (path, placed)
    problems += [
        Problem(f"{path} lacks {name}, which the index says it holds", "copy the checkpoint again")
        for name, path in (shards or {}).items()
        if name not in files
    ]
    refuse_if(problems, SourceRefused)
    config = (root / CONFIG).read_bytes(MAX_CONFIG)
    if config is not None:
        try:
            metadata[CONFIG] = parse(config)
        except ValueError as error:
            raise SourceRefused(Problem(f"{root / CONFIG} is {error}", "repair it, or remove it")) from error
    return TorchSource(location, root, files, metadata, stamps=stamps)


@dataclass(frozen=True)
class TorchSink:
    """A ``model.safetensors`` of its final size, filled tensor by tensor."""

    path: Path
    header: Header
    behind: WriteBehind = field(default_factory=WriteBehind, compare=False)

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        placed = self.header.tensors[name]
        shape = placed.spec.shape
        at = at or (0,) * len(shape)
        if array.dtype != placed.spec.dtype or array.ndim != len(shape):
            raise ValueError(f"{name} is declared {placed.spec}, and got {Spec(array.shape, array.dtype)}")
        cut = next((axis for axis, n in enumerate(array.shape) if n != 1), array.ndim)
        if array.shape[cut + 1 :] != shape[cut + 1 :] or any(
            a < 0 or a + n > total for a, n, total in zip(at, array.shape, shape, strict=True)
        ):
            raise ValueError(f"{name} is declared {placed.spec}, and got {list(array.shape)} at {list(at)}")
        first = 0
        for a, total in zip(at, shape, strict=True):
            first = first * total + a
        fd = os.open(self.path, os.O_WRONLY)
        try:
            data, offset = raw(array), placed.offset + first * array.dtype.itemsize
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
            raise OSError(f"{self.path}: the file read back is not the one that was laid out")


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
    """Make a file of its final size, header first. Tensors of ``zeros`` are a hole, and take no space."""
    first, header = compose(specs, metadata)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(fd, header.length)
        begin = 0
        for placed in sorted((header.tensors[name] for name in zeros), key=lambda placed: placed.offset):
            allocate(fd, begin, placed.offset - begin)
            begin = placed.offset + placed.spec.nbytes
        allocate(fd, begin, header.length - begin)
        _write_all(fd, first, 0)
    finally:
        os.close(fd)
    return TorchSink(path, header)


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
