"""Conversions of checkpoints that openpi saved, held against what openpi computed from them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash

import bridge
from tests.kit import checkpoints, golden
from tests.kit.golden import (
    DEAD_HEAD,
    EMBED_TOKENS,
    LM_HEAD,
    TOLERANCE,
    TRANSFORMERS,
    Golden,
    State,
    differing,
)
from tests.kit.record import Record


@dataclass(frozen=True)
class Converted:
    """A golden checkpoint and its float32 conversion."""

    golden: Golden
    result: bridge.Result
    directory: Path
    state: State
    by_hand: State
    """The expected tensors in float32, factors left out."""

    @property
    def merged(self) -> set[str]:
        return golden.merged_names(self.golden.leaves)


@pytest.fixture(scope="module", params=golden.NAMES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    source = golden.golden(request.param)
    directory = tmp_path_factory.mktemp(source.name) / "float32"
    result = bridge.convert(
        source.checkpoint, directory, to="torch-merged", dtype="float32", **source.options
    )
    by_hand = {name: weight.to(torch.float32) for name, weight in golden.by_hand(source.leaves).items()}
    return Converted(source, result, directory, golden.read(directory), by_hand)


def without(state: Mapping[str, torch.Tensor], names: set[str]) -> State:
    return {name: weight for name, weight in state.items() if name not in names}


def only(state: Mapping[str, torch.Tensor], names: set[str]) -> State:
    return {name: weight for name, weight in state.items() if name in names}


# What the weights compute.


def test_weights_compute_what_openpi_computed(converted: Converted, record_property: Record) -> None:
    """Every layer of both experts, as PyTorch linear layers, gives what openpi's LoRA modules gave."""
    errors = golden.runtime_errors(converted.golden.runtime, converted.state)
    dims = converted.golden.facts["dims"]
    assert len(errors) == 4 * (dims["paligemma"]["depth"] + dims["expert"]["depth"])
    worst = max(errors, key=errors.__getitem__)
    record_property(f"{converted.golden.name}: relative error of {len(errors)} modules", errors[worst])
    print(f"{converted.golden.name}: {len(errors)} modules, relative error {errors[worst]:.2g} ({worst})")
    assert errors[worst] <= TOLERANCE


def test_simulation_is_openpis_runtime(converted: Converted, record_property: Record) -> None:
    """The float64 simulation that stands for openpi below agrees with openpi's recorded outputs."""
    source = converted.golden
    simulated = golden.simulate(source.leaves, source.scales, source.runtime)
    assert simulated.keys() == source.runtime.keys()
    worst = max(
        float(np.abs(simulated[key] - output).max() / np.abs(output).max())
        for key, output in source.runtime.items()
        if key.endswith("/output")
    )
    record_property(f"{source.name}: relative error of the simulation", worst)
    print(f"{source.name}: simulation off by {worst:.2g}")
    assert worst <= TOLERANCE


# Which bits they are.


def test_weights_without_lora_keep_every_bit(converted: Converted) -> None:
    """All that no factor touches is the source's own values, read by Orbax and moved by hand."""
    kept = without(converted.by_hand, converted.merged)
    assert differing(kept, without(converted.state, converted.merged)) == set()


def test_every_merged_weight_moved(converted: Converted) -> None:
    """No factor was left out: each weight that has some differs from its base."""
    base, state = (only(all_of, converted.merged) for all_of in (converted.by_hand, converted.state))
    assert differing(base, state) == converted.merged
    assert bool(converted.merged) == bool(converted.golden.facts["lora"])


def test_names_and_shapes_are_those_of_openpis_model(converted: Converted) -> None:
    shapes = {name: list(weight.shape) for name, weight in converted.state.items()}
    assert shapes == {name: shape for name, shape in converted.golden.shapes.items() if name != EMBED_TOKENS}
    assert {weight.dtype for weight in converted.state.values()} == {torch.float32}


