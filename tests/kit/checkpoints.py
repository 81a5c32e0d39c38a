"""Small, complete openpi checkpoints: their trees, the ways Orbax stores them, Orbax as reader.

Only numpy is imported here; Orbax, JAX and TensorStore are imported by what needs them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
Tree: TypeAlias = dict[str, Array]
Layout: TypeAlias = Literal["ocdbt", "ocdbt-zarr3", "zarr", "zarr3"]

LORA: Mapping[str, int] = {"paligemma": 5, "expert": 3}

# OCDBT's settings as Orbax makes them.
CONFIG: dict[str, Any] = {
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,
    "manifest_kind": "single",
}

# Almost all primes, and no two axes of a leaf alike unless the architecture (2 for k|v and gate|up,
# 3 for RGB and q|k|v) makes them so: a wrong axis order does not pass as a reshape.
DIMS: Mapping[str, int] = {
    "layers": 4,
    "heads": 7,
    "head_dim": 11,
    "width": 13,
    "mlp": 19,
    "expert_width": 17,
    "expert_mlp": 23,
    "vocab": 29,
    "action_dim": 31,
    "image_layers": 2,
    "image_heads": 3,
    "image_head_dim": 5,
    "image_mlp": 37,
    "image_tokens": 41,
    "patch": 2,
}


def pi0_tree(
    *,
    model: Literal["pi0", "pi05"] = "pi0",
    lora: Mapping[str, int] = LORA,
    kv_heads: int = 1,
    fused_qkv: bool = False,
    seed: int = 0,
    dtype: npt.DTypeLike = "float32",
    frozen_dtype: npt.DTypeLike | None = None,
    **dims: int,
) -> Tree:
    """Leaf path to random array, every leaf that openpi's model has.

    `lora` gives the rank of each expert that has factors. `fused_qkv` is what openpi builds when
    there are as many k/v heads as heads. `frozen_dtype` is the dtype of what a LoRA run freezes;
    `dims` overrides `DIMS`. A leaf's numbers depend on `seed`, its path and its shape alone: the
    same on every machine, and the same with and without LoRA.
    """
    if unknown := (dims.keys() - DIMS.keys()) | (lora.keys() - LORA.keys()):
        raise TypeError(f"unknown: {sorted(unknown)}")
    wanted = shapes({**DIMS, **dims}, model, lora, kv_heads, fused_qkv)
    return {
        path: _random(path, wanted[path], seed).astype(
            _dtype(dtype if frozen_dtype is None or not is_frozen(path, lora) else frozen_dtype)
        )
        for path in sorted(wanted)
    }


def is_frozen(path: str, lora: Mapping[str, int]) -> bool:
    """Whether openpi freezes this leaf when it trains factors on these experts."""
    expert = "expert" if re.search("llm.*_1", path) else "paligemma"
    return "llm" in path and "lora" not in path and expert in lora


def save(
    tree: Mapping[str, Array],
    path: Path,
    *,
    value_suffix: bool = True,
    layout: Layout = "ocdbt",
    compress: bool = True,
    chunks: Literal["grid"] | int | None = None,
    processes: int = 1,
    step_dir: bool = True,
    assets: bool = True,
    node_bytes: int | None = None,
    quick: bool = False,
) -> Path:
    """Write `tree` under `path` as a training run does, or without `step_dir` as a release.

    Orbax writes, in chunks of at most `chunks` bytes if that is a number. TensorStore writes the
    same layout in its place when asked to be `quick` (it needs no JAX) and for what Orbax does in
    large runs only: `chunks="grid"` splits every axis and pads the edge chunks, several `processes`
    share such chunks and merge their OCDBT directories, and small `node_bytes` give an OCDBT tree
    of several levels.
    """
    path = Path(path).absolute()
    leaves = {f"params/{name}{'/value' if value_suffix else ''}": array for name, array in tree.items()}
    if quick or chunks == "grid" or processes > 1 or node_bytes is not None:
        _save_tensorstore(leaves, path / "params", layout, compress, chunks == "grid", processes, node_bytes)
        _write_checkpoint_metadata(path if step_dir else path / "params", step_dir)
    else:
        _save_orbax(leaves, path, layout, compress, chunks, step_dir)
    if assets:
        stats = {"mean": 0.1, "std": 1.5, "q01": -0.9, "q99": 0.9}
        width = len(tree.get("action_out_proj/bias", [0]))
        norm_stats = {
            name: {key: [value] * width for key, value in stats.items()} for name in ("state", "actions")
        }
        file = path / "assets" / "my_robot" / "norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"norm_stats": norm_stats}, indent=2))
    return path


def save_stream(arrays: Iterable[tuple[str, Array]], path: Path) -> Path:
    """Write a step directory of any size, an array at a time, as training saves it."""
    import tensorstore as ts

    params = Path(path).absolute() / "params"
    home = params / "ocdbt.process_0"
    home.mkdir(parents=True)
    context = ts.Context()

    def kvstore(directory: Path, key: str = "") -> dict[str, Any]:
        base = {"driver": "file", "path": f"{directory}/"}
        return {"driver": "ocdbt", "base": base, "path": key, "config": CONFIG, "assume_config": True}

    described: Tree = {}
    for name, array in arrays:
        stored = f"params/{name}/value"
        spec = {
            "driver": "zarr",
            "kvstore": kvstore(home, stored.replace("/", ".") + "/"),
            "dtype": array.dtype.name,
            "metadata": _zarr2(array.shape, array.shape, True),
            "store_data_equal_to_fill_value": True,
        }
        ts.open(spec, create=True, context=context).result().write(array).result()
        described[stored] = np.broadcast_to(np.zeros((), array.dtype), array.shape)
    root, part = (ts.KvStore.open(kvstore(at), context=context).result() for at in (params, home))
    # the root refers to the values where they lie, which takes a transaction
    transaction = ts.Transaction(atomic=True)
    part.experimental_copy_range_to(root.with_transaction(transaction)).result()
    transaction.commit_sync()
    (params / "_METADATA").write_text(json.dumps(_tree_metadata(described, True, False)))
    _write_checkpoint_metadata(params.parent, True)
    return params.parent


def restore(path: Path) -> Tree:
    """Leaf path to array as Orbax restores it the way openpi asks it to: every reader's oracle."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    path = epath.Path(path).absolute()
    path = path / "params" if (path / "params").is_dir() else path
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        item = {"params": handler.metadata(path)["params"]}
        as_numpy = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(restore_type=np.ndarray), item)
        restored = checkpointer.restore(path, ocp.args.PyTreeRestore(item=item, restore_args=as_numpy))
    leaves = dict(_flatten(restored["params"]))
    if all(name.endswith("/value") for name in leaves):
        leaves = {name.removesuffix("/value"): array for name, array in leaves.items()}
    return leaves


