"""pi0-FAST: a checkpoint that openpi trained, in transformers' PaliGemma and with PEFT, and back.

What weights and logits are compared with was made without bridge: weights folded by hand in float64, and
the logits of openpi's JAX model (tests/data/golden/pi0_fast_lora).
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from transformers import PaliGemmaForConditionalGeneration

import bridge
from bridge.errors import CheckpointRefused, Refusal
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Tree

HOME = golden.DATA / "pi0_fast_lora"
CHECKPOINT = HOME / "checkpoint" / "3"
REFERENCE = HOME / "logits.npz"
ALPHA = {"paligemma": 8}

#: Weights that were folded by hand reach 4.8e-6.
LOGITS = 5e-5

WRAPPED = "model.paligemma_with_expert.paligemma."
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

#: name -> options, and whether openpi's scale is of use
RECIPES: dict[str, tuple[dict[str, Any], bool]] = {
    "merged": ({"to": "torch-merged"}, True),
    "merged-bfloat16": ({"to": "torch-merged", "dtype": "bfloat16"}, True),
    "merged-lerobot": ({"to": "torch-merged", "layout": "lerobot"}, True),
    "base": ({"to": "torch-base"}, False),
    "base-lerobot": ({"to": "torch-base", "layout": "lerobot"}, False),
    "adapter": ({"to": "peft-adapter"}, True),
    "adapter-lerobot": ({"to": "peft-adapter", "layout": "lerobot"}, True),
}


@dataclass(frozen=True)
class Made:
    """The golden checkpoint in every form, each converted once, on first use."""

    home: Path

    def __getitem__(self, name: str) -> Path:
        path = self.home / name
        if not path.exists():
            options, scaled = RECIPES[name]
            bridge.convert(CHECKPOINT, path, **options, **({"lora_alpha": ALPHA} if scaled else {}))
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("pi0_fast"))


@functools.cache
def source() -> Tree:
    """The leaves as Orbax itself restores them."""
    return checkpoints.restore(CHECKPOINT)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = safetensors.torch.load_file(directory / "model.safetensors")
    return state


def same_bits(expected: Tree, restored: Tree) -> None:
    assert expected.keys() == restored.keys()
    for name, leaf in expected.items():
        assert (restored[name].dtype, restored[name].shape) == (leaf.dtype, leaf.shape), name
        assert restored[name].tobytes() == leaf.tobytes(), name


def joined(expected: Tree, restored: Tree) -> None:
    """Every bit, but for one factor of the heads' projection: the einsum contracts heads, its sum counts."""
    summed = "PaliGemma/llm/layers/attn/attn_vec_einsum/lora_b"
    same_bits(
        {name: leaf for name, leaf in expected.items() if name != summed},
        {name: leaf for name, leaf in restored.items() if name != summed},
    )
    (before, after) = (leaves[summed].astype(np.float64) for leaves in (expected, restored))
    assert after.shape == before.shape
    assert np.abs(after.sum(1) - before.sum(1)).max() <= 2e-6 * np.abs(before.sum(1)).max()


# Weights.


