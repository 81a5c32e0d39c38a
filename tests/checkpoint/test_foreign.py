"""Inputs that no family made: each is called what it is, once, and nobody is told to destroy a part of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bridge
from bridge import Refusal
from bridge.errors import Problem
from tests.kit import checkpoints, trainers
from tests.kit.checkpoints import Array
from tests.kit.trainers import Tensors

MODELS = "supported models: pi0, pi05, pi0_fast; another model needs a plug-in of its own"
DEQUANTISE = "dequantised where they are quantised"
LLM = "paligemma_with_expert.paligemma.model.language_model"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return trainers.policy(tmp_path_factory.mktemp("plain"))


def refused(
    tmp_path: Path, tensors: Mapping[str, Array], config: Mapping[str, object] | None = None
) -> list[Problem]:
    source = trainers.save(tensors, tmp_path / "src", config)
    with pytest.raises(Refusal) as caught:
        bridge.convert(source, tmp_path / "out", to="orbax", size=trainers.SIZES)
    assert not (tmp_path / "out").exists()
    said = [f"{problem.cause} {problem.fix}" for problem in caught.value.problems]
    assert len(set(said)) == len(said)
    # no template of a name, and no model named twice
    assert not [line for line in said if re.search(r"\{[a-z]+[:}]|\b(pi0\w*), \1\b", line)]
    return list(caught.value.problems)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def decoder(prefix: str = "model.", layers: int = 3) -> Tensors:
    """The names of a Llama, as transformers saves them."""
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    names += ["input_layernorm", "post_attention_layernorm"]
    tensors = {f"{prefix}layers.{n}.{name}.weight": ones(4, 4) for n in range(layers) for name in names}
    return tensors | {f"{prefix}embed_tokens.weight": ones(8, 4), f"{prefix}norm.weight": ones(4)}


def gemma3() -> Tensors:
    """A Gemma 3 with its tower: most of its names are also those of a PaliGemma."""
    prefix = "model.language_model."
    norms = (
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "self_attn.q_norm",
        "self_attn.k_norm",
    )
    more = {f"{prefix}layers.{n}.{norm}.weight": ones(4) for n in range(3) for norm in norms}
    more["model.multi_modal_projector.mm_input_projection_weight"] = ones(4, 4)
    return decoder(prefix) | more


FAMILIES: dict[str, tuple[Tensors, str]] = {
    "llama": (
        decoder() | {"lm_head.weight": ones(8, 4)},
        "lm_head.weight, model.embed_tokens.weight, model.layers.",
    ),
    "gpt2": ({f"h.{n}.attn.c_attn.weight": ones(4) for n in range(2)}, "h.{0..1}.attn.c_attn.weight"),
    "gemma3": (gemma3(), "model.language_model.embed_tokens.weight"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_is_named_by_its_names_and_its_config(tmp_path: Path, family: str) -> None:
    tensors, first = FAMILIES[family]
    (problem,) = refused(tmp_path, tensors, {"model_type": family})
    assert "match no supported model" in problem.cause and first in problem.cause
    assert problem.cause.endswith(f"; config.json says {family!r}")
    assert problem.fix == MODELS


def test_a_relative_of_a_model_is_not_called_a_damaged_copy(tmp_path: Path, plain: Tensors) -> None:
    """Most of its names are a model's, some are others: nobody need copy it again."""
    tensors = {re.sub(r"^action_out_proj", "head", name): array for name, array in plain.items()}
    problems = refused(tmp_path, tensors, {"model_type": "pi9"})
    lacking = [problem for problem in problems if "is missing" in problem.cause]
    assert len(lacking) == 2 and all(each.cause.endswith("; config.json says 'pi9'") for each in lacking)
    assert {each.fix.partition(",")[0] for each in lacking} == {"if this is another model than pi0"}


def test_what_is_missing_alone_is_a_damaged_copy(tmp_path: Path, plain: Tensors) -> None:
    """Of the two weights of one rule, and of every layer, with no template in the name."""
    tensors = {
        name: array for name, array in plain.items() if not ("language_model" in name and "k_proj" in name)
    }
    (problem,) = refused(tmp_path, tensors)
    assert f"tensor {LLM}.layers.*.self_attn.k_proj.weight of pi0 is missing" in problem.cause
    assert problem.fix == "copy the checkpoint again, or re-download it"


def test_a_leaf_of_single_layers_is_named_without_its_template(tmp_path: Path) -> None:
    tree = checkpoints.pi0_tree(lora={}, layers=2)
    source = checkpoints.save(
        {leaf: array for leaf, array in tree.items() if leaf != "action_in_proj/bias"},
        tmp_path / "src",
        quick=True,
    )
    with pytest.raises(
        Refusal, match=r"leaf action_in_proj/bias of pi0 is missing\n  fix: copy the checkpoint"
    ):
        bridge.plan(source, None, to="torch-merged")