def test_file_loads_strictly(converted: Converted) -> None:
    """`safetensors.torch.load_model`, which is how openpi loads, into a model with tied embeddings."""
    model = golden.module_of(converted.golden.shapes)
    safetensors.torch.load_model(model, converted.directory / "model.safetensors", strict=True)
    loaded = dict(model.named_parameters(remove_duplicate=False))
    assert loaded[EMBED_TOKENS] is loaded[LM_HEAD]
    expected = {**converted.state, EMBED_TOKENS: converted.state[LM_HEAD]}
    assert differing(expected, {name: value.detach() for name, value in loaded.items()}) == set()


def test_header_names_the_tie(converted: Converted) -> None:
    assert golden.header(converted.directory) == {"format": "pt", EMBED_TOKENS: LM_HEAD}


def test_dead_head_is_zeros_in_a_hole(converted: Converted) -> None:
    """What nothing uses takes no disk: the file has a hole as large as the tensor, up to its blocks."""
    head = converted.state[DEAD_HEAD]
    assert not any(golden.bits(head))
    status = (converted.directory / "model.safetensors").stat()
    missing = status.st_size - status.st_blocks * 512
    assert missing > 0
    assert missing >= head.nbytes - 3 * os.statvfs(converted.directory).f_bsize


# dtypes.


def rounded(state: State, dtype: torch.dtype) -> State:
    """torch's rounding, but of what openpi's runtime holds in float32."""
    return {
        name: weight if golden.held_in_float32(name) else weight.to(dtype) for name, weight in state.items()
    }


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_narrow_dtypes_round_as_torch_does(converted: Converted, dtype: str | None, tmp_path: Path) -> None:
    """The float32 conversion rounded once; norms, patch and position embeddings stay float32.

    Without a dtype that is bfloat16, and float32 where LoRA is folded.
    """
    source = converted.golden
    state = golden.convert(source.checkpoint, tmp_path / "out", dtype=dtype, **source.options)
    written = dtype or ("float32" if source.facts["lora"] else "bfloat16")
    expected = rounded(converted.state, getattr(torch, written))
    assert differing(expected, state) == set()
    if written != "float32":
        # patch and position embeddings, two norms in each of three layers and one behind, of two experts;
        # pi0.5's action expert has a weight and a bias for each of its norms
        held = [name for name, weight in state.items() if weight.dtype == torch.float32]
        assert len(held) == 3 + 7 + (14 if source.facts["model"] == "pi05" else 7)


def test_keep_keeps_what_is_frozen_in_bfloat16(tmp_path: Path) -> None:
    """A LoRA run stores frozen weights in bfloat16 and trained ones in float32, and so does the output."""
    source = golden.golden("pi05_lora")
    kept = golden.convert(source.checkpoint, tmp_path / "keep", dtype="keep", **source.options)
    wide = golden.convert(source.checkpoint, tmp_path / "wide", dtype="float32", **source.options)
    base, merged = golden.by_hand(source.leaves), golden.merged_names(source.leaves)
    base[DEAD_HEAD] = base[DEAD_HEAD].to(torch.bfloat16)
    assert differing(without(base, merged), without(kept, merged)) == set()
    once = {name: weight.to(base[name].dtype) for name, weight in only(wide, merged).items()}
    assert differing(once, only(kept, merged)) == set()
    assert {kept[name].dtype for name in merged} == {torch.bfloat16}
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16, torch.float32}


# What lies beside the weights.


def test_assets_travel_byte_for_byte(converted: Converted) -> None:
    source = golden.files(converted.golden.checkpoint / "assets")
    assert any(path.endswith("/norm_stats.json") for path in source)
    assert golden.files(converted.directory / "assets") == source


def test_recorded_checksums_hold(converted: Converted) -> None:
    """bridge.json's checksums are those of what safetensors, and Orbax, read."""
    record = json.loads((converted.directory / "bridge.json").read_text())

    def checksum(value: torch.Tensor) -> str:
        return xxhash.xxh3_128(golden.bits(value)).hexdigest()

    sums = {name: checksum(weight) for name, weight in converted.state.items() if name != DEAD_HEAD}
    described = {name: {"dtype": "float32", "checksum": digest} for name, digest in sums.items()}
    assert record["tensors"] == {**described, DEAD_HEAD: {"dtype": "float32", "checksum": "zeros"}}
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    assert record["checksum"] == converted.result.checksum == xxhash.xxh3_128(lines.encode()).hexdigest()

    suffix = "/value" if record["sources"]["source"]["value_suffix"] else ""
    assert record["sources"]["source"]["arrays"] == {
        f"params/{leaf}{suffix}": {"dtype": array.dtype.name, "checksum": checksum(golden.tensor(array))}
        for leaf, array in converted.golden.leaves.items()
    }
    written = golden.files(converted.directory)
    assert record["files"] == {
        name: xxhash.xxh3_128(data).hexdigest()
        for name, data in written.items()
        if name not in ("bridge.json", "model.safetensors")
    }