# Trees.


def shapes(
    dims: Mapping[str, int], model: str, lora: Mapping[str, int], kv_heads: int, fused_qkv: bool
) -> dict[str, Shape]:
    """Leaf path to shape, of every leaf that openpi's model has. `dims` has all the keys of `DIMS`."""
    layers, heads, head_dim = dims["layers"], dims["heads"], dims["head_dim"]
    width = dims["width"]
    found: dict[str, Shape] = {"PaliGemma/llm/embedder/input_embedding": (dims["vocab"], width)}

    def dense(path: str, inputs: Shape, outputs: Shape, *stack: int) -> None:
        found[f"{path}/kernel"] = (*stack, *inputs, *outputs)
        found[f"{path}/bias"] = (*stack, *outputs)

    def factored(path: str, weight: str, factor: str, shape: Shape, rank: int | None) -> None:
        found[path + weight] = shape
        if rank is not None:
            found[f"{path}{factor}lora_a"] = (*shape[:-1], rank)
            found[f"{path}{factor}lora_b"] = (*shape[:-2], rank, shape[-1])

    for expert, suffix, size, hidden in (
        ("paligemma", "", width, dims["mlp"]),
        ("expert", "_1", dims["expert_width"], dims["expert_mlp"]),
    ):
        rank, block = lora.get(expert), "PaliGemma/llm/layers"
        attention: dict[str, Shape] = {"attn_vec_einsum": (layers, heads, head_dim, size)}
        if fused_qkv or kv_heads == heads:
            attention["qkv_einsum"] = (layers, 3, heads, size, head_dim)
        else:
            attention["q_einsum"] = (layers, heads, size, head_dim)
            attention["kv_einsum"] = (layers, 2, kv_heads, size, head_dim)
        for name, shape in attention.items():
            factored(f"{block}/attn/{name}{suffix}/", "w", "", shape, rank)
        factored(f"{block}/mlp{suffix}/gating_einsum", "", "_", (layers, 2, size, hidden), rank)
        factored(f"{block}/mlp{suffix}/linear", "", "_", (layers, hidden, size), rank)
        for norm, stack in (
            (f"{block}/pre_attention_norm", (layers,)),
            (f"{block}/pre_ffw_norm", (layers,)),
            ("PaliGemma/llm/final_norm", ()),
        ):
            if model == "pi05" and suffix:
                dense(f"{norm}{suffix}/Dense_0", (size,), (3 * size,), *stack)
            else:
                found[f"{norm}{suffix}/scale"] = (*stack, size)

    image, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    per_head = (dims["image_heads"], dims["image_head_dim"])
    flat, hidden_image, depth = (math.prod(per_head),), (dims["image_mlp"],), dims["image_layers"]
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        found[f"{block}/{norm}/scale"] = found[f"{block}/{norm}/bias"] = (depth, *flat)
    for name in ("query", "key", "value"):
        dense(f"{block}/MultiHeadDotProductAttention_0/{name}", flat, per_head, depth)
    dense(f"{block}/MultiHeadDotProductAttention_0/out", per_head, flat, depth)
    dense(f"{block}/MlpBlock_0/Dense_0", flat, hidden_image, depth)
    dense(f"{block}/MlpBlock_0/Dense_1", hidden_image, flat, depth)
    final_norm = f"{image}/Transformer/encoder_norm"
    found[f"{final_norm}/scale"] = found[f"{final_norm}/bias"] = flat
    dense(f"{image}/embedding", (dims["patch"], dims["patch"], 3), flat)
    dense(f"{image}/head", flat, (width,))
    found[f"{image}/pos_embedding"] = (1, dims["image_tokens"], *flat)

    action, state = (dims["action_dim"],), (dims["expert_width"],)
    dense("action_in_proj", action, state)
    dense("action_out_proj", state, action)
    if model == "pi05":
        dense("time_mlp_in", state, state)
        dense("time_mlp_out", state, state)
    else:
        dense("state_proj", action, state)
        dense("action_time_mlp_in", (2 * state[0],), state)
        dense("action_time_mlp_out", state, state)
    return found