def test_folds_as_by_hand(made: Made) -> None:
    """LoRA to float32's own error, every other weight bit for bit."""
    expected = safetensors.torch.load_file(HOME / "expected_merged.safetensors")
    written = tensors(made["merged"])
    # stored once, as transformers stores it: lm_head is the same tensor
    assert torch.equal(expected.pop(HEAD), expected[EMBEDDING])
    assert written.keys() == expected.keys()
    folded = {name for name in expected if re.search(r"language_model\.layers.*_proj", name)}
    assert len(folded) == 3 * 7
    assert {name for name in expected if not torch.equal(written[name], expected[name])} <= folded
    for name in folded:
        gap = (written[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert gap <= 1e-6, name


def test_bfloat16_keeps_norms_and_embeddings_of_patches(made: Made) -> None:
    dtypes = {name: tensor.dtype for name, tensor in tensors(made["merged-bfloat16"]).items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert all("norm.weight" in name or ".embeddings." in name for name in kept)
    assert {EMBEDDING, "model.multi_modal_projector.linear.weight"} <= dtypes.keys() - kept


def test_lerobot_has_the_same_weights_in_its_own_names(made: Made) -> None:
    ours, theirs = tensors(made["merged"]), tensors(made["merged-lerobot"])
    # its loader ties nothing: both names are in the file
    expected = {WRAPPED + name for name in (*ours, HEAD)}
    assert theirs.keys() == expected
    assert all(torch.equal(theirs[WRAPPED + name], tensor) for name, tensor in ours.items())
    assert torch.equal(theirs[WRAPPED + HEAD], ours[EMBEDDING])
    assert not bridge.diff(made["merged"], made["merged-lerobot"]).changed


def test_head_that_differs_from_the_embedding_is_refused(made: Made, tmp_path: Path) -> None:
    """It predicts the tokens, the embedding reads them: neither may be dropped."""
    state = tensors(made["merged-lerobot"])
    state[WRAPPED + HEAD] = state[WRAPPED + HEAD] + 1
    shutil.copytree(made["merged-lerobot"], tmp_path / "untied")
    (tmp_path / "untied" / "bridge.json").unlink()
    safetensors.torch.save_file(state, tmp_path / "untied" / "model.safetensors", {"format": "pt"})
    shutil.copy(made["merged"] / "config.json", tmp_path / "untied")
    with pytest.raises(Refusal, match="lm_head"):
        bridge.convert(tmp_path / "untied", tmp_path / "orbax", to="orbax")


# Logits.


def loaded(directory: Path) -> Any:
    """What a user of stock transformers gets, and that it got all of it."""
    model, info = PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def gap(model: Any) -> float:
    """Largest difference from openpi's logits."""
    recorded = dict(np.load(REFERENCE))
    count = int(recorded["token_mask"].sum())
    images = np.concatenate([recorded[f"image/{camera}"] for camera in recorded["camera_order"]])
    before = recorded["prefix_mask"].shape[1] - recorded["tokens"].shape[1]
    assert recorded["prefix_mask"][:, :before].all()
    tokens = np.concatenate([np.full(before, 512), recorded["tokens"][0, :count]])[None]
    suffix = np.concatenate([np.zeros(before, np.int64), recorded["token_ar_mask"][0, :count]])[None]
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.int64),
            token_type_ids=torch.from_numpy(suffix),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        )
    expected = recorded["logits"][:, : before + count]
    assert float(np.abs(expected).max()) > 5
    return float(np.abs(output.logits.numpy() - expected).max())


def test_transformers_computes_openpis_logits(made: Made) -> None:
    model = loaded(made["merged"])
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert gap(model) <= LOGITS


def test_peft_on_transformers_computes_openpis_logits(made: Made) -> None:
    model = loaded(made["base"])
    bare = gap(model)
    model = peft.PeftModel.from_pretrained(model, made["adapter"])
    assert gap(model) <= LOGITS < bare / 1000


@pytest.mark.parametrize(
    ("form", "off"), [("merged", LOGITS), ("adapter", LOGITS), ("merged-bfloat16", 5e-2)]
)
def test_verify_runs_the_whole_model(form: str, off: float, made: Made) -> None:
    base = {"base": made["base"]} if form == "adapter" else {}
    verdict = bridge.verify(CHECKPOINT, made[form], reference=REFERENCE, lora_alpha=ALPHA, **base)
    assert verdict.holds, verdict.problems
    assert (verdict.model, verdict.runtime) == ("pi0_fast", "transformers")
    assert verdict.counts == {"equal": 47, "runtime": 21}
    assert verdict.actions is not None
    assert off / 1000 < verdict.actions["max_abs"] <= off <= verdict.actions["allowed"]


def test_wrong_alpha_is_seen_in_weights_and_logits(made: Made, tmp_path: Path) -> None:
    bridge.convert(CHECKPOINT, tmp_path / "wrong", to="torch-merged", lora_alpha={"paligemma": 4})
    verdict = bridge.verify(CHECKPOINT, tmp_path / "wrong", reference=REFERENCE, lora_alpha=ALPHA)
    assert not verdict.holds
    causes = [problem.cause for problem in verdict.problems]
    # attention is scaled, the feed-forward is not
    wrong = {name for name in tensors(tmp_path / "wrong") if any(name in cause for cause in causes)}
    assert len(wrong) == 3 * 4 and all("self_attn" in name for name in wrong)
    assert "logits differ from the recorded ones" in causes[-1]
    assert len(bridge.diff(made["merged"], tmp_path / "wrong").changed) == 3 * 4


def test_recording_without_a_camera_is_refused(made: Made, tmp_path: Path) -> None:
    recorded = dict(np.load(REFERENCE))
    del recorded["image/base_0_rgb"]
    np.savez(tmp_path / "blind.npz", **recorded)
    with pytest.raises(Refusal, match=r"lacks image/base_0_rgb"):
        bridge.verify(CHECKPOINT, made["merged"], reference=tmp_path / "blind.npz", lora_alpha=ALPHA)


# And back.


@pytest.mark.parametrize("layout", ["", "-lerobot"])
def test_adapter_joins_its_base(layout: str, made: Made, tmp_path: Path) -> None:
    adapter, base = made[f"adapter{layout}"], made[f"base{layout}"]
    bridge.convert(adapter, tmp_path / "joined", to="orbax", base=base)
    joined(source(), checkpoints.restore(tmp_path / "joined"))
    stats = "assets/tiny_robot/norm_stats.json"
    assert (tmp_path / "joined" / stats).read_bytes() == (CHECKPOINT / stats).read_bytes()
    assert bridge.verify(CHECKPOINT, tmp_path / "joined", lora_alpha=ALPHA).holds
    assert not bridge.diff(CHECKPOINT, tmp_path / "joined", lora_alpha=ALPHA).changed


@pytest.mark.parametrize("layout", ["", "-lerobot"])
def test_merged_returns_bit_for_bit(layout: str, made: Made, tmp_path: Path) -> None:
    bridge.convert(made[f"merged{layout}"], tmp_path / "folded", to="orbax", dtype="keep")
    leaves = checkpoints.restore(tmp_path / "folded")
    trained = {name: leaf for name, leaf in source().items() if "/img/" in name}
    same_bits(trained, {name: leaf for name, leaf in leaves.items() if "/img/" in name})
    assert not [name for name in leaves if "lora" in name]
    bridge.convert(tmp_path / "folded", tmp_path / "again", to="torch-merged", dtype="float32")
    expected, again = tensors(made["merged"]), tensors(tmp_path / "again")
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_base_is_the_checkpoint_without_factors(made: Made, tmp_path: Path) -> None:
    bridge.convert(made["base"], tmp_path / "base", to="orbax")
    same_bits(
        {name: leaf for name, leaf in source().items() if "lora" not in name},
        checkpoints.restore(tmp_path / "base"),
    )


def test_adapter_merges_into_its_base(made: Made, tmp_path: Path) -> None:
    bridge.convert(made["adapter"], tmp_path / "merged", to="torch-merged", base=made["base"])
    assert bridge.verify(CHECKPOINT, tmp_path / "merged", lora_alpha=ALPHA, rtol=1e-6).holds


# Sizes that no tensor's shape has.


def test_config_is_read_back(made: Made, tmp_path: Path) -> None:
    """Heads of 16: without the config, the stock 256 would fit neither."""
    hand = tmp_path / "hand"
    hand.mkdir()
    shutil.copy(HOME / "expected_merged.safetensors", hand / "model.safetensors")
    with pytest.raises(Refusal, match=r"cannot infer paligemma\.dim") as refused:
        bridge.plan(hand, None, to="orbax")
    assert "num_attention_heads, head_dim" in refused.value.problems[0].fix
    shutil.copy(made["merged"] / "config.json", hand)
    bridge.convert(hand, tmp_path / "orbax", to="orbax", dtype="keep")
    assert checkpoints.restore(tmp_path / "orbax").keys() == {n for n in source() if "lora" not in n}


def test_one_leaf_for_q_k_and_v(tmp_path: Path) -> None:
    """As openpi stores them where there are as many kv heads as heads."""
    whole = checkpoints.pi0_tree(lora={"paligemma": 5}, kv_heads=7)
    expert = re.compile("llm.*_1|^[a-z]")
    tree = {name: leaf for name, leaf in whole.items() if not expert.search(name)}
    checkpoints.save(tree, tmp_path / "jax", quick=True)
    bridge.convert(tmp_path / "jax", tmp_path / "base", to="torch-base")
    text = json.loads((tmp_path / "base" / "config.json").read_text())["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]) == (7, 7, 11)
    bridge.convert(tmp_path / "jax", tmp_path / "adapter", to="peft-adapter", lora_alpha=5)
    bridge.convert(tmp_path / "adapter", tmp_path / "joined", to="orbax", base=tmp_path / "base")
    joined(tree, checkpoints.restore(tmp_path / "joined"))


def test_alpha_is_asked_for_unless_the_rank_is_stock(made: Made) -> None:
    with pytest.raises(Refusal, match="rank 4 with unknown alpha") as refused:
        bridge.plan(CHECKPOINT, None, to="torch-merged")
    assert "--lora-alpha paligemma=ALPHA" in refused.value.problems[0].fix
    stock = bridge.plan(made["adapter"], None, to="orbax", base=made["base"], rank=16, lora_alpha=None)
    assert stock.scales["paligemma"].alpha == 16


# What is what.


@pytest.mark.parametrize("form", ["merged", "merged-lerobot", "base", "adapter", "adapter-lerobot"])
def test_forms_are_recognized(form: str, made: Made) -> None:
    described = bridge.describe(made[form])
    assert (described.model, described.problems) == ("pi0_fast", ())
    assert described.layout == ("lerobot" if form.endswith("lerobot") else "transformers")


def test_checkpoint_is_recognized() -> None:
    described = bridge.describe(CHECKPOINT)
    assert (described.model, described.state, described.problems) == ("pi0_fast", "orbax[base+lora]", ())
    parts = {part.name: (part.trained, part.lora) for part in described.parts}
    assert {name: trained for name, (trained, _) in parts.items()} == {
        "siglip": "in full",
        "projector": "in full",
        "paligemma": "LoRA",
    }


@pytest.mark.parametrize(("name", "model"), [("pi0_lora", "pi0"), ("pi05_lora", "pi05"), ("pi0_base", "pi0")])
def test_other_models_are_not_taken_for_it(name: str, model: str, made: Made, tmp_path: Path) -> None:
    other = golden.golden(name)
    assert bridge.describe(other.checkpoint).model == model
    for layout in ("openpi", "lerobot"):
        bridge.convert(other.checkpoint, tmp_path / layout, to="torch-merged", layout=layout, **other.options)
        assert bridge.describe(tmp_path / layout).model == model
    with pytest.raises(CheckpointRefused, match=f"is {model} but .* is pi0_fast"):
        bridge.diff(tmp_path / "lerobot", made["merged-lerobot"])


@pytest.mark.parametrize("name", ["pi0_lora", "pi05_lora"])
def test_base_decides_where_paths_are_of_several_models(name: str, made: Made, tmp_path: Path) -> None:
    """LeRobot wraps pi0's PaliGemma as it wraps this one: without a record, paths do not tell them apart."""
    ours = tmp_path / "ours"
    shutil.copytree(made["adapter-lerobot"], ours)
    (ours / "bridge.json").unlink()
    bridge.convert(ours, tmp_path / "joined", to="orbax", base=made["base-lerobot"], rank=4, lora_alpha=ALPHA)
    joined(source(), checkpoints.restore(tmp_path / "joined"))
    assert bridge.verify(CHECKPOINT, ours, base=made["base-lerobot"], lora_alpha=ALPHA).holds

    other = golden.golden(name)
    bridge.convert(other.checkpoint, tmp_path / "base", to="torch-base", layout="lerobot")
    bridge.convert(
        other.checkpoint, tmp_path / "adapter", to="peft-adapter", layout="lerobot", **other.options
    )
    _without_expert(tmp_path / "adapter")
    plan = bridge.plan(
        tmp_path / "adapter", None, to="orbax", base=tmp_path / "base", lora_alpha=8, rank={"paligemma": 4}
    )
    assert (plan.inputs.model.name, list(plan.scales)) == (other.facts["model"], ["paligemma"])


def _without_expert(adapter: Path) -> None:
    """Leave the modules of PaliGemma alone, as an adapter that was trained on them has."""
    (adapter / "bridge.json").unlink()
    state = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "gemma_expert" not in name}
    assert 0 < len(kept) < len(state)
    safetensors.torch.save_file(kept, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "exclude_modules": ".*gemma_expert.*"})
    )


