"""Put a policy, from any format bridge reads, into a flax nnx module.

    python examples/load_into_nnx.py CHECKPOINT

The module here is pi0's action projection; openpi's `Pi0` takes the whole pure dict the same way.
"""

import sys

import jax.numpy as jnp
from flax import nnx

import bridge

params = bridge.load_jax(sys.argv[1])


class Projections(nnx.Module):
    def __init__(self, action_dim: int, width: int, rngs: nnx.Rngs) -> None:
        self.action_in_proj = nnx.Linear(action_dim, width, rngs=rngs)
        self.action_out_proj = nnx.Linear(width, action_dim, rngs=rngs)


action_dim, width = params["action_in_proj"]["kernel"].shape
module = Projections(action_dim, width, nnx.Rngs(0))

state = nnx.state(module)
nnx.replace_by_pure_dict(state, {name: params[name] for name in ("action_in_proj", "action_out_proj")})
nnx.update(module, state)

tokens = module.action_in_proj(jnp.ones((1, action_dim)))
print(f"{action_dim} actions -> {width}: {tokens.shape}, mean {tokens.mean():+.4f}")