def _random(path: str, shape: Shape, seed: int) -> Array:
    """Uniform in [-1, 1), all 24 bits of a float32 in use, from a stream that numpy guarantees."""
    bits = np.random.PCG64([seed, zlib.crc32(path.encode())]).random_raw(math.prod(shape)) >> 40
    return (bits.astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def _dtype(name: npt.DTypeLike) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401  gives numpy the name "bfloat16"

    return np.dtype(name)


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


# Writers.


def _save_orbax(
    leaves: Mapping[str, Array],
    path: Path,
    layout: Layout,
    compress: bool,
    chunk_bytes: int | None,
    step_dir: bool,
) -> None:
    import jax
    import orbax.checkpoint as ocp

    tree = _nest({name: jax.device_put(array) for name, array in leaves.items()})
    # openpi's Orbax, 0.11.13, always compresses and does not know the option.
    options = {} if compress else {"use_compression": False}
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=layout.startswith("ocdbt"), use_zarr3=layout.endswith("zarr3"), **options
    )
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree)
    params = ocp.args.PyTreeSave(tree, save_args=save_args)
    if step_dir:  # as ocp.CheckpointManager does for one step
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(params=handler)) as checkpointer:
            checkpointer.save(path, args=ocp.args.Composite(params=params))
    else:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path / "params", args=params)


