"""PyTorch checkpoints back as Orbax ones: what Orbax restores, against the leaves they were made from by hand."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

import bridge
from bridge.errors import OutputRefused, Refusal, RouteRefused
from bridge.formats.orbax import sink
from bridge.formats.orbax.sink import OrbaxSink
from bridge.stream import writers
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Tree
from tests.kit.golden import DEAD_HEAD, EMBED_TOKENS, LM_HEAD, State
from tests.kit.layouts import named, write

#: Sizes of heads as every Gemma of openpi and its SigLIP have them: a state_dict needs no config then.
STOCK = {"head_dim": 256, "image_heads": 16}
EMBEDDING = "PaliGemma/llm/embedder/input_embedding"
Q = "PaliGemma/llm/layers/attn/q_einsum/w"
LINEAR = "PaliGemma/llm/layers/mlp/linear"
DOWN = "paligemma_with_expert.paligemma.model.language_model.layers.{}.mlp.down_proj.weight"


CASES = [
    ("pi0", "openpi"),
    ("pi0", "lerobot"),
    ("pi0", "transformers"),
    ("pi05", "openpi"),
    ("pi05", "lerobot"),
]


# PyTorch checkpoints, written without bridge.


def state_of(tree: Tree) -> State:
    """openpi's state_dict of a tree. Nothing uses the dead head: NaN there must disturb nobody."""
    state = golden.by_hand(tree)
    state[DEAD_HEAD] = torch.full_like(state[DEAD_HEAD], torch.nan)
    return state


def written(model: Any, directory: Path, **options: Any) -> tuple[Tree, Path]:
    """A tree without LoRA, and its state_dict in a file."""
    tree = checkpoints.pi0_tree(model=model, lora={}, **STOCK, **options)
    return tree, write(state_of(tree), directory)


@pytest.fixture(scope="module")
def pi0(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path]:
    return written("pi0", tmp_path_factory.mktemp("pi0") / "torch")


# Orbax checkpoints, read without bridge.


def changed(expected: Mapping[str, Any], found: Mapping[str, Any]) -> set[str]:
    """Leaves that only one side has, or whose dtype, shape or bits differ."""
    return golden.differing(
        *(
            {leaf: golden.tensor(np.asarray(array)) for leaf, array in tree.items()}
            for tree in (expected, found)
        )
    )


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def restore_params(params: Path, restore_type: type) -> dict[str, Any]:
    """openpi's `restore_params` (models/model.py), line by line but for where today's Orbax has the metadata."""
    sharding = None
    if restore_type is jax.Array:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with ocp.PyTreeCheckpointer() as checkpointer:
        item = {"params": ocp.PyTreeCheckpointHandler().metadata(params)["params"]}
        restore_args = jax.tree.map(
            lambda _: ocp.ArrayRestoreArgs(sharding=sharding, restore_type=restore_type, dtype=None), item
        )
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
        leaves = flat(checkpointer.restore(params, arguments)["params"])
    if all(leaf.endswith("/value") for leaf in leaves):
        leaves = {leaf.removesuffix("/value"): array for leaf, array in leaves.items()}
    return leaves


def stored_names(output: Path) -> list[str]:
    """Paths of the arrays, as `_METADATA` lists them."""
    described = json.loads((output / "params" / "_METADATA").read_text())["tree_metadata"].values()
    return ["/".join(key["key"] for key in entry["key_metadata"]) for entry in described]


# Import.


@pytest.mark.parametrize("shards", [1, 3], ids=["one file", "shards"])
@pytest.mark.parametrize(("model", "layout"), CASES, ids=["-".join(case) for case in CASES])
def test_every_leaf_comes_back(model: Any, layout: str, shards: int, tmp_path: Path) -> None:
    """From all three families of names; `params/` and `assets/` stand as openpi releases them."""
    tree = checkpoints.pi0_tree(model=model, lora={}, **STOCK)
    source = write(named(state_of(tree), layout), tmp_path / "torch", shards=shards)
    before = golden.files(source)
    plan = bridge.plan(source, tmp_path / "orbax", to="orbax")
    assert plan.loss.name == "EXACT" and plan.inputs.model.name == model
    plan.run()
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()
    assert sorted(path.name for path in (tmp_path / "orbax").iterdir()) == ["assets", "bridge.json", "params"]
    assert golden.files(tmp_path / "orbax" / "assets") == golden.files(source / "assets")
    assert sorted(stored_names(tmp_path / "orbax")) == sorted(f"params/{leaf}" for leaf in tree)
    assert golden.files(source) == before


