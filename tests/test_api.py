"""The public names: there, documented, and still there whatever is imported first."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bridge
from bridge.errors import CheckpointRefused
from tests.kit import checkpoints, golden
from tests.kit.forms import Forms

VERBS = [
    "convert",
    "describe",
    "diff",
    "load_jax",
    "load_nnx",
    "load_torch",
    "open",
    "plan",
    "run",
    "verify",
]
BARE = (int, float, str, bytes)


def isolated(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("name", bridge.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(bridge, name)
    assert value is getattr(bridge, name)
    assert name in dir(bridge)
    assert isinstance(value, BARE) or value.__module__.startswith("bridge.")


def test_verbs_stay_callable_whatever_is_imported_first() -> None:
    """`bridge.verify` is the function, though a module of that name exists somewhere below."""
    homes = sorted({f"bridge.{home}" for home in bridge._HOMES})
    run = isolated(
        f"import importlib, bridge\nfor home in {homes!r}: importlib.import_module(home)\n"
        f"wrong = [verb for verb in {VERBS!r} if not callable(getattr(bridge, verb))]\n"
        "assert not wrong, wrong"
    )
    assert run.returncode == 0, run.stderr


def test_no_module_bears_the_name_of_a_public_name() -> None:
    inside = {path.stem for path in Path(bridge.__file__).parent.iterdir()}
    assert not inside & set(bridge.__all__)


def test_importing_bridge_imports_nothing_else() -> None:
    run = isolated(
        "import sys, bridge\n"
        "heavy = {'numpy', 'jax', 'torch', 'flax', 'peft', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert run.returncode == 0, run.stderr


def test_help_imports_no_numpy() -> None:
    run = isolated(
        "import sys; sys.argv = ['bridge', '--help']\n"
        "from bridge.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'numpy' not in sys.modules"
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_documented(verb: str) -> None:
    """With every argument, what comes of it, what is refused, and an example."""
    function: Callable[..., Any] = getattr(bridge, verb)
    doc = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        assert f"    {stars}{name} (`" in doc or (stars and f"    {stars}{name}: " in doc), name
    sections = ("Args:", "Raises:", "Example:", *(() if verb == "load_nnx" else ("Returns:",)))
    assert all(f"\n{section}\n" in doc for section in sections)
    home = import_module(function.__module__)
    assert getattr(home, verb) is function


def test_option_types_are_documented_from_their_declarations() -> None:
    for options in (bridge.Options, bridge.SourceOptions, bridge.VerifyOptions):
        assert "    workers: Worker threads." in (options.__doc__ or "").splitlines()


# A policy in a flax nnx module.


@pytest.fixture(scope="module")
def source() -> golden.Golden:
    return golden.golden("pi0_lora")


@pytest.fixture(scope="module")
def forms(source: golden.Golden, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(source, tmp_path_factory.mktemp("forms"))


class Policy(nnx.Module):
    """A module with a parameter for every leaf: dicts below a module, as openpi's `Pi0` has them."""

    def __init__(self, leaves: dict[str, Any], dtype: Any = None) -> None:
        for name, value in nested(leaves, dtype).items():
            setattr(self, name, value)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))


def nested(leaves: dict[str, Any], dtype: Any = None) -> dict[str, Any]:
    top: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for leaf, array in leaves.items():
        first, _, rest = leaf.partition("/")
        if rest:
            groups.setdefault(first, {})[rest] = array
        else:
            top[first] = nnx.Param(np.full(array.shape, 7, dtype or array.dtype))
    return top | {name: nnx.Dict(nested(group, dtype)) for name, group in groups.items()}


def values(module: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def test_every_leaf_is_loaded(source: golden.Golden) -> None:
    module = Policy(source.leaves)
    bridge.load_nnx(module, source.checkpoint)
    loaded = values(module)
    assert loaded.keys() == source.leaves.keys() and any("lora_a" in leaf for leaf in loaded)
    for leaf, array in source.leaves.items():
        assert loaded[leaf].dtype == array.dtype and np.array_equal(loaded[leaf], array), leaf
    assert module.count[...] == 0


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_other_formats_are_converted(form: str, source: golden.Golden, forms: Forms) -> None:
    """Into the same leaves as load_jax gives."""
    options = {"base": forms[form].base} if form == "adapter" else {}
    expected = checkpoint_leaves(bridge.load_jax(forms[form].path, **options))
    module = Policy(expected)
    bridge.load_nnx(module, forms[form].path, **options)
    loaded = values(module)
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[leaf], expected[leaf]) for leaf in expected)


def checkpoint_leaves(tree: dict[str, Any], path: str = "") -> dict[str, np.ndarray]:
    leaves: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= checkpoint_leaves(value, f"{path}{name}/")
        else:
            leaves[f"{path}{name}"] = np.asarray(value)
    return leaves


