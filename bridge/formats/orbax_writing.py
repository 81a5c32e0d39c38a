"""Writing Orbax checkpoints in bounded memory, through TensorStore, without Orbax.

One zarr directory an array and ``_METADATA``, which every Orbax restores (openpi's 0.11.13 and
today's). Not OCDBT: it names its files at random, and a conversion must give the same bytes
twice. Chunks are at most `CHUNK_BYTES`, cut along the leading axes, so that a reader can take a
layer without the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bridge.formats.location import tensorstore_context
from bridge.specs import Spec

CHUNK_BYTES = 32 << 20
ITEM = "params"


def chunk_shape(spec: Spec) -> tuple[int, ...]:
    """Chunks of at most CHUNK_BYTES: whole where they fit, else cut along the leading axes."""
    chunk = list(spec.shape)
    size = spec.nbytes
    for axis, length in enumerate(chunk):
        if size <= CHUNK_BYTES or length == 0:
            break
        rest = size // length
        chunk[axis] = max(1, CHUNK_BYTES // max(rest, 1))
        size = chunk[axis] * rest
    return tuple(chunk)


@dataclass(frozen=True)
class OrbaxSink:
    """A ``params`` directory whose arrays exist and are filled block by block."""

    params: Path
    specs: Mapping[str, Spec]

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        spec = self.specs[name]
        if array.dtype != spec.dtype or array.shape[1:] != spec.shape[1:]:
            raise ValueError(f"{name} is declared {spec}, and got {Spec(array.shape, array.dtype)}")
        store = _open(str(self.params), name, spec)
        (store if array.shape == spec.shape else store[start : start + len(array)]).write(array).result()

    def finish(self) -> None:
        (self.params / "_METADATA").write_text(_metadata(self.specs))


def create(directory: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> OrbaxSink:
    """Make ``params/`` in a directory. Names are ``/``-joined paths; there is no header."""
    params = directory / ITEM
    params.mkdir()
    for name, spec in specs.items():
        _open(str(params), name, spec)
    return OrbaxSink(params, dict(specs))


@cache
def _open(params: str, name: str, spec: Spec) -> Any:
    import tensorstore as ts

    described = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{params}/{name.replace('/', '.')}/"},
        "dtype": spec.dtype.name,
        "metadata": {
            "shape": list(spec.shape),
            "chunks": [max(size, 1) for size in chunk_shape(spec)],
            "compressor": {"id": "zstd", "level": 1},
        },
        # Orbax takes an absent chunk for a fault
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(described, open=True, create=True, context=tensorstore_context()).result()


def _metadata(specs: Mapping[str, Spec]) -> str:
    """Orbax's ``_METADATA``: the tree, whose leaves are arrays, and how they are stored."""
    tree = {}
    for name in sorted(specs):
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                # a jax.Array without its sharding is restored only by who names one; this, by everyone
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
