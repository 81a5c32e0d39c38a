"""Writing Orbax checkpoints in bounded memory, without Orbax.

One zarr directory per array, and ``_METADATA``, which every Orbax restores (openpi's 0.11.13 and
today's). Not OCDBT: its files have random names, and a conversion must be reproducible byte for
byte. Chunks are at most `RUN_BYTES`, cut along the leading axes, so that a layer can be read alone;
each is a zstd frame in its own file, as TensorStore writes them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zstandard

from bridge.arrays import BFLOAT16, Spec, box, cells, raw, run_shape
from bridge.formats.contract import RUN_BYTES
from bridge.formats.disk.syscalls import WriteBehind

ITEM = "params"
#: Orbax's default
ZSTD_LEVEL = 1
#: bytes compressed at a time
PIECE = 1 << 20


def chunk_shape(spec: Spec) -> tuple[int, ...]:
    """The whole array if it fits into RUN_BYTES, else a chunk cut along the leading axes."""
    return run_shape(spec, RUN_BYTES)


@dataclass(frozen=True)
class OrbaxSink:
    """A ``params`` directory with the metadata of its arrays, filled chunk by chunk."""

    params: Path
    specs: Mapping[str, Spec]
    behind: WriteBehind = field(default_factory=WriteBehind, compare=False)

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        spec = self.specs[name]
        chunk = tuple(max(size, 1) for size in chunk_shape(spec))
        at = at or (0,) * len(spec.shape)
        if array.dtype != spec.dtype or array.ndim != len(spec.shape):
            raise ValueError(f"{name} is declared {spec} but got {Spec(array.shape, array.dtype)}")
        ends = [a + n for a, n in zip(at, array.shape, strict=True)]
        if any(a % c for a, c in zip(at, chunk, strict=True)) or any(
            end > total or (end % c and end != total)
            for end, c, total in zip(ends, chunk, spec.shape, strict=True)
        ):
            raise ValueError(f"{name} has chunks of {list(chunk)} but got {list(array.shape)} at {list(at)}")
        for start, part in cells(array.shape, chunk):
            number = [(a + s) // c for a, s, c in zip(at, start, chunk, strict=True)]
            self._write_chunk(name, number, array[box(start, part)], chunk)

    def _write_chunk(self, name: str, number: list[int], values: np.ndarray, chunk: tuple[int, ...]) -> None:
        if values.shape != chunk:
            # chunks are stored whole, padded beyond the end of the array
            padded = np.zeros(chunk, values.dtype)
            padded[box((0,) * len(chunk), values.shape)] = values
            values = padded
        data = raw(values)
        path = _directory(self.params, name) / (".".join(map(str, number)) or "0")
        with path.open("xb") as file:
            # in pieces: fresh memory for the whole chunk would cost more than compressing it
            compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
            with compressor.stream_writer(file, size=len(data), write_size=PIECE, closefd=False) as encoded:
                for start in range(0, len(data), PIECE):
                    encoded.write(data[start : start + PIECE])
            file.flush()
            self.behind.wrote(file.fileno(), 0, file.tell())

    def finish(self) -> None:
        self.behind.finish()
        (self.params / "_METADATA").write_text(_metadata(self.specs))


def create(
    directory: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], zeros: Collection[str]
) -> OrbaxSink:
    """Create ``params/`` in a directory. Names are ``/``-joined paths; there is no header, and no zeros."""
    if zeros:
        raise ValueError("Orbax rejects absent chunks: zeros must be written")
    params = directory / ITEM
    params.mkdir()
    for name, spec in specs.items():
        _directory(params, name).mkdir()
        (_directory(params, name) / ".zarray").write_text(_zarray(spec))
    return OrbaxSink(params, dict(specs))


def _directory(params: Path, name: str) -> Path:
    return params / name.replace("/", ".")


def _zarray(spec: Spec) -> str:
    """The zarr 2 metadata of an array, byte for byte as TensorStore writes it."""
    described = {
        "chunks": [max(size, 1) for size in chunk_shape(spec)],
        "compressor": {"id": "zstd", "level": ZSTD_LEVEL},
        "dimension_separator": ".",
        "dtype": "bfloat16" if spec.dtype == BFLOAT16 else spec.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(spec.shape),
        "zarr_format": 2,
    }
    return json.dumps(described, separators=(",", ":"))


def _metadata(specs: Mapping[str, Spec]) -> str:
    """Orbax's ``_METADATA``: the pytree, and how its arrays are stored."""
    tree = {}
    for name in sorted(specs):
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                # a jax.Array without a sharding is restored only by callers that pass one; this, by all
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(specs[name].shape),
            },
        }
    return json.dumps(
        {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )
