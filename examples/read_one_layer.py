"""Read one layer of one leaf: nothing else of the checkpoint is decoded into memory.

python examples/read_one_layer.py CHECKPOINT [LAYER]
"""

import sys

import bridge

path, *rest = sys.argv[1:]
layer = int(rest[0]) if rest else 0

with bridge.open(path) as checkpoint:
    for name, spec in checkpoint.specs.items():
        if "attn_vec_einsum/" in name:
            row = checkpoint.read(name, layer)
            print(
                f"{name} {spec}: layer {layer} is {row.dtype}{list(row.shape)}, mean {row.mean(dtype='float32'):+.2e}"
            )
