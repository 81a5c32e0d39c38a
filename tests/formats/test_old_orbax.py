"""bridge's Orbax outputs, restored by the Orbax that openpi pins (0.11.13), as openpi's own loader does it."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Tree

pytestmark = pytest.mark.old_orbax

#: openpi's `restore_params` (models/model.py) on every directory given, to numpy and to jax arrays.
#: numpy's files know no bfloat16: its bits are stored, and the dtypes beside them.
SCRIPT = """
import importlib.metadata, json, sys
import jax, numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

def restore_params(params_path, restore_type, sharding=None):
    if restore_type is jax.Array and sharding is None:
        mesh = jax.sharding.Mesh(jax.devices(), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with ocp.PyTreeCheckpointer() as ckptr:
        metadata = ckptr.metadata(params_path)
        item = {"params": metadata["params"]}
        params = ckptr.restore(
            params_path,
            ocp.args.PyTreeRestore(
                item=item,
                restore_args=jax.tree.map(
                    lambda _: ocp.ArrayRestoreArgs(sharding=sharding, restore_type=restore_type, dtype=None), item
                ),
            ),
        )["params"]
    flat_params = traverse_util.flatten_dict(params)
    if all(kp[-1] == "value" for kp in flat_params):
        flat_params = {kp[:-1]: v for kp, v in flat_params.items()}
    return flat_params

def bare(params_path):
    with ocp.PyTreeCheckpointer() as ckptr:
        return traverse_util.flatten_dict(ckptr.restore(params_path)["params"])

arrays, dtypes = {}, {}
for name, path in json.loads(sys.argv[1]).items():
    for kind, restored in (
        ("numpy", restore_params(path, np.ndarray)),
        ("jax", restore_params(path, jax.Array)),
        ("bare", bare(path)),
    ):
        for key, leaf in restored.items():
            assert kind == "bare" or isinstance(leaf, np.ndarray if kind == "numpy" else jax.Array), type(leaf)
            key = "|".join((name, kind, "/".join(key)))
            leaf = np.asarray(leaf)
            dtypes[key] = leaf.dtype.name
            arrays[key] = leaf.view(np.uint16) if leaf.dtype.name == "bfloat16" else leaf
np.savez(sys.argv[2], **arrays)
packages = ("orbax-checkpoint", "tensorstore", "jax")
print(json.dumps({"dtypes": dtypes, "versions": [importlib.metadata.version(each) for each in packages]}))
"""

RANK = {"paligemma": 5, "expert": 3}
ALPHA = {"paligemma": 8.0, "expert": 4.5}

CASES: dict[str, tuple[dict[str, Any], bool]] = {
    # name: (the checkpoint, whether it is written as training saves it)
    "import pi0": ({"lora": {}}, False),
    "import pi0 in training's form": ({"lora": {}}, True),
    "import pi05": ({"lora": {}, "model": "pi05"}, False),
    "join pi0": ({"lora": RANK, "frozen_dtype": "bfloat16"}, False),
    "join pi0 in training's form": ({"lora": RANK, "frozen_dtype": "bfloat16"}, True),
    "join pi05 in training's form": ({"lora": RANK, "model": "pi05", "fused_qkv": True}, True),
}


@dataclass(frozen=True)
class Restored:
    """What the old Orbax gave, by case and kind, and what bridge was told to write."""

    expected: dict[str, Tree]
    found: dict[tuple[str, str], Tree]
    versions: list[str]


def make(home: Path, tree: Tree, *, suffix: bool) -> Path:
    """An output of bridge that must restore to `tree`, but for the heads of `attn_vec_einsum`'s factors."""
    source = checkpoints.save(tree, home / "1", quick=True)
    if any("lora" in leaf for leaf in tree):
        bridge.convert(source, home / "adapter", to="peft-adapter", keep_alpha=True, lora_alpha=ALPHA)
        bridge.convert(source, home / "base", to="torch-base")
        plan: dict[str, Any] = {"src": home / "adapter", "base": home / "base"}
    else:
        bridge.convert(source, home / "torch", to="torch-merged", dtype="keep")
        plan = {"src": home / "torch"}
    bridge.convert(dst=home / "orbax", to="orbax", value_suffix=suffix, **plan)
    return home / "orbax" / "params"


@pytest.fixture(scope="module")
def restored(old_orbax_python: str, tmp_path_factory: pytest.TempPathFactory) -> Restored:
    home = tmp_path_factory.mktemp("old")
    expected: dict[str, Tree] = {}
    paths = {}
    for name, (options, suffix) in CASES.items():
        tree = checkpoints.pi0_tree(**options)
        tree["action_out_proj/bias"][:] = 0  # zeros are stored as well
        paths[name] = str(make(home / name.replace(" ", "-"), tree, suffix=suffix))
        for leaf, array in tree.items():
            if "attn_vec_einsum" in leaf and leaf.endswith("lora_b"):
                summed = np.zeros_like(array)
                summed[:, 0] = array.sum(axis=1)
                tree[leaf] = summed
        expected[name] = tree
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    ran = subprocess.run(
        [old_orbax_python, "-c", SCRIPT, json.dumps(paths), str(home / "restored.npz")],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    said = json.loads(ran.stdout.splitlines()[-1])
    found: dict[tuple[str, str], Tree] = {}
    for key, array in np.load(home / "restored.npz").items():
        name, kind, leaf = key.split("|")
        dtype = checkpoints._dtype(said["dtypes"][key])
        found.setdefault((name, kind), {})[leaf] = array.view(dtype) if dtype.name == "bfloat16" else array
    return Restored(expected, found, said["versions"])


def test_the_environment_is_openpis(restored: Restored) -> None:
    assert restored.versions == ["0.11.13", "0.1.74", "0.5.3"]


@pytest.mark.parametrize("kind", ["numpy", "jax", "bare"])
@pytest.mark.parametrize("name", CASES)
def test_it_restores_bit_for_bit(restored: Restored, name: str, kind: str) -> None:
    """As numpy and as jax arrays by openpi's loader; and bare, with no types or shardings given."""
    found, ending = restored.found[name, kind], "/value"
    if kind == "bare":  # openpi's loader drops the level itself
        assert all(leaf.endswith(ending) == CASES[name][1] for leaf in found)
        found = {leaf.removesuffix(ending): array for leaf, array in found.items()}
    expected, got = (
        {leaf: golden.tensor(array) for leaf, array in tree.items()}
        for tree in (restored.expected[name], found)
    )
    assert golden.differing(expected, got) == set()
