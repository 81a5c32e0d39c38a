"""Load a policy, from any format bridge reads, into a flax nnx module.

    python examples/load_into_nnx.py CHECKPOINT

With openpi the module is `config.model.create(jax.random.key(0))`. This script runs without openpi, so it makes
a module with the checkpoint's own leaves, all zero.
"""

import sys

import jax.numpy as jnp
from flax import nnx

import bridge


def zeros(tree: dict) -> nnx.Dict:
    return nnx.Dict(
        {
            name: zeros(leaf) if isinstance(leaf, dict) else nnx.Param(jnp.zeros_like(leaf))
            for name, leaf in tree.items()
        }
    )


model = zeros(bridge.load_jax(sys.argv[1]))
bridge.load_nnx(model, sys.argv[1])

kernel, bias = model["action_in_proj"]["kernel"], model["action_in_proj"]["bias"]
action_dim, width = kernel.shape
tokens = jnp.ones((1, action_dim)) @ kernel + bias
print(f"{action_dim} actions -> {width}: {tokens.shape}, mean {tokens.mean():+.4f}")
