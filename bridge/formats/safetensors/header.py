"""The header of a safetensors file, parsed strictly, and written before any tensor.

A file is a length of eight bytes, a JSON header and one buffer without holes, little endian
(safetensors, tensor.rs). The header needs names, dtypes and shapes but no data, so the whole file
is laid out first, and tensors are then written in any order, each at its final offset. Stricter
than the reference: duplicate keys and unsafe names are refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from bridge.arrays import BFLOAT16, Spec
from bridge.errors import Problem, SourceRefused
from bridge.formats.disk import lfs
from bridge.formats.disk.location import open_regular
from bridge.formats.dtypes import DEQUANTISE, ForeignDtype, check_foreign
from bridge.strict_json import parse_object, shown

#: bytes; the reference allows 100 MB, far more than the names of a policy need
MAX_HEADER = 32 << 20
MAX_TENSORS = 100_000
#: elements along one axis: a product of axes does not limit it if another axis is 0
MAX_AXIS = 1 << 48
#: first bytes of zip archives (torch.save since 1.6) and of bare pickles
_PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's spec, and the offset of its first byte in the file."""

    spec: Spec
    offset: int


@dataclass(frozen=True)
class Header:
    """The layout of a file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    length: int
    """Size of the file in bytes."""


def compose(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """Lay out a file: its bytes up to the first tensor, and its header.

    Tensors are in the order of the reference writer: widest dtype first (alignment), then by name.
    """
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    described: dict[str, Any] = {}
    if metadata:
        described["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for name in order:
        spec = specs[name]
        end = begin + spec.nbytes
        described[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    entries = {name: TensorEntry(specs[name], first + described[name]["data_offsets"][0]) for name in order}
    return len(text).to_bytes(8, "little") + text, Header(entries, dict(metadata), first + begin)


def read_header(path: Path) -> Header:
    """Read and check the header of a local file.

    Raises:
        SourceRefused: the file cannot be read, or is not a valid safetensors file.
    """
    try:
        with io.BufferedReader(open_regular(path)) as file:
            size = path.stat().st_size
            start = file.read(8)
            if lfs.POINTER.startswith(start) and lfs.is_pointer(start + file.read(len(lfs.POINTER))):
                raise SourceRefused(lfs.pointer_problem(path))
            if start.startswith(_PICKLES) and int.from_bytes(start, "little") > size:
                raise SourceRefused(pickle_problem(str(path)))
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"its header claims {length} bytes, but the file has {size}")
            text = file.read(length)
        return _parse(text, size)
    except OSError as error:
        raise SourceRefused(
            Problem(f"{path}: {error.strerror}", "check the path and its permissions")
        ) from error
    except ForeignDtype as foreign:
        raise SourceRefused(Problem(f"{path}: {foreign}", DEQUANTISE)) from foreign
    except ValueError as error:
        raise SourceRefused(
            Problem(f"{path} is not a valid safetensors file: {error}", "copy the checkpoint again")
        ) from error


def _parse(text: bytes, size: int) -> Header:
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with '{'")
    described = parse_object(text, 16 * MAX_TENSORS)
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata has values that are not strings")
    if len(described) > MAX_TENSORS:
        raise ValueError(f"it lists {len(described)} tensors")
    first = 8 + len(text)
    tensors = {}
    specs: dict[tuple[str, str], Spec] = {}
    for name, value in described.items():
        try:
            tensors[name] = _entry(name, value, first, specs)
        except ForeignDtype as foreign:
            foreign.args = (f"{name} is {foreign}",)
            raise
    end = first
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
        if entry.offset != end:
            raise ValueError(f"{name} begins at byte {entry.offset}, but the tensor before it ends at {end}")
        end += entry.spec.nbytes
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, but the file has {size}")
    return Header(tensors, metadata, size)


def _entry(name: str, value: Any, first: int, specs: dict[tuple[str, str], Spec]) -> TensorEntry:
    """One entry of a header.

    Args:
        name: of the tensor.
        value: what the header says of it.
        first: offset of the first tensor in the file.
        specs: those of the entries before, by dtype and shape as they are written: few differ.
    """
    if not name or len(name) > 1024 or ".." in name or "/" in name or not name.isprintable():
        raise ValueError(f"unsafe tensor name {name[:80]!r}")
    if not isinstance(value, dict):
        raise ValueError(f"the entry of {name} is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        check_foreign(dtype)
        raise ValueError(f"{name} has dtype {shown(dtype)}")
    key = dtype, repr(shape)  # which tells 1 from True and 1.0
    if key not in specs and _naturals(shape, at_most=16):
        specs[key] = Spec(tuple(shape), _DTYPES[dtype])
    if key not in specs or not _naturals(offsets, at_most=2) or len(offsets) != 2:
        raise ValueError(f"{name} has shape {shown(shape)} at {shown(offsets)}")
    spec = specs[key]
    if spec.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"{name} is {spec} but has {offsets[1] - offsets[0]} bytes")
    return TensorEntry(spec, first + offsets[0])


def _naturals(value: object, *, at_most: int) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= at_most
        and all(type(n) is int and 0 <= n <= MAX_AXIS for n in value)
    )


def pickle_problem(where: str) -> Problem:
    """The problem of a pickle, whatever its name."""
    return Problem(
        f"{where} is a pickle, which can run code when it is loaded: bridge never loads one",
        "if you trust it, save it as safetensors: save_pretrained(..., safe_serialization=True)",
    )