Quantise = Callable[[str, Array], Tensors]
QUANTISED: dict[str, Quantise] = {
    "bitsandbytes, 4 bits": lambda name, w: {
        name: np.zeros((w.size // 2 + 1, 1), np.uint8),
        f"{name}.absmax": ones(3),
        f"{name}.quant_map": ones(16),
        f"{name}.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8),
    },
    "bitsandbytes, 8 bits": lambda name, w: {
        name: w.astype(np.int8),
        name.replace("weight", "SCB"): ones(len(w)),
        name.replace("weight", "weight_format"): np.zeros((), np.uint8),
    },
    "GPTQ": lambda name, w: {
        name.replace("weight", "qweight"): np.zeros((2, 3), np.int32),
        name.replace("weight", "qzeros"): np.zeros((2, 3), np.int32),
        name.replace("weight", "scales"): ones(2, 3),
        name.replace("weight", "g_idx"): np.zeros(3, np.int32),
    },
    "AWQ or GPTQ": lambda name, w: {
        name.replace("weight", "qweight"): np.zeros((2, 3), np.int32),
        name.replace("weight", "qzeros"): np.zeros((2, 3), np.int32),
        name.replace("weight", "scales"): ones(2, 3),
    },
    "compressed-tensors": lambda name, w: {
        f"{name}_packed": np.zeros((2, 3), np.int32),
        f"{name}_shape": np.zeros(2, np.int64),
        f"{name}_scale": ones(2, 3),
    },
    "with scales beside the weights": lambda name, w: {name: w, f"{name}_scale_inv": ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("layers", ["language_model.layers", "layers"], ids=["some layers", "all layers"])
@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_base_is_called_one(tmp_path: Path, plain: Tensors, method: str, layers: str) -> None:
    """Once, whatever its arrays look like; leaving out its state would be leaving out the weights."""
    tensors: Tensors = {}
    for name, array in plain.items():
        quantise = array.ndim == 2 and layers in name and name.endswith("_proj.weight")
        tensors |= QUANTISED[method](name, array) if quantise else {name: array}
    (problem,) = refused(tmp_path, tensors)
    assert f"is quantised ({method}: " in problem.cause
    assert problem.fix.endswith(DEQUANTISE)


STATE = {
    "magnitudes of DoRA": (f"{LLM}.layers.0.self_attn.q_proj.lora_magnitude_vector", "it is LoRA"),
    "LoRA of an embedding": (f"{LLM}.embed_tokens.lora_embedding_A", "it is LoRA"),
    "buffers of a normaliser": ("normalize_inputs.buffer_state.mean", "it is what the model normalises by"),
    "running statistics": ("bn.running_mean", "it is what the model normalises by"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATE)
def test_nobody_is_told_to_leave_out_what_carries_training_or_state(
    tmp_path: Path, plain: Tensors, kind: str
) -> None:
    name, what = STATE[kind]
    (problem,) = refused(tmp_path, plain | {name: ones(3)})
    assert f"tensor {name} is not part of pi0" in problem.cause
    assert problem.fix.startswith(what) and "leave" not in problem.fix and "lost" not in problem.fix


def test_a_leaf_of_lora_that_the_model_does_not_know_is_not_to_be_left_out(tmp_path: Path) -> None:
    tree = checkpoints.pi0_tree(lora={}, layers=2)
    source = checkpoints.save(tree | {"action_in_proj/lora_a": ones(3, 2)}, tmp_path / "src", quick=True)
    with pytest.raises(
        Refusal, match=r"action_in_proj/lora_a is not part of pi0\n  fix: it is LoRA"
    ) as caught:
        bridge.plan(source, None, to="torch-merged")
    assert "leave" not in str(caught.value)


def test_a_second_set_of_weights_is_one_problem(tmp_path: Path, plain: Tensors) -> None:
    """A moving average beside the weights: one line, with the pattern that leaves it out as a whole."""
    both = {f"model.{name}": array for name, array in plain.items()}
    both |= {f"ema_model.{name}": array for name, array in plain.items()}
    (problem,) = refused(tmp_path, both)
    assert re.search(r"tensor ema_model\.\{\d+ names\} is not part of pi0", problem.cause)
    assert "--leave-out 'ema_model.*'" in problem.fix
    planned = bridge.plan(tmp_path / "src", None, to="orbax", size=trainers.SIZES, leave_out=["ema_model.*"])
    assert planned.checkpoint.model.name == "pi0"


WRAPPED = ("state_dict.", "model_state_dict.", "module.state.")


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapped_state_dict_is_said_to_be_one(tmp_path: Path, plain: Tensors, wrapper: str) -> None:
    source = trainers.save({wrapper + name: array for name, array in plain.items()}, tmp_path / "src")
    planned = bridge.plan(source, None, to="orbax", size=trainers.SIZES)
    assert f"the prefix {wrapper} is taken off all {len(plain)} names" in planned.notes


def test_an_adapter_without_a_tensor_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]})
    )
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Refusal, match="contains no array"):
        bridge.plan(tmp_path, None, to="orbax")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on its base, as PEFT saves one: no record."""
    home = tmp_path_factory.mktemp("adapter")
    source = checkpoints.save(checkpoints.pi0_tree(layers=2), home / "1", quick=True)
    bridge.convert(source, home / "base", to="torch-base")
    bridge.convert(source, home / "adapter", to="peft-adapter", lora_alpha=4.0)
    (home / "adapter" / "bridge.json").unlink()
    return home


def changed(
    home: Path, to: Path, more: Callable[[str, int], tuple[str, int]], **config: object
) -> list[Problem]:
    """What is said of the adapter with a tensor more for each lora_B, and other fields in its config."""
    shutil.copytree(home / "adapter", to)
    tensors = load_file(to / "adapter_model.safetensors")
    added = [more(name, len(array)) for name, array in tensors.items() if name.endswith("lora_B.weight")]
    save_file(tensors | {name: ones(size) for name, size in added}, to / "adapter_model.safetensors")
    written = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(written | config))
    with pytest.raises(Refusal) as caught:
        bridge.convert(to, to.parent / "out", to="orbax", base=home / "base")
    assert not (to.parent / "out").exists()
    return list(caught.value.problems)


def ending(other: str) -> Callable[[str, int], tuple[str, int]]:
    return lambda name, rows: (name.replace("lora_B.weight", other), rows)


KINDS = {
    "DoRA": ("lora_magnitude_vector", {"use_dora": True}, "it is DoRA", "DoRA's magnitudes, and the config does not"),
    "biases of LoRA": ("lora_B.bias", {"lora_bias": True}, "lora_bias is True", "a bias of LoRA, and the config does"),
    "biases": ("base_layer.bias", {"bias": "lora_only"}, "it has trained biases", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_another_kind_is_called_that_once(adapter: Path, tmp_path: Path, kind: str) -> None:
    """Its config says it, and no tensor of it is said to be ignored; without the config's word, it is missed."""
    other, config, says, lost = KINDS[kind]
    (problem,) = changed(adapter, tmp_path / "declared", ending(other), **config)
    assert says in problem.cause and problem.fix.startswith("merge it into its base with PEFT")
    if lost:
        (problem,) = changed(adapter, tmp_path / "lost", ending(other))
        assert lost in problem.cause and "and 13 more are" in problem.cause
        assert problem.fix == "put back the adapter_config.json that was saved with it"