# Words.


def test_nothing_speaks_of_another_models_parts(made: Made, tmp_path: Path) -> None:
    spoken = []
    for options, scaled in RECIPES.values():
        plan = bridge.plan(
            CHECKPOINT, tmp_path / "out", **options, **({"lora_alpha": ALPHA} if scaled else {})
        )
        spoken += [plan.text(), *plan.notes]
        spoken += [
            file.decode() for name, file in plan.output.files.items() if name.endswith((".md", ".json"))
        ]
    spoken.append(bridge.plan(made["adapter"], None, to="orbax", base=made["base"]).text())
    text = "\n".join(spoken).replace("paligemma_with_expert", "")
    assert not re.findall(r"(?i)expert|projections|\bpi0\b|\bpi05\b|PI0Pytorch", text)
    card = (
        bridge.plan(CHECKPOINT, None, to="peft-adapter", lora_alpha=ALPHA).output.files["README.md"].decode()
    )
    assert "| paligemma | 4 | 8 | 2 |" in card
    assert "trains vision tower and projector in full" in card
    assert "PaliGemmaForConditionalGeneration.from_pretrained" in card


STEPS = [
    "rename_observations_processor", "to_batch_processor", "relative_actions_processor", "normalizer_processor",
    "pi0_fast_prepare_state_tokenizer_processor_step", "tokenizer_processor", "action_tokenizer_processor",
    "device_processor",
]  # fmt: skip