def test_two_runs_write_the_same_bytes(converted: Converted, tmp_path: Path) -> None:
    """However many workers there are; and the source is as it was."""
    source = converted.golden
    before = golden.files(source.home)
    for workers in (1, 5):
        golden.convert(
            source.checkpoint,
            tmp_path / str(workers),
            dtype="float32",
            workers=workers,
            **source.options,
        )
        assert golden.files(tmp_path / str(workers)) == golden.files(converted.directory)
    assert golden.files(source.home) == before


# Layouts.


def test_lerobot_has_both_embeddings_and_a_prefix(converted: Converted, tmp_path: Path) -> None:
    source = converted.golden
    state = golden.convert(
        source.checkpoint, tmp_path / "out", dtype="float32", layout="lerobot", **source.options
    )
    assert {name: list(weight.shape) for name, weight in state.items()} == {
        f"model.{name}": shape for name, shape in source.shapes.items()
    }
    expected = {**converted.state, EMBED_TOKENS: converted.state[LM_HEAD]}
    assert differing({f"model.{name}": weight for name, weight in expected.items()}, state) == set()
    assert golden.header(tmp_path / "out") == {"format": "pt"}


def test_transformers_names(converted: Converted, tmp_path: Path) -> None:
    """The same bits under transformers' own names. It has no pi0.5, and that is refused."""
    source = converted.golden
    options: dict[str, Any] = {"dtype": "float32", "layout": "transformers", **source.options}
    if source.facts["model"] == "pi05":
        with pytest.raises(bridge.Refusal, match="pi05 has no layout transformers"):
            golden.convert(source.checkpoint, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return
    state = golden.convert(source.checkpoint, tmp_path / "out", **options)
    expected = {
        theirs + name.removeprefix(ours): weight
        for name, weight in converted.state.items()
        for ours, theirs in TRANSFORMERS.items()
        if name.startswith(ours)
    }
    assert len(expected) == len(converted.state)
    assert differing(expected, state) == set()
    # transformers' `embed_tokens` is the name that the file has, and its `lm_head` is not a module
    assert EMBED_TOKENS not in golden.header(tmp_path / "out")


# In memory.


def test_load_torch_gives_what_the_file_holds(converted: Converted) -> None:
    """Converted in memory, and read from the file: the same tensors, and the tied name is one of them."""
    source = converted.golden
    loaded = bridge.load_torch(source.checkpoint, dtype="float32", **source.options)
    assert loaded[EMBED_TOKENS].data_ptr() == loaded[LM_HEAD].data_ptr()
    assert differing(converted.state, without(loaded, {EMBED_TOKENS})) == set()
    model = golden.module_of(source.shapes)
    model.load_state_dict(loaded, strict=True)
    from_file = bridge.load_torch(converted.directory)
    assert differing(converted.state, without(from_file, {EMBED_TOKENS})) == set()


def test_load_jax_is_what_orbax_restores(converted: Converted) -> None:
    """A nested dict of jax arrays without the `value` level, as openpi's `restore_params` gives it."""
    loaded = bridge.load_jax(converted.golden.checkpoint)
    paths = jax.tree_util.tree_leaves_with_path(loaded)
    assert all(isinstance(leaf, jax.Array) for _, leaf in paths)
    flat = {"/".join(key.key for key in path): golden.tensor(np.asarray(leaf)) for path, leaf in paths}
    restored = {leaf: golden.tensor(array) for leaf, array in converted.golden.leaves.items()}
    assert differing(restored, flat) == set()


# Forms of LoRA and of attention that the golden checkpoints do not have.

BOTH = {"paligemma": 5, "expert": 3}
ALPHA = {"paligemma": 8.0, "expert": 4.5}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = {
    # name: (the checkpoint, how it is converted, alpha / rank as openpi's LoRAConfig has it)
    "paligemma alone": ({"lora": {"paligemma": 5}}, {"lora_alpha": 8.0}, {"paligemma": 8 / 5}),
    "expert alone": ({"lora": {"expert": 3}}, {"lora_alpha": {"expert": 4.5}}, {"expert": 1.5}),
    "a rank for each": ({"lora": BOTH}, {"lora_alpha": ALPHA}, {"paligemma": 8 / 5, "expert": 1.5}),
    "one alpha for all": ({"lora": BOTH}, {"lora_alpha": 6}, {"paligemma": 6 / 5, "expert": 2.0}),
    "stock ranks": ({"lora": {"paligemma": 16, "expert": 32}}, {}, {"paligemma": 1.0, "expert": 1.0}),
    "rslora": (
        {"lora": BOTH},
        {"lora_alpha": ALPHA, "rslora": True},
        {"paligemma": 8 / 5**0.5, "expert": 4.5 / 3**0.5},
    ),
    "stock ranks, rslora": (
        {"lora": {"paligemma": 16, "expert": 32}},
        {"rslora": True},
        {"paligemma": 16 / 16**0.5, "expert": 32 / 32**0.5},
    ),
    "fused qkv": (
        {"lora": BOTH, "fused_qkv": True},
        {"lora_alpha": ALPHA},
        {"paligemma": 8 / 5, "expert": 1.5},
    ),
    "several kv heads": (
        {"lora": BOTH, "heads": 6, "kv_heads": 3},
        {"lora_alpha": ALPHA},
        {"paligemma": 8 / 5, "expert": 1.5},
    ),
    "pi05": (
        {"lora": BOTH, "model": "pi05"},
        {"lora_alpha": ALPHA},
        {"paligemma": 8 / 5, "expert": 1.5},
    ),
    "pi05, fused qkv, frozen bfloat16": (
        {"lora": BOTH, "model": "pi05", "fused_qkv": True, "frozen_dtype": "bfloat16"},
        {"lora_alpha": ALPHA},
        {"paligemma": 8 / 5, "expert": 1.5},
    ),
    "rank one": (
        {"lora": {"paligemma": 1, "expert": 1}},
        {"lora_alpha": ALPHA},
        {"paligemma": 8.0, "expert": 4.5},
    ),
    "no lora": ({"lora": {}}, {"dtype": "float32"}, {}),
    "no lora, several kv heads": (
        {"lora": {}, "heads": 6, "kv_heads": 3},
        {"dtype": "float32"},
        {},
    ),
    "no lora, fused qkv": ({"lora": {}, "fused_qkv": True}, {"dtype": "float32"}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_openpi_computes(form: str, tmp_path: Path, record_property: Record) -> None:
    """Merged weights against openpi's own einsums on the unmerged ones; all others keep every bit."""
    make, options, scales = FORMS[form]
    tree = checkpoints.pi0_tree(**make)
    source = checkpoints.save(tree, tmp_path / "100", quick=True)
    state = golden.convert(source, tmp_path / "out", **options)
    errors = golden.runtime_errors(golden.simulate(tree, scales), state, torch.float64)
    layers = checkpoints.DIMS["layers"]
    assert len(errors) == (3 if make.get("fused_qkv") else 4) * 2 * layers
    worst = max(errors, key=errors.__getitem__)
    record_property(f"{form}: relative error of {len(errors)} modules", errors[worst])
    print(f"{form}: {len(errors)} modules, relative error {errors[worst]:.2g} ({worst})")
    assert errors[worst] <= TOLERANCE

    merged = golden.merged_names(tree)
    base = {name: weight.to(torch.float32) for name, weight in golden.by_hand(tree).items()}
    assert len(merged) == 7 * layers * len(make["lora"])
    assert differing(without(base, merged), without(state, merged)) == set()