def test_values_are_cast_to_the_dtypes_of_the_module(source: golden.Golden) -> None:
    module = Policy(source.leaves, jnp.bfloat16)
    bridge.load_nnx(module, source.checkpoint)
    loaded = values(module)
    assert {array.dtype.name for array in loaded.values()} == {"bfloat16"}
    assert all(np.array_equal(loaded[k], v.astype(loaded[k].dtype)) for k, v in source.leaves.items())


def test_an_abstract_module_gets_arrays(source: golden.Golden) -> None:
    module = nnx.eval_shape(lambda: Policy(source.leaves))
    bridge.load_nnx(module, source.checkpoint)
    loaded = values(module)
    assert all(np.array_equal(loaded[leaf], array) for leaf, array in source.leaves.items())


class Numbered(nnx.Module):
    """Layers by number, as an unstacked module has them."""

    def __init__(self) -> None:
        self.layers = nnx.List([nnx.Dict({"w": nnx.Param(jnp.zeros((2, 3)))}) for _ in range(3)])


def test_numbers_in_paths_are_text() -> None:
    from bridge.nnx_arrays import assign, parameters

    module = Numbered()
    assert {leaf: spec.shape for leaf, spec in parameters(module).items()} == {
        f"layers/{number}/w": (2, 3) for number in range(3)
    }
    assign(module, {"layers/1/w": np.ones((2, 3), np.float32)})
    assert [float(layer["w"][...].sum()) for layer in module.layers] == [0, 6, 0]


def refused(module: nnx.Module, path: Path, **options: Any) -> bridge.Refusal:
    """What is said, the module being as it was."""
    before = values(module)
    with pytest.raises(bridge.Refusal) as refusal:
        bridge.load_nnx(module, path, **options)
    after = values(module)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[leaf], after[leaf]) for leaf in before)
    return refusal.value


def test_leaves_that_are_not_the_same_are_refused_together(source: golden.Golden) -> None:
    leaves = dict(source.leaves)
    factors = [leaf for leaf in leaves if "mlp_1" in leaf and "lora" in leaf]
    for leaf in factors:
        del leaves[leaf]
    leaves |= {f"extra/{number}/w": np.zeros(2, np.float32) for number in range(4)}
    bias = leaves["action_in_proj/bias"]
    leaves["action_in_proj/bias"] = np.zeros(len(bias) + 1, np.float32)
    causes = [problem.cause for problem in refused(Policy(leaves), source.checkpoint).problems]
    start = f"{source.checkpoint}: leaf "
    assert sorted(causes) == sorted(
        [
            f"{start}action_in_proj/bias has shape {list(bias.shape)} in the checkpoint but [{len(bias) + 1}] "
            "in the module",
            f"{start}extra/{{0..3}}/w is in the module but not in the checkpoint",
            *(f"{start}{leaf} is in the checkpoint but not in the module" for leaf in factors),
        ]
    )


def test_a_module_of_integers_is_refused(source: golden.Golden) -> None:
    said = str(refused(Policy(source.leaves, jnp.int8), source.checkpoint))
    assert "action_in_proj/bias is int8 in the module, not a dtype of weights" in said


def test_values_too_large_for_the_module_are_refused(source: golden.Golden, tmp_path: Path) -> None:
    from tests.kit import checkpoints

    large = {leaf: array.copy() for leaf, array in source.leaves.items()}
    large["action_in_proj/bias"][0] = 70000.0
    path = checkpoints.save(large, tmp_path / "1", quick=True)
    (problem,) = refused(Policy(large, jnp.float16), path).problems
    assert "action_in_proj/bias has values too large for the module's float16" in problem.cause


def test_options_that_have_no_effect_are_refused(source: golden.Golden) -> None:
    module = Policy(source.leaves)
    assert "dtype has no effect" in str(refused(module, source.checkpoint, dtype="float32"))
    assert "leave out rank" in str(refused(module, source.checkpoint, rank=4))
    bridge.load_nnx(module, source.checkpoint, rank=None, fold=False)
    with pytest.raises(TypeError, match="'rnak' is not an option"):
        bridge.load_nnx(module, source.checkpoint, rnak=4)


def test_load_jax_refuses_a_checkpoint_with_problems(tmp_path: Path) -> None:
    """As a conversion does, with every problem: a tree that lacks a leaf is no model."""
    tree = checkpoints.pi0_tree(lora={}, layers=2)
    del tree["action_in_proj/bias"]
    tree["extra/kernel"] = np.ones(3, np.float32)
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    with pytest.raises(CheckpointRefused) as refused:
        bridge.load_jax(source)
    causes = [problem.cause for problem in refused.value.problems]
    assert any("leaf action_in_proj/bias of pi0 is missing" in cause for cause in causes)
    assert any("leaf extra/kernel is not part of pi0" in cause for cause in causes)