def test_lerobots_processors_normalise_by_quantiles(made: Made) -> None:
    """As openpi does; LeRobot's code has its sizes built in, so the config of others is left out."""
    plan = bridge.plan(CHECKPOINT, None, to="torch-merged", layout="lerobot", lora_alpha=ALPHA)
    assert [
        note
        for note in plan.notes
        if note.startswith("no config.json: LeRobot knows only the sizes of gemma_2b, and")
    ]
    assert "config.json" not in plan.output.files
    steps = json.loads(plan.output.files["policy_preprocessor.json"])["steps"]
    assert [step["registry_name"] for step in steps] == STEPS
    assert steps[3]["config"]["norm_map"] == {
        "VISUAL": "IDENTITY",
        "STATE": "QUANTILES",
        "ACTION": "QUANTILES",
    }
    # LeRobot would pad the state before it becomes words
    assert steps[4]["config"] == {"max_state_dim": 8}
    assert steps[5]["config"]["max_length"] == 250
    config = json.loads((made["adapter-lerobot"] / "config.json").read_text())
    assert config == {"type": "pi0_fast", "use_peft": True}


def test_the_horizon_is_openpis(tmp_path: Path) -> None:
    plan = bridge.plan(CHECKPOINT, None, to="torch-merged", lora_alpha=ALPHA)
    assert (plan.facts["action_horizon"].value, plan.facts["action_horizon"].assumed) == (32, True)
    out = tmp_path / "out"
    bridge.convert(CHECKPOINT, out, to="torch-merged", lora_alpha=ALPHA, action_horizon=10)
    assert json.loads((out / "policy_facts.json").read_text())["action_horizon"] == 10
    (out / "bridge.json").unlink()
    assert bridge.plan(out, None, to="orbax").facts["action_horizon"].value == 10
