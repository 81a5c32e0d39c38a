"""Makes an openpi pi0 checkpoint of true shapes, random weights, in the form training saves it.

    python tests/benchmarks/full_size.py DIRECTORY [LAYERS]

What a LoRA run freezes is bfloat16, what it trains float32; every array is one zstd chunk in
OCDBT, as Orbax writes it. With 18 layers: 3.3 billion parameters, 7.5 GB before compression.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.kit.checkpoints import is_frozen, save_stream, shapes

STOCK = {
    "layers": 18, "heads": 8, "head_dim": 256, "width": 2048, "mlp": 16384,
    "expert_width": 1024, "expert_mlp": 4096, "vocab": 257152, "action_dim": 32,
    "image_layers": 27, "image_heads": 16, "image_head_dim": 72, "image_mlp": 4304,
    "image_tokens": 256, "patch": 14,
}  # fmt: skip
LORA = {"paligemma": 16, "expert": 32}


def weights(shape: tuple[int, ...], frozen: bool, seed: int) -> np.ndarray:
    """Numbers that compress like trained ones: normal, of a weight's size."""
    import ml_dtypes

    random = np.random.Generator(np.random.SFC64(seed))
    size = int(np.prod(shape))
    # one block of normals, shifted: drawing billions would take longer than what is measured
    block = random.standard_normal(min(size, 1 << 24), np.float32) * np.float32(0.02)
    dtype: Any = ml_dtypes.bfloat16 if frozen else np.float32
    out = np.empty(size, dtype)
    # one small scratch: fresh memory costs more than the numbers in it
    scratch = np.empty(min(size, 1 << 20), np.float32)
    for start in range(0, size, len(block)):
        scale = np.float32(1 + start / max(size, 1))
        for at in range(0, min(len(block), size - start), len(scratch)):
            part = block[at : min(at + len(scratch), size - start)]
            out[start + at : start + at + len(part)] = np.multiply(part, scale, out=scratch[: len(part)])
    return out.reshape(shape)


def parameters(layers: int) -> int:
    """How many numbers the checkpoint holds."""
    return sum(math.prod(shape) for shape in _shapes(layers).values())


def make(directory: Path, layers: int = 18, lora: Mapping[str, int] = LORA) -> Path:
    """Write the checkpoint; one array is in memory at a time."""
    every = _shapes(layers, lora)
    arrays = (
        (name, weights(every[name], is_frozen(name, lora), number))
        for number, name in enumerate(sorted(every))
    )
    return save_stream(arrays, directory)


def _shapes(layers: int, lora: Mapping[str, int] = LORA) -> Mapping[str, tuple[int, ...]]:
    sizes = {**STOCK, "layers": layers, "image_layers": 27 * layers // 18}
    return shapes(sizes, "pi0", lora, 1, False)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 18)
