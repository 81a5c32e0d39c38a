"""Load a policy, from any format bridge reads, into a flax nnx module.

    python examples/load_into_nnx.py CHECKPOINT

With openpi the module is `nnx.eval_shape(config.model.create, jax.random.key(0))`: no memory is taken before it
is loaded. This script runs without openpi, so it makes a module of the checkpoint's own leaves.
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


params = bridge.load_jax(sys.argv[1])
model = nnx.eval_shape(lambda: zeros(params))
bridge.load_nnx(model, sys.argv[1])

kernel, bias = model["action_in_proj"]["kernel"], model["action_in_proj"]["bias"]
action_dim, width = kernel.shape
tokens = jnp.ones((1, action_dim)) @ kernel + bias
print(f"{action_dim} actions -> {width}: {tokens.shape}, mean {tokens.mean():+.4f}")
