"""What a zarr array says of itself (``.zarray``, or ``zarr.json`` in version 3), checked.

The shapes in these files decide how much memory is asked for, so nothing in them is believed
before it was looked at.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.specs import BFLOAT16, Spec

MAX_ELEMENTS = 1 << 38
MAX_CHUNKS = 1 << 22


@dataclass(frozen=True)
class ZarrArray:
    """One array: its spec, its chunk grid, and what the chunks are encoded with."""

    spec: Spec
    chunks: tuple[int, ...]
    driver: str
    """TensorStore's driver: ``zarr`` or ``zarr3``."""
    plain: str | None
    """``"zstd"`` or ``"raw"`` when a chunk is just that, in C order; None for anything else."""
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
    """Read a ``.zarray``. Raises ValueError with the cause."""
    meta = _object(text)
    shape, chunks = _sizes(meta, "shape"), _sizes(meta, "chunks")
    compressor = meta.get("compressor")
    plain = None
    if meta.get("order") == "C" and not meta.get("filters"):
        if compressor is None:
            plain = "raw"
        elif isinstance(compressor, dict) and compressor.get("id") == "zstd":
            plain = "zstd"
    separator = meta.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise ValueError(f"dimension_separator is {separator!r}")
    return _array(shape, chunks, _dtype(meta.get("dtype")), "zarr", plain, separator, "")


def parse_v3(text: bytes) -> ZarrArray:
    """Read a ``zarr.json``. Raises ValueError with the cause."""
    meta = _object(text)
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
        raise ValueError(f"chunk key separator is {separator!r}")
    # version 3 chunks hold shards with an index: TensorStore reads those
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
    if len(shape) > 16:
        raise ValueError(f"it has {len(shape)} axes")
    if math.prod(shape) > MAX_ELEMENTS or math.prod(chunks) > MAX_ELEMENTS:
        raise ValueError(f"shape {list(shape)} in chunks of {list(chunks)} is larger than any weight")
    if any(size == 0 for size in chunks):
        raise ValueError(f"chunks are {list(chunks)}")
    array = ZarrArray(Spec(shape, dtype), chunks, driver, plain, separator, prefix)
    if math.prod(array.grid) > MAX_CHUNKS:
        raise ValueError(f"shape {list(shape)} in chunks of {list(chunks)} is {math.prod(array.grid)} chunks")
    return array


def _object(text: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise ValueError("not a JSON object")
    return meta


def _sizes(meta: dict[str, Any], key: str) -> tuple[int, ...]:
    value = meta.get(key)
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{key} is {value!r}")
    return tuple(value)


def _dtype(name: Any) -> np.dtype:
    if name == "bfloat16":
        return BFLOAT16
    if isinstance(name, str):
        try:
            dtype = np.dtype(name)
        except TypeError as error:
            raise ValueError(f"dtype is {name!r}") from error
        if dtype.kind in "fiub" and dtype.isnative:
            return dtype
    raise ValueError(f"dtype is {name!r}")