def _save_tensorstore(
    leaves: Mapping[str, Array],
    params: Path,
    layout: Layout,
    compress: bool,
    grid: bool,
    processes: int,
    node_bytes: int | None,
) -> None:
    import tensorstore as ts

    ocdbt, zarr3 = layout.startswith("ocdbt"), layout.endswith("zarr3")
    context, fresh = ts.Context(), {"assume_config": True}
    config = CONFIG | ({"max_decoded_node_bytes": node_bytes} if node_bytes else {})
    params.mkdir(parents=True)

    def kvstore(directory: Path, key: str = "") -> dict[str, Any]:
        if not ocdbt:
            return {"driver": "file", "path": f"{directory}/{key}"}
        base = {"driver": "file", "path": f"{directory}/"}
        return {"driver": "ocdbt", "base": base, "path": key, "config": config, **fresh}

    homes = [params / f"ocdbt.process_{n}" for n in range(processes)] if ocdbt else [params]
    for home in homes:
        transaction = ts.Transaction()
        writes = []
        for name, array in leaves.items():
            chunk = tuple(size // 2 + 1 if grid or processes > 1 else max(size, 1) for size in array.shape)
            spec = {
                "driver": "zarr3" if zarr3 else "zarr",
                "kvstore": kvstore(home, name.replace("/", ".") + "/"),
                "dtype": array.dtype.name,
                "metadata": (_zarr3 if zarr3 else _zarr2)(array.shape, chunk, compress),
                "store_data_equal_to_fill_value": True,
            }
            options: dict[str, Any] = {
                "create": True,
                "context": context,
                "transaction": transaction,
            }
            store = ts.open(spec, **options).result()
            for index, where in enumerate(_grid(array.shape, chunk)):
                if homes[index % len(homes)] == home:
                    writes.append(store[where].write(array[where]))
        transaction.commit_sync()
        for write in writes:
            write.result()
    if ocdbt:  # the root refers to the values where they lie
        transaction = ts.Transaction(atomic=True)
        root, *parts = (
            ts.KvStore.open(kvstore(directory), context=context).result() for directory in (params, *homes)
        )
        for part in parts:
            part.experimental_copy_range_to(root.with_transaction(transaction)).result()
        transaction.commit_sync()
    (params / "_METADATA").write_text(json.dumps(_tree_metadata(leaves, ocdbt, zarr3)))


def _grid(shape: Shape, chunk: Shape) -> Iterator[tuple[slice, ...]]:
    axes = (
        [slice(at, min(at + step, size)) for at in range(0, size, step)]
        for size, step in zip(shape, chunk, strict=True)
    )
    return itertools.product(*axes)


def _zarr2(shape: Shape, chunk: Shape, compress: bool) -> dict[str, Any]:
    compressor = {"id": "zstd", "level": 1} if compress else None
    return {"shape": shape, "chunks": chunk, "compressor": compressor}


def _zarr3(shape: Shape, chunk: Shape, compress: bool) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little, {"name": "zstd", "configuration": {"level": 3}}] if compress else [little]
    sharding = {
        "chunk_shape": chunk,
        "codecs": codecs,
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _tree_metadata(leaves: Mapping[str, Array], ocdbt: bool, zarr3: bool) -> dict[str, Any]:
    def entry(name: str, array: Array) -> dict[str, Any]:
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": array.shape}
        return {
            "key_metadata": [{"key": key, "key_type": 2} for key in name.split("/")],
            "value_metadata": value,
        }

    return {
        "tree_metadata": {str(tuple(name.split("/"))): entry(name, array) for name, array in leaves.items()},
        "use_ocdbt": ocdbt,
        "use_zarr3": zarr3,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _write_checkpoint_metadata(directory: Path, step_dir: bool) -> None:
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    metadata = {
        "item_handlers": {"params": handler} if step_dir else handler,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": 1,
        "commit_timestamp_nsecs": 2,
        "custom_metadata": {},
    }
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