@pytest.mark.parametrize(
    "forms", [{"fused_qkv": True}, {"heads": 6, "kv_heads": 3}], ids=["fused qkv", "kv heads"]
)
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_the_leaf_of_q_k_and_v_follows_from_the_heads(
    model: Any, forms: dict[str, Any], tmp_path: Path
) -> None:
    """openpi keeps q, k and v in one leaf when there are as many kv heads as heads; PyTorch's names do not tell."""
    tree, source = written(model, tmp_path / "torch", **forms)
    bridge.convert(source, tmp_path / "orbax", to="orbax")
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "names", [[LM_HEAD], [EMBED_TOKENS], [LM_HEAD, EMBED_TOKENS]], ids=["lm", "embed", "both"]
)
def test_the_tied_weight_is_found_under_either_name(names: list[str], shards: int, tmp_path: Path) -> None:
    tree = checkpoints.pi0_tree(lora={}, **STOCK)
    state = state_of(tree)
    embedding = state.pop(LM_HEAD)
    source = write({**state, **dict.fromkeys(names, embedding)}, tmp_path / "torch", shards=shards)
    bridge.convert(source, tmp_path / "orbax", to="orbax")
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()


def test_a_dead_head_may_be_absent(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    tree, source = pi0
    state = golden.read(source)
    del state[DEAD_HEAD]
    bridge.convert(write(state, tmp_path / "torch"), tmp_path / "orbax", to="orbax")
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()


def test_a_dead_head_is_never_read(pi0: tuple[Tree, Path]) -> None:
    plan = bridge.plan(pi0[1], None, to="orbax")
    assert DEAD_HEAD not in {name for step in plan.steps for _, name in step.reads}


# Forms and dtypes.


def test_value_suffix_writes_the_training_form(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    tree, source = pi0
    bridge.convert(source, tmp_path / "orbax", to="orbax", value_suffix=True)
    assert sorted(stored_names(tmp_path / "orbax")) == sorted(f"params/{leaf}/value" for leaf in tree)
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()
    assert changed(tree, restore_params(tmp_path / "orbax" / "params", np.ndarray)) == set()


def test_a_release_becomes_a_training_checkpoint_and_back(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    """From Orbax to Orbax nothing changes but the names."""
    tree, _ = pi0
    saved = checkpoints.save(tree, tmp_path / "release", value_suffix=False, step_dir=False, quick=True)
    bridge.convert(saved, tmp_path / "training", to="orbax", value_suffix=True)
    assert all(name.endswith("/value") for name in stored_names(tmp_path / "training"))
    bridge.convert(tmp_path / "training", tmp_path / "again", to="orbax")
    assert not any(name.endswith("/value") for name in stored_names(tmp_path / "again"))
    for made in ("training", "again"):
        assert changed(tree, checkpoints.restore(tmp_path / made)) == set()
        assert golden.files(tmp_path / made / "assets") == golden.files(saved / "assets")


def test_dtypes_are_kept_leaf_by_leaf(tmp_path: Path) -> None:
    """What a LoRA run froze in bfloat16 stays so, what it trained stays float32."""
    both = {"paligemma": 2, "expert": 2}
    tree = {
        leaf: array.astype(checkpoints._dtype("bfloat16")) if checkpoints.is_frozen(leaf, both) else array
        for leaf, array in checkpoints.pi0_tree(lora={}, **STOCK).items()
    }
    assert {array.dtype.name for array in tree.values()} == {"bfloat16", "float32"}
    source = write(golden.by_hand(tree), tmp_path / "torch")
    plan = bridge.plan(source, tmp_path / "orbax", to="orbax")
    assert plan.dtype == "keep" and plan.loss.name == "EXACT"
    plan.run()
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()


def test_a_leaf_takes_the_widest_dtype_of_its_layers(tmp_path: Path) -> None:
    """A leaf has one dtype, its tensors may have several: keeping values comes before keeping dtypes."""
    tree = checkpoints.pi0_tree(lora={}, **STOCK)
    tree[LINEAR][0] = tree[LINEAR][0].astype(checkpoints._dtype("bfloat16"))
    state = golden.by_hand(tree)
    state[DOWN.format(0)] = state[DOWN.format(0)].to(torch.bfloat16)
    plan = bridge.plan(write(state, tmp_path / "torch"), tmp_path / "orbax", to="orbax")
    plan.run()
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtype_casts(stored: str, dtype: str, tmp_path: Path) -> None:
    """torch's rounding, once; what openpi's runtime holds in float32 is not narrowed below it."""
    tree = checkpoints.pi0_tree(lora={}, dtype=stored, **STOCK)
    source = write(golden.by_hand(tree), tmp_path / "torch")
    plan = bridge.plan(source, tmp_path / "orbax", to="orbax", dtype=dtype)
    exact = dtype in ("float32", stored)
    assert (plan.loss.name == "EXACT") == exact
    plan.run()
    expected = {}
    for leaf, array in tree.items():
        held = "/img/embedding/" in leaf or "pos_embedding" in leaf or ("_norm" in leaf and "/llm/" in leaf)
        wanted = torch.float32 if held else getattr(torch, dtype)
        expected[leaf] = golden.tensor(array).to(wanted)
    found = {leaf: golden.tensor(array) for leaf, array in checkpoints.restore(tmp_path / "orbax").items()}
    assert golden.differing(expected, found) == set()


# How rows are split into heads, which no tensor tells.


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path]:
    """bridge's own output for heads that are not stock, with `config.json` and `bridge.json` beside it."""
    home = tmp_path_factory.mktemp("exported")
    tree = checkpoints.pi0_tree(lora={})
    bridge.convert(
        checkpoints.save(tree, home / "1", quick=True), home / "torch", to="torch-merged", dtype="float32"
    )
    return tree, home / "torch"


def plain(config: Path) -> None:
    """A config that only says what a user can know of the heads."""
    text = {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 11}
    config.write_text(
        json.dumps({"vlm_config": {"text_config": text, "vision_config": {"num_attention_heads": 3}}})
    )


HEADS: dict[str, Callable[[Path], object]] = {
    "bridge.json": lambda at: (at / "config.json").unlink(),
    "config.json": lambda at: (at / "bridge.json").unlink(),
    "config.json by hand": lambda at: ((at / "bridge.json").unlink(), plain(at / "config.json")),
}


@pytest.mark.parametrize("told_by", HEADS)
def test_heads_are_told_by_a_file(exported: tuple[Tree, Path], told_by: str, tmp_path: Path) -> None:
    tree, source = exported
    shutil.copytree(source, tmp_path / "torch")
    HEADS[told_by](tmp_path / "torch")
    bridge.convert(tmp_path / "torch", tmp_path / "orbax", to="orbax")
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()


UNTOLD: dict[str, Callable[[Path], object]] = {
    "no file": lambda at: ((at / "bridge.json").unlink(), (at / "config.json").unlink()),
    "files that say nothing": lambda at: (
        (at / "bridge.json").write_text("[]"),
        (at / "config.json").write_text("{}"),
    ),
    "files of another model": lambda at: (
        (at / "bridge.json").write_text(json.dumps({"sizes": {"paligemma.dim": 12}})),
        (at / "config.json").write_text(json.dumps({"vlm_config": {"text_config": {"head_dim": 12}}})),
    ),
}


@pytest.mark.parametrize("files", UNTOLD)
def test_unknown_heads_are_refused(exported: tuple[Tree, Path], files: str, tmp_path: Path) -> None:
    shutil.copytree(exported[1], tmp_path / "torch")
    UNTOLD[files](tmp_path / "torch")
    says = (
        r"cannot infer paligemma\.dim, paligemma\.group, paligemma\.head, siglip\.dim, siglip\.head "
        r"from tensor shapes"
    )
    refused(tmp_path, says, "config.json")


# What restores it.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path]:
    """An import of mixed dtypes."""
    home = tmp_path_factory.mktemp("made")
    tree = checkpoints.pi0_tree(model="pi05", lora={}, **STOCK)
    tree[Q] = tree[Q].astype(checkpoints._dtype("bfloat16"))
    bridge.convert(write(state_of(tree), home / "torch"), home / "orbax", to="orbax")
    return tree, home / "orbax"


@pytest.mark.parametrize("restore_type", [np.ndarray, jax.Array])
def test_openpi_restores_it(made: tuple[Tree, Path], restore_type: type) -> None:
    """`PyTreeCheckpointer`, the metadata, then `PyTreeRestore` with `restore_args`."""
    restored = restore_params(made[1] / "params", restore_type)
    assert all(isinstance(array, restore_type) for array in restored.values())
    assert changed(made[0], restored) == set()


def test_orbax_restores_it_unasked(made: tuple[Tree, Path]) -> None:
    """No metadata, no sharding, no types given."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert changed(made[0], flat(checkpointer.restore(made[1] / "params")["params"])) == set()
    with ocp.StandardCheckpointer() as checkpointer:
        assert changed(made[0], flat(checkpointer.restore(made[1] / "params")["params"])) == set()


@pytest.mark.parametrize("asked", [None, np.ndarray, jax.Array], ids=["unasked", "numpy", "jax"])
@pytest.mark.parametrize("at", ["params", "."])
def test_orbax_v1_loads_it(made: tuple[Tree, Path], at: str, asked: type | None) -> None:
    """`load` of Orbax v1 from `params`, or from the directory that holds it; into what is asked for."""
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    load = getattr(v1, "load", None) or v1.load_pytree
    nested: dict[str, Any] = {}
    for leaf, array in made[0].items():
        *parents, last = f"params/{leaf}".split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        node[last] = like if asked is jax.Array else np.empty_like(array)
    loaded = load(made[1] / at) if asked is None else load(made[1] / at, nested)
    leaves = flat(loaded["params"])
    assert changed(made[0], leaves) == set()
    assert asked is None or all(isinstance(array, asked) for array in leaves.values())


def test_zeros_are_stored(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    """A leaf of zeros has its chunk like any other: Orbax and bridge take an absent one for a loss."""
    tree = {**pi0[0], "state_proj/bias": np.zeros_like(pi0[0]["state_proj/bias"])}
    bridge.convert(write(state_of(tree), tmp_path / "torch"), tmp_path / "orbax", to="orbax")
    assert (tmp_path / "orbax" / "params" / "params.state_proj.bias" / "0").is_file()
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()
    assert changed(tree, pure(bridge.load_jax(tmp_path / "orbax"))) == set()


def test_bridge_reads_it(made: tuple[Tree, Path]) -> None:
    """Its own output is a source like any other, and has no problems."""
    described = bridge.describe(made[1])
    assert described.problems == ()
    state = golden.by_hand(made[0])
    back = bridge.load_torch(made[1], dtype="keep")
    live = {name: weight for name, weight in state.items() if name != DEAD_HEAD}
    assert golden.differing(live, {name: back[name] for name in live}) == set()


# In bounded memory.

CHUNKS = {
    # bytes. A layer of q is 93 kB, a row of the embedding 52 B, of `linear` 988 B
    "rows": 4096,
    "no row divides it": 1000,
    "less than a row": 40,
}


@pytest.mark.parametrize("how", CHUNKS)
@pytest.mark.parametrize("origin", ["torch", "orbax"])
def test_large_leaves_are_written_by_rows_in_small_chunks(
    origin: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = CHUNKS[how]
    tree = checkpoints.pi0_tree(lora={}, layers=3, vocab=101)
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    if origin == "torch":
        bridge.convert(source, tmp_path / "torch", to="torch-merged", dtype="float32")
        source = tmp_path / "torch"
    monkeypatch.setattr(sink, "RUN_BYTES", chunk)
    monkeypatch.setattr(writers, "RUN_BYTES", chunk)
    runs: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    original = OrbaxSink.write

    def write(self: OrbaxSink, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        runs.setdefault(name, []).append((at or (0,) * array.ndim, array.size))
        original(self, name, array, at)

    monkeypatch.setattr(OrbaxSink, "write", write)
    bridge.convert(source, tmp_path / "orbax", to="orbax")
    assert changed(tree, checkpoints.restore(tmp_path / "orbax")) == set()

    sizes = [size for _, size in runs[f"params/{EMBEDDING}"]]
    assert sum(sizes) == 101 * 13 and max(sizes) * 4 <= chunk < (max(sizes) + 13) * 4
    for name, written in runs.items():
        begins = [at for at, _ in written]
        assert begins == sorted(set(begins)), name  # in order, nothing twice
    for name in stored_names(tmp_path / "orbax"):
        described = json.loads(
            (tmp_path / "orbax" / "params" / name.replace("/", ".") / ".zarray").read_text()
        )
        size = np.prod(described["chunks"]) * 4
        assert size <= chunk
        # cut along the leading axes: behind the first axis that is cut, all are whole
        behind = [c == s for c, s in zip(described["chunks"], described["shape"], strict=True)]
        first = next((n for n, c in enumerate(described["chunks"]) if c > 1), len(behind))
        assert all(behind[first + 1 :])


def test_a_chunk_is_32_megabytes_at_most() -> None:
    from bridge.arrays import BFLOAT16, FLOAT32, Spec

    assert sink.RUN_BYTES == writers.RUN_BYTES == 32 << 20
    for shape, dtype in (
        ((257152, 2048), FLOAT32),
        ((257152, 2048), BFLOAT16),
        ((18, 2, 2048, 16384), FLOAT32),
        ((18, 16384, 2048), FLOAT32),
        ((18, 8, 2048, 256), FLOAT32),
        ((3,), FLOAT32),
        ((), FLOAT32),
        ((2, 0, 5), FLOAT32),
    ):
        chunk = sink.chunk_shape(Spec(shape, dtype))
        assert Spec(chunk, dtype).nbytes <= 32 << 20
        assert len(chunk) == len(shape) and all(c <= s for c, s in zip(chunk, shape, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16", "value_suffix": True}], ids=["plain", "options"]
)
def test_two_runs_write_the_same_bytes(
    pi0: tuple[Tree, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    """Every file, `bridge.json` too, however many workers there are."""
    for workers in (1, 5):
        bridge.convert(pi0[1], tmp_path / str(workers), to="orbax", workers=workers, **options)
    first = golden.files(tmp_path / "1")
    assert first == golden.files(tmp_path / "5")
    assert {"bridge.json", "params/_METADATA"} < first.keys()


# In memory.


def pure(tree: Mapping[str, Any]) -> dict[str, Any]:
    leaves = flat(tree)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
    return leaves


def test_load_jax_gives_one_pure_dict_from_every_format(tmp_path: Path) -> None:
    """From Orbax, from PyTorch, from an adapter and its base: as openpi's restore gives it."""
    tree = checkpoints.pi0_tree(lora={"paligemma": 16, "expert": 32}, frozen_dtype="bfloat16")
    base = {leaf: array for leaf, array in tree.items() if "lora" not in leaf}
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(source, tmp_path / "adapter", to="peft-adapter")
    bridge.convert(source, tmp_path / "base", to="torch-base")
    bridge.convert(tmp_path / "base", tmp_path / "orbax", to="orbax", value_suffix=True)
    adapter = tmp_path / "adapter"

    assert changed(tree, pure(bridge.load_jax(source))) == set()
    assert changed(base, pure(bridge.load_jax(tmp_path / "base"))) == set()
    assert changed(base, pure(bridge.load_jax(tmp_path / "orbax"))) == set()
    for number, (path, options) in enumerate(
        (
            (adapter, {"base": tmp_path / "base"}),
            (adapter, {"base": tmp_path / "orbax"}),
            (adapter, {"base": tmp_path / "base", "fold": True}),
            (tmp_path / "base", {"dtype": "bfloat16"}),
            (adapter, {"base": tmp_path / "base", "rank": {"paligemma": 20}, "lora_alpha": 5.0}),
        )
    ):
        loaded = pure(bridge.load_jax(path, **options))
        bridge.convert(path, tmp_path / f"out-{number}", to="orbax", **options)
        assert changed(checkpoints.restore(tmp_path / f"out-{number}"), loaded) == set()
    with pytest.raises(RouteRefused, match="read as it is"):
        bridge.load_jax(source, dtype="float32")


# Whole or not at all.


def siblings(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir()) if output.parent.is_dir() else []


def nan(at: str) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        state[at].reshape(-1)[-1] = torch.nan

    return spoil


def stop(progress: int, total: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failure", ["a value", "the user", "the last file"])
def test_a_failure_midway_leaves_what_was_there(
    pi0: tuple[Tree, Path], failure: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing where nothing was; an older Orbax checkpoint of bridge stands as it stood."""
    output = tmp_path / "new" / "orbax"
    if overwrite:
        bridge.convert(pi0[1], output, to="orbax", dtype="bfloat16")
    before = golden.files(tmp_path)
    source, options, kind = pi0[1], {"to": "orbax", "overwrite": overwrite}, Refusal
    if failure == "a value":
        state = golden.read(pi0[1])
        nan(DOWN.format(3))(state)
        source = write(state, tmp_path / "torch")
        before = golden.files(tmp_path)
    elif failure == "the user":
        options["progress"], kind = stop, KeyboardInterrupt
    else:
        monkeypatch.setattr(OrbaxSink, "finish", lambda self: (_ for _ in ()).throw(OSError(28, "full")))
        kind = OutputRefused
    with pytest.raises(kind) as caught:
        bridge.convert(source, output, **options)
    if failure == "a value":
        check_words(caught.value)
        assert "linear contains NaN or infinite values (layer 3)" in str(caught.value)
    assert golden.files(tmp_path) == before
    assert siblings(output) == (["orbax"] if overwrite else [])
    assert (tmp_path / "new").is_dir() == overwrite


def test_the_old_output_stands_until_the_new_one_is_whole(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    """Overwritten, it can be read to the last byte of the new one; then it is gone without a trace."""
    output = tmp_path / "orbax"
    bridge.convert(pi0[1], output, to="orbax", dtype="bfloat16")
    old, seen = golden.files(output), []

    def look(count: int, total: int) -> None:
        seen.append(count == total)
        assert golden.files(output) == old

    bridge.convert(pi0[1], output, to="orbax", overwrite=True, progress=look)
    assert seen[-1] and siblings(output) == ["orbax"]
    assert changed(pi0[0], checkpoints.restore(output)) == set()
    assert old.keys() == golden.files(output).keys()


# Refusals.


def check_words(refusal: Refusal) -> None:
    """One line of cause, one of what to do, nothing said twice."""
    for problem in refusal.problems:
        assert problem.cause and "\n" not in problem.cause and len(problem.cause) < 700, problem.cause
        assert problem.fix and "\n" not in problem.fix
    assert len(set(refusal.problems)) == len(refusal.problems), "said twice"


def refused(tmp_path: Path, says: str, fix: str = "", **options: Any) -> Refusal:
    """Convert `tmp_path / "torch"`: refused, and nothing has changed anywhere."""
    before = golden.files(tmp_path)
    with pytest.raises(Refusal, match=says) as caught:
        bridge.convert(tmp_path / "torch", tmp_path / "made" / "orbax", **{"to": "orbax", **options})
    check_words(caught.value)
    assert fix in str(caught.value)
    assert golden.files(tmp_path) == before and not (tmp_path / "made").exists()
    return caught.value


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    return lambda state: state.update({name: change(state[name])})


Q_PROJ = "paligemma_with_expert.paligemma.model.language_model.layers.2.self_attn.q_proj.weight"

BAD: dict[str, tuple[Callable[[State], object], str, str]] = {
    "a layer lost": (
        lambda s: s.pop(DOWN.format(1)),
        r"layers\.1\.mlp\.down_proj\.weight is missing",
        "copy",
    ),
    "a tensor lost": (
        lambda s: s.pop("state_proj.bias"),
        r"tensor state_proj\.bias of pi0 is missing",
        "copy",
    ),
    "the embedding lost": (lambda s: s.pop(LM_HEAD), r"lm_head\.weight of pi0 is missing", "copy"),
    "a stranger": (
        lambda s: s.update({"value_head.weight": torch.zeros(2, 2)}),
        r"tensor value_head\.weight is not part of pi0",
        "declare it",
    ),
    "transposed": (replaced(DOWN.format(0), lambda w: w.T), r"down_proj\.weight: paligemma\.\w+ is", "mixes"),
    "rows cut": (
        replaced(Q_PROJ, lambda w: w[:-256]),
        r"q_proj\.weight: paligemma\.head x paligemma\.dim",
        "mixes",
    ),
    "an axis more": (
        replaced("state_proj.bias", lambda w: w[None]),
        r"state_proj\.bias has 2 axes \[1, 17\]",
        "",
    ),
    "integers": (
        replaced("state_proj.bias", lambda w: w.to(torch.int8)),
        r"state_proj\.bias has dtype int8",
        "bfloat16",
    ),
    "not finite": (
        nan(LM_HEAD),
        r"input_embedding contains NaN or infinite values",
        "copy the checkpoint again",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused(pi0: tuple[Tree, Path], name: str, tmp_path: Path) -> None:
    spoil, says, fix = BAD[name]
    state = state_of(pi0[0])
    spoil(state)
    write(state, tmp_path / "torch")
    refused(tmp_path, says, fix)


@pytest.mark.parametrize("known", [True, False], ids=["stock heads", "unknown heads"])
def test_layers_whose_heads_differ_are_refused(known: bool, tmp_path: Path) -> None:
    """Even where nothing tells how many heads a layer has, it must have as many as the others."""
    tree = checkpoints.pi0_tree(lora={}, **(STOCK if known else {}))
    state = golden.by_hand(tree)
    rows = 256 if known else 11
    state[Q_PROJ] = state[Q_PROJ][:-rows]
    write(state, tmp_path / "torch")
    refused(tmp_path, r"layers\.2\.self_attn\.q_proj\.weight: paligemma\.head")


def test_values_too_large_for_the_dtype_are_refused(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    state = state_of(pi0[0])
    state[LM_HEAD][0, 0] = 1e30
    write(state, tmp_path / "torch")
    refused(tmp_path, "input_embedding overflows float16", "--dtype float32", dtype="float16")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layout": "lerobot"}, r"--layout has no effect with --to orbax"),
        ({"keep_alpha": True}, r"--keep-alpha has no effect with --to orbax"),
        ({"with_base": True}, r"--with-base has no effect with --to orbax"),
        ({"modules_to_save": True}, r"--modules-to-save has no effect with --to orbax"),
        ({"rank": 4}, r"--rank has no effect from torch-merged\[base\] to orbax\[base\]"),
        ({"lossy": True}, r"--lossy has no effect from torch-merged\[base\] to orbax\[base\]"),
        ({"dtype": "float64"}, r"--dtype is float64"),
        ({"lora_alpha": 4.0}, r"--lora-alpha is given, but there are no scaled LoRA factors"),
        ({"rslora": True}, r"--rslora is given, but there are no scaled LoRA factors"),
        ({"to": "torch-merged", "value_suffix": True}, r"no route|--value-suffix has no effect"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_say_nothing_are_refused(
    pi0: tuple[Tree, Path], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "torch").symlink_to(pi0[1])
    refused(tmp_path, says, **options)


def test_a_destination_in_the_way_is_refused(pi0: tuple[Tree, Path], tmp_path: Path) -> None:
    output = tmp_path / "orbax"
    bridge.convert(pi0[1], output, to="orbax")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("not bridge's")
    before = golden.files(tmp_path)
    for where, overwrite, says in (
        (output, False, "exists"),
        (tmp_path / "other", True, "was not written by bridge"),
        (output / "params" / "inside", False, "params is not|inside"),
    ):
        source = output if where.parent == output / "params" else pi0[1]
        with pytest.raises(Refusal, match=says) as caught:
            bridge.convert(source, where, to="orbax", overwrite=overwrite)
        check_words(caught.value)
        assert golden.files(tmp_path) == before
