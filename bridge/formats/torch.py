"""PyTorch checkpoints in safetensors: a directory with ``model.safetensors``, shards, or one file.

Nothing here needs torch. Reading goes through the system's ``pread``, a few megabytes at a
time; writing puts every tensor at its final offset of a file that is laid out first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import Problem, SourceRefused, refuse_if
from bridge.formats import Block, Format
from bridge.formats.location import Location
from bridge.formats.safetensors import Header, Placed, compose, read_header
from bridge.specs import Spec, raw

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class TorchSource:
    """Tensors of one or several safetensors files, opened for reading."""

    location: Location
    root: Location
    files: Mapping[str, tuple[Path, Placed]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: str = "torch"

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {name: placed.spec for name, (_, placed) in self.files.items()}

    def stored_bytes(self, name: str) -> int:
        return self.files[name][1].spec.nbytes

    def how(self, name: str) -> str:
        return "streamed"

    def buffered_bytes(self, name: str) -> int:
        return _block_rows(self.files[name][1].spec)[1]

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

    def blocks(self, name: str) -> Iterator[Block]:
        spec = self.files[name][1].spec
        step = _block_rows(spec)[0]
        total = spec.shape[0] if spec.shape else 1
        for start in range(0, total, step):
            yield start, self._rows(name, start, min(start + step, total))

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        path, placed = self.files[name]
        shape = placed.spec.shape or (1,)
        row = placed.spec.nbytes // max(shape[0], 1)
        rows = np.empty((stop - start, *shape[1:]), placed.spec.dtype)
        into = raw(rows)
        try:
            with path.open("rb", buffering=0) as file:
                done = 0
                while done < len(into):
                    got = os.preadv(file.fileno(), [into[done:]], placed.offset + start * row + done)
                    if got == 0:
                        raise SourceRefused(
                            Problem(f"{path}: {name} ends {len(into) - done} bytes too soon", "copy it again")
                        )
                    done += got
        except OSError as error:
            raise SourceRefused(
                Problem(
                    f"{path}: {name} cannot be read: {error.strerror}", "check the file and its permissions"
                )
            ) from error
        return rows


def _block_rows(spec: Spec) -> tuple[int, int]:
    """Rows in a block, and its bytes."""
    row = spec.nbytes // max(spec.shape[0] if spec.shape else 1, 1)
    rows = max(1, BLOCK_BYTES // max(row, 1))
    return rows, min(rows * row, spec.nbytes)


def claims(location: Location) -> bool:
    """Whether the path is a safetensors file or a directory that holds one, and no adapter."""
    if any(name.startswith("adapter_") for name in location.names()):
        return False
    return location.name.endswith(".safetensors") or any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in location.names()
    )


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
    if path.is_file():
        return source_of(location, location.parent, [path], None)
    names = location.names()
    if FILE in names:
        return source_of(location, location, [path / FILE], None)
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(indexes) == 1:
        shards = _shards(path / indexes[0])
        return source_of(location, location, sorted(set(shards.values())), shards)
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        return source_of(location, location, [path / files[0]], None)
    what = f"holds {len(files)} safetensors files and no index" if files else "holds no safetensors file"
    raise SourceRefused(Problem(f"{location} {what}", f"give one file, or the directory that holds {FILE}"))


def _shards(path: Path) -> dict[str, Path]:
    try:
        described = json.loads(path.read_bytes())
        weight_map = described["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceRefused(Problem(f"{path} is damaged: {error!r}", "copy the checkpoint again")) from error
    problems = [
        Problem(f"{path} points to {file!r}, outside its directory", "do not trust this checkpoint")
        for file in sorted({file for _, file in pairs})
        if "/" in file or "\\" in file or file in ("", ".", "..")
    ]
    problems += [
        Problem(f"{path} names {file}, which is missing", "copy the checkpoint again")
        for file in sorted({file for _, file in pairs})
        if "/" not in file and not (path.parent / file).is_file()
    ]
    refuse_if(problems, SourceRefused)
    return {name: path.parent / file for name, file in pairs}


def source_of(
    location: Location, root: Location, paths: list[Path], shards: Mapping[str, Path] | None
) -> TorchSource:
    """A source over files whose headers are read and checked against each other and the index."""
    files: dict[str, tuple[Path, Placed]] = {}
    metadata: dict[str, Any] = {}
    problems = []
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
    config = (root / CONFIG).read_bytes()
    if config is not None:
        try:
            metadata[CONFIG] = json.loads(config)
        except (ValueError, RecursionError) as error:
            raise SourceRefused(
                Problem(f"{root / CONFIG} is not JSON: {error}", "repair it, or remove it")
            ) from error
    return TorchSource(location, root, files, metadata)


@dataclass(frozen=True)
class TorchSink:
    """A ``model.safetensors`` of its final size, filled tensor by tensor."""

    path: Path
    header: Header

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        placed = self.header.tensors[name]
        if array.dtype != placed.spec.dtype or array.shape[1:] != placed.spec.shape[1:]:
            raise ValueError(f"{name} is declared {placed.spec}, and got {Spec(array.shape, array.dtype)}")
        row = placed.spec.nbytes // max(placed.spec.shape[0] if placed.spec.shape else 1, 1)
        if start < 0 or start * row + array.nbytes > placed.spec.nbytes:
            raise ValueError(f"{name} has {placed.spec.shape} rows, and got more")
        data = raw(array)
        fd = os.open(self.path, os.O_WRONLY)
        try:
            _write_all(fd, data, placed.offset + start * row)
        finally:
            os.close(fd)

    def finish(self) -> None:
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
        done += os.pwrite(fd, data[done:], offset + done)


def create(directory: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> TorchSink:
    """Lay out ``model.safetensors`` in a directory."""
    return lay_out(directory / FILE, specs, metadata)


def lay_out(path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> TorchSink:
    """Make a file of its final size, header first. Tensors never written are zeros, as a hole."""
    first, header = compose(specs, metadata)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(fd, header.length)
        _write_all(fd, first, 0)
    finally:
        os.close(fd)
    return TorchSink(path, header)


FORMAT = Format(name="torch", claims=claims, open=open_torch, create=create)
