"""Metadata of zarr arrays (``.zarray``, or ``zarr.json`` in version 3), parsed and checked.

The shapes in these files decide how much memory is allocated, so they are checked first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.arrays import BFLOAT16, Spec
from bridge.formats.dtypes import check_foreign
from bridge.strict_json import parse_object, shown

MAX_BYTES = 1 << 40
MAX_CHUNKS = 1 << 22
MAX_AXES = 16
#: bytes of one array's metadata
MAX_TEXT = 1 << 20

_PLAIN = [np.dtype(kind) for kind in ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]]
_DTYPES = {dtype.str: dtype for dtype in _PLAIN} | {d.name: d for d in _PLAIN} | {"bfloat16": BFLOAT16}
#: codecs of version 3 that Orbax writes; TensorStore decodes each into a buffer of the declared size
_CODECS = {"bytes", "transpose", "zstd", "crc32c", "sharding_indexed"}


@dataclass(frozen=True)
class ZarrArray:
    """One array: its spec, its chunk grid, and the encoding of its chunks."""

    spec: Spec
    chunks: tuple[int, ...]
    driver: str
    """TensorStore's driver: ``zarr`` or ``zarr3``."""
    plain: str | None
    """``"zstd"`` or ``"raw"`` if chunks are encoded so and in C order; None for other codecs."""
    separator: str
    prefix: str

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(math.ceil(n / c) for n, c in zip(self.spec.shape, self.chunks, strict=True))

    def chunk_keys(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Grid position and key, relative to the array, of every chunk."""
        if not self.spec.shape:
            yield (), (self.prefix.rstrip("/") or "0")
            return
        for position in itertools.product(*map(range, self.grid)):
            yield position, self.prefix + self.separator.join(map(str, position))


def parse_v2(text: bytes) -> ZarrArray:
    """Parse a ``.zarray``. Raises ValueError with the cause, ForeignDtype among them."""
    meta = parse_object(text)
    shape, chunks = _sizes(meta, "shape"), _sizes(meta, "chunks")
    compressor = meta.get("compressor")
    if compressor is not None and (not isinstance(compressor, dict) or compressor.get("id") != "zstd"):
        raise ValueError(f"compressor is {shown(compressor)}; Orbax writes zstd or none")
    for field, allowed in (("zarr_format", (2,)), ("order", ("C",)), ("filters", (None, []))):
        if meta.get(field) not in allowed:
            raise ValueError(f"{field} is {shown(meta.get(field))}; Orbax writes {allowed[0]}")
    _check_fill(meta)
    plain = "raw" if compressor is None else "zstd"
    separator = meta.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise ValueError(f"dimension_separator is {shown(separator)}")
    return _array(shape, chunks, _dtype(meta.get("dtype")), "zarr", plain, separator, "")


def parse_v3(text: bytes) -> ZarrArray:
    """Parse a ``zarr.json``. Raises ValueError with the cause."""
    meta = parse_object(text)
    if meta.get("zarr_format") != 3 or meta.get("node_type") != "array":
        raise ValueError("not the metadata of a zarr 3 array")
    _check_codecs(meta.get("codecs"), 0)
    _check_fill(meta)
    grid = meta.get("chunk_grid")
    configuration = grid.get("configuration") if isinstance(grid, dict) else None
    if not isinstance(configuration, dict):
        raise ValueError("no chunk_grid")
    shape, chunks = _sizes(meta, "shape"), _sizes(configuration, "chunk_shape")
    encoding = meta.get("chunk_key_encoding")
    encoding = encoding if isinstance(encoding, dict) else {}
    settings = encoding.get("configuration")
    separator = settings.get("separator") if isinstance(settings, dict) else None
    default = encoding.get("name", "default") == "default"
    separator = separator or ("/" if default else ".")
    if separator not in (".", "/"):
        raise ValueError(f"chunk key separator is {shown(separator)}")
    # chunks of version 3 may be sharded: TensorStore reads them
    return _array(
        shape,
        chunks,
        _dtype(meta.get("data_type")),
        "zarr3",
        None,
        separator,
        f"c{separator}" if default else "",
    )


def _array(
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype,
    driver: str,
    plain: str | None,
    separator: str,
    prefix: str,
) -> ZarrArray:
    if len(chunks) != len(shape):
        raise ValueError(f"shape {list(shape)} and chunks {list(chunks)} differ in length")
    if len(shape) > MAX_AXES:
        raise ValueError(f"it has {len(shape)} axes")
    described = f"shape {list(shape)} in chunks of {list(chunks)}"
    if any(size == 0 for size in chunks):
        raise ValueError(f"chunks are {list(chunks)}")
    # an axis of 0 must not hide the size of the others
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{described} exceeds the limit of {MAX_BYTES >> 40} TiB")
    if any(chunk > max(size, 1) for chunk, size in zip(chunks, shape, strict=True)):
        raise ValueError(f"{described}: a chunk is larger than the array")
    array = ZarrArray(Spec(shape, dtype), chunks, driver, plain, separator, prefix)
    if math.prod(array.grid) > MAX_CHUNKS:
        raise ValueError(f"{described} has {math.prod(array.grid)} chunks")
    return array


def _sizes(meta: dict[str, Any], key: str) -> tuple[int, ...]:
    value = meta.get(key)
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in value):
        raise ValueError(f"{key} is {shown(value)}")
    return tuple(value)


def _dtype(name: Any) -> np.dtype:
    # looked up, not parsed: numpy interprets these strings
    if isinstance(name, str) and name in _DTYPES:
        return _DTYPES[name]
    check_foreign(name)
    raise ValueError(f"dtype is {shown(name)}")


def _check_fill(meta: dict[str, Any]) -> None:
    """Absent chunks must mean zeros."""
    value = meta.get("fill_value")
    if isinstance(value, (dict, list, str)) or value:
        raise ValueError(f"fill_value is {shown(value)}; Orbax writes none or zero")


def _check_codecs(codecs: Any, depth: int) -> None:
    if not isinstance(codecs, list) or depth > 2:
        raise ValueError(f"codecs are {shown(codecs)}")
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else None
        if not isinstance(name, str) or name not in _CODECS:
            raise ValueError(f"a codec is {shown(name)}; Orbax writes {', '.join(sorted(_CODECS))}")
        if name == "sharding_indexed":
            settings = codec.get("configuration")
            for inner in ("codecs", "index_codecs"):
                _check_codecs(settings.get(inner) if isinstance(settings, dict) else None, depth + 1)
