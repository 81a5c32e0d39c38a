"""Record what openpi's JAX model does with one observation, for `bridge verify --full-model --reference`.

Runs in openpi's own environment, on what `scripts/serve_policy.py --record` noted of a running policy:

    python record_actions.py CONFIG_NAME CHECKPOINT_DIR policy_records/step_0.npy reference.npz

and then, in bridge's:

    bridge convert --to torch-merged CHECKPOINT_DIR my_policy
    bridge verify --full-model --reference reference.npz CHECKPOINT_DIR my_policy
"""

import dataclasses
import sys

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from openpi.models import model as models
from openpi.policies import policy_config
from openpi.shared import download, nnx_utils
from openpi.training import config as configs

config_name, checkpoint, step, reference = sys.argv[1:]
config, checkpoint = configs.get_config(config_name), download.maybe_download(checkpoint)

# What the robot sent. openpi's DROID and LIBERO policies take names with slashes, ALOHA's takes nested ones.
recorded = np.load(step, allow_pickle=True).item()
sent = {name.removeprefix("inputs/"): value for name, value in recorded.items() if name.startswith("inputs/")}
if not any(name.startswith("observation/") for name in sent):
    sent = flax.traverse_util.unflatten_dict(sent, sep="/")

# What the model is given for it: the policy's own transforms, with the checkpoint's norm stats.
transform = policy_config.create_trained_policy(config, checkpoint)._input_transform
inputs = jax.tree.map(lambda value: jnp.asarray(value)[None], transform(sent))
observation = models.preprocess_observation(None, models.Observation.from_dict(inputs), train=False)

# The policy computes in bfloat16, which is too coarse to compare by: the same weights once more, in float32.
jax.config.update("jax_default_matmul_precision", "highest")
params = models.restore_params(checkpoint / "params", dtype=jnp.float32)
model = dataclasses.replace(config.model, dtype="float32").load(params)
noise = jax.random.normal(jax.random.key(0), (1, model.action_horizon, model.action_dim))
sample = nnx_utils.module_jit(model.sample_actions)
actions = sample(jax.random.key(0), observation, num_steps=10, noise=noise)

arrays = {
    "state": observation.state,
    "tokenized_prompt": observation.tokenized_prompt,
    "tokenized_prompt_mask": observation.tokenized_prompt_mask,
    "noise": noise,
    "actions": actions,
    **{f"image/{camera}": image for camera, image in observation.images.items()},
    **{f"image_mask/{camera}": mask for camera, mask in observation.image_masks.items()},
}
np.savez_compressed(reference, **{name: np.asarray(array) for name, array in arrays.items()})
print(
    f"{reference}: {actions.shape[1]} actions of {actions.shape[2]} numbers, up to {np.abs(actions).max():.3g}"
)