def test_state_of_a_quantiser_beside_factors_is_not_to_be_left_out(adapter: Path, tmp_path: Path) -> None:
    (problem,) = changed(adapter, tmp_path / "adapter", ending("base_layer.weight.absmax"))
    assert "is quantised (bitsandbytes, 4 bits: " in problem.cause and problem.fix.endswith(DEQUANTISE)


def test_an_adapter_of_another_family_is_named_by_its_base(tmp_path: Path) -> None:
    layers = "base_model.model.model.layers"
    names = [f"{layers}.{n}.self_attn.{m}_proj.lora_{x}.weight" for n in range(2) for m in "qv" for x in "AB"]
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "meta-llama/L",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: ones(2, 2) for name in names}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Refusal) as caught:
        bridge.plan(tmp_path, None, to="orbax")
    (problem,) = caught.value.problems
    assert f"first: {layers}." in problem.cause and problem.fix == MODELS
    assert problem.cause.endswith("; adapter_config.json names the base 'meta-llama/L'")


def test_a_horizon_that_is_none_is_decided_by_its_flag(tmp_path: Path, plain: Tensors) -> None:
    """The weights are whole: nothing need be copied again for a number that a flag gives."""
    source = trainers.save(plain, tmp_path / "src", {"model_type": "pi0", "chunk_size": "many"})
    with pytest.raises(Refusal, match=r"chunk_size of config\.json is 'many'") as caught:
        bridge.plan(source, None, to="orbax", size=trainers.SIZES)
    (problem,) = caught.value.problems
    assert problem.fix == "restore the file from a copy, or give --action-horizon"
    assert bridge.plan(source, None, to="orbax", size=trainers.SIZES, action_horizon=7)
