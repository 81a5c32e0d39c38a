"""Adapters in other names, dtypes and ranks, against what the real PEFT makes of them before and after."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig

import bridge
from bridge import Refusal
from tests.kit import checkpoints, golden, peft
from tests.kit.golden import DEAD_HEAD, EMBED_TOKENS, LM_HEAD, State
from tests.kit.layouts import named, write

LAYOUTS = ("openpi", "lerobot", "transformers")
PATCHES = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.weight"

#: ranks, alphas and layers that differ, a kind of linear layer of each part, and weights that are saved whole
CONFIG: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj", "down_proj", "fc1", "action_out_proj"],
    "layers_to_transform": [0, 2],
    "r": 3,
    "lora_alpha": 7,
    "rank_pattern": {"down_proj": 5},
    "alpha_pattern": {"v_proj": 2.5},
    "modules_to_save": ["patch_embedding", "state_proj"],
    "lora_dropout": 0.125,
}


@pytest.fixture(scope="module")
def base() -> State:
    tree = checkpoints.pi0_tree(lora={}, layers=3, image_layers=1)
    return {name: weight.clone() for name, weight in golden.by_hand(tree).items()}


def train(state: State, config: LoraConfig, directory: Path) -> State:
    """As LeRobot leaves it: the adapter, and the ``config.json`` that says of which model."""
    merged = peft.train(state, config, directory)
    (directory / "config.json").write_text('{"type": "pi0", "use_peft": true}')
    return merged


@pytest.fixture(scope="module")
def trained(base: State, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """An adapter as LeRobot's modules are named, and what PEFT merges."""
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    return directory, train(named(base, "lerobot"), LoraConfig(**CONFIG), directory)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_makes_the_same_of_it(
    layout: str, base: State, trained: tuple[Path, State], tmp_path: Path
) -> None:
    adapter, merged = trained
    plan = bridge.plan(adapter, tmp_path / "out", to="peft-adapter", layout=layout)
    assert [edge.name for edge in plan.route] == ["relayout"]
    assert plan.loss.name == "EXACT"
    result = plan.run()
    assert result.proof is not None and result.proof.largest == 0
    bridge.convert(tmp_path / "out", tmp_path / "back", to="peft-adapter", layout="lerobot")
    assert not golden.differing(peft.tensors_of(adapter), peft.tensors_of(tmp_path / "back"))

    theirs = peft.merged_by_peft(peft.load_adapter(named(base, layout), tmp_path / "out"))
    ours = {name.removeprefix("model."): weight for name, weight in merged.items()}
    ours = {name: weight for name, weight in ours.items() if name != EMBED_TOKENS or layout == "openpi"}
    expected = named(ours, layout)
    assert not golden.differing({name: expected[name] for name in theirs}, theirs)

    config = peft.config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7, 0.125)
    # no layer that the adapter leaves alone
    assert not re.search(r"\\d|\b1\b", config["target_modules"])


def test_every_tensor_keeps_its_dtype(trained: tuple[Path, State], tmp_path: Path) -> None:
    tensors = peft.tensors_of(trained[0])
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {name: tensors[name].to(kinds[n % 3]) for n, name in enumerate(sorted(tensors))}
    shutil.copytree(trained[0], tmp_path / "mixed")
    safetensors.torch.save_file(tensors, tmp_path / "mixed" / peft.WEIGHTS, {"format": "pt"})
    bridge.convert(tmp_path / "mixed", tmp_path / "there", to="peft-adapter", layout="transformers")
    bridge.convert(tmp_path / "there", tmp_path / "back", to="peft-adapter", layout="lerobot")
    assert not golden.differing(tensors, peft.tensors_of(tmp_path / "back"))
    narrow = bridge.plan(tmp_path / "mixed", tmp_path / "narrow", to="peft-adapter", dtype="bfloat16")
    assert narrow.loss.name == "ROUNDED"
    narrow.run()
    assert {t.dtype for t in peft.tensors_of(tmp_path / "narrow").values()} == {torch.bfloat16}


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_stay_what_they_are(rslora: bool, base: State, tmp_path: Path) -> None:
    config = LoraConfig(**{**CONFIG, "modules_to_save": None}, use_rslora=rslora)
    train(named(base, "lerobot"), config, tmp_path / "adapter")
    bridge.convert(tmp_path / "adapter", tmp_path / "out", to="peft-adapter")
    before = peft.lora_modules(peft.load_adapter(named(base, "lerobot"), tmp_path / "adapter"))
    after = peft.lora_modules(peft.load_adapter(base, tmp_path / "out"))
    assert {name.removeprefix("model."): m.scaling["default"] for name, m in before.items()} == {
        name: module.scaling["default"] for name, module in after.items()
    }
    assert peft.config_of(tmp_path / "out")["use_rslora"] == rslora


@pytest.mark.parametrize("rslora", [False, True])
def test_a_smaller_rank_is_the_best_there_is(rslora: bool, base: State, tmp_path: Path) -> None:
    config = LoraConfig(**{**CONFIG, "modules_to_save": None}, use_rslora=rslora)
    train(named(base, "lerobot"), config, tmp_path / "adapter")
    plan = bridge.plan(tmp_path / "adapter", tmp_path / "out", to="peft-adapter", rank=3)
    assert plan.loss.name == "ROUNDED"
    plan.run()
    before = peft.lora_modules(peft.load_adapter(named(base, "lerobot"), tmp_path / "adapter"))
    after = peft.lora_modules(peft.load_adapter(base, tmp_path / "out"))
    compressed = [note for note in plan.notes if note.startswith("compressed: ")]
    assert len(compressed) == 4 and all("down_proj" in note for note in compressed)
    for name, module in before.items():
        expected = module.get_delta_weight("default").double().numpy()
        found = after[name.removeprefix("model.")].get_delta_weight("default").double().numpy()
        gap = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        if "down_proj" not in name:
            assert gap == 0
            continue
        s = np.linalg.svd(expected, compute_uv=False)
        best = np.linalg.norm(s[3:]) / np.linalg.norm(s)
        assert best > 0.01 and abs(gap - best) < 1e-6
        (note,) = [note for note in compressed if name.removeprefix("model.") in note]
        assert f"{best:.2e}" in note


def test_its_base_comes_along_where_it_is_asked_for(
    base: State, trained: tuple[Path, State], tmp_path: Path
) -> None:
    """With a base, weights of any number of axes are compared: SigLIP's patches have four."""
    source = write(named(base, "lerobot"), tmp_path / "base", assets=False)
    options: dict[str, Any] = {"to": "peft-adapter", "layout": "openpi", "with_base": True}
    bridge.convert(trained[0], tmp_path / "out", base=source, **options)
    assert not golden.differing(base, golden.read(tmp_path / "out" / "base"))
    assert peft.config_of(tmp_path / "out")["base_model_name_or_path"] == "base"
    with pytest.raises(Refusal, match="--with-base needs the base"):
        bridge.plan(trained[0], None, **options)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep_alpha": True}, "--keep-alpha has no effect"),
        ({"modules_to_save": True}, "--modules-to-save has no effect"),
        ({"rank": {"expert": 2}}, "--rank is given by part"),
    ],
)
def test_options_without_effect_are_refused(
    given: dict[str, Any], says: str, trained: tuple[Path, State]
) -> None:
    with pytest.raises(Refusal, match=says):
        bridge.plan(trained[0], None, to="peft-adapter", **given)


def test_a_base_that_does_not_fit_is_refused(
    base: State, trained: tuple[Path, State], tmp_path: Path
) -> None:
    wide = {**base, PATCHES: torch.zeros(15, 3, 3, 3)}
    source = write(named(wide, "lerobot"), tmp_path / "base", assets=False)
    with pytest.raises(Refusal, match=r"patch_embedding\.weight is \[15, 3, 3, 3\] in the base"):
        bridge.convert(trained[0], tmp_path / "out", to="peft-adapter", base=source)
    assert not (tmp_path / "out").exists()


# What the runtime never applies.


@pytest.fixture(scope="module")
def heads(base: State, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, State]:
    """LoRA on both heads beside one on projections, trained on a LeRobot policy whose embedding moved."""
    home = tmp_path_factory.mktemp("heads")
    state = named(base, "lerobot")
    state[f"model.{EMBED_TOKENS}"] = state[f"model.{EMBED_TOKENS}"] * 1.0625
    config = LoraConfig(target_modules=["lm_head", "q_proj"], r=3, lora_alpha=7)
    merged = train(state, config, home / "adapter")
    # of PEFT, on two tensors
    assert torch.equal(merged[f"model.{EMBED_TOKENS}"], state[f"model.{EMBED_TOKENS}"])
    assert not torch.equal(merged[f"model.{LM_HEAD}"], state[f"model.{LM_HEAD}"])
    return home / "adapter", write(state, home / "base", assets=False), merged


def test_lora_on_a_head_changes_no_embedding(heads: tuple[Path, Path, State], tmp_path: Path) -> None:
    adapter, source, merged = heads
    plan = bridge.plan(adapter, tmp_path / "out", to="torch-merged", base=source, layout="lerobot")
    left_out = [note for note in plan.notes if "never applies it" in note]
    assert len(left_out) == 4  # both factors of either head
    assert all("lm_head.lora_" in note for note in left_out)
    plan.run()
    found = golden.read(tmp_path / "out")
    assert torch.equal(found[f"model.{EMBED_TOKENS}"], merged[f"model.{EMBED_TOKENS}"])
    assert torch.equal(found[f"model.{LM_HEAD}"], merged[f"model.{EMBED_TOKENS}"])
    unused = {f"model.{name}" for name in (LM_HEAD, DEAD_HEAD)}
    for name in merged.keys() - unused:
        torch.testing.assert_close(found[name], merged[name], rtol=1e-5, atol=1e-6)
    verdict = bridge.verify(adapter, tmp_path / "out", base=source)
    assert verdict.holds
    assert {name for name in verdict.unused if "lora" in name} == {
        f"base_model.model.model.{head.removesuffix('.weight')}.lora_{each}.weight"
        for head in (LM_HEAD, DEAD_HEAD)
        for each in "AB"
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_elsewhere_is_without_them(
    layout: str, heads: tuple[Path, Path, State], tmp_path: Path
) -> None:
    plan = bridge.plan(heads[0], tmp_path / "out", to="peft-adapter", layout=layout)
    assert len([note for note in plan.notes if "never applies it" in note]) == 4
    plan.run()
    assert {name.split(".")[-3] for name in peft.tensors_of(tmp_path / "out")} == {"q_proj"}


def test_whole_weights_stand_in_under_the_name_that_is_used(base: State, tmp_path: Path) -> None:
    state = named(base, "lerobot")
    config = LoraConfig(
        target_modules=["q_proj"], r=3, lora_alpha=7, modules_to_save=["embed_tokens", "lm_head"]
    )
    merged = train(state, config, tmp_path / "adapter")
    source = write(state, tmp_path / "base", assets=False)
    bridge.convert(tmp_path / "adapter", tmp_path / "out", to="torch-merged", base=source)
    embedding = merged[f"model.{EMBED_TOKENS}"]
    assert not torch.equal(embedding, base[LM_HEAD])
    assert torch.equal(golden.read(tmp_path / "out")[LM_HEAD], embedding)
    bridge.convert(tmp_path / "adapter", tmp_path / "relaid", to="peft-adapter")
    whole = {name for name in peft.tensors_of(tmp_path / "relaid") if "lora" not in name}
    assert whole == {f"base_model.model.{EMBED_TOKENS}"}
    both = {**base, EMBED_TOKENS: base[LM_HEAD]}
    again = peft.merged_by_peft(peft.load_adapter(both, tmp_path / "relaid"))
    assert torch.equal(again[EMBED_TOKENS], embedding)


def test_a_head_that_is_used_and_tied_is_refused(tmp_path: Path) -> None:
    """pi0-FAST reads tokens by the tensor that predicts them: LoRA on one of two has no place in JAX."""
    source = golden.DATA / "pi0_fast_lora" / "checkpoint" / "3"
    bridge.convert(
        source, tmp_path / "adapter", to="peft-adapter", layout="lerobot", lora_alpha={"paligemma": 8}
    )
    (tmp_path / "adapter" / "bridge.json").unlink()
    tensors = peft.tensors_of(tmp_path / "adapter")
    stem = f"{peft.PREFIX}model.paligemma_with_expert.paligemma.lm_head.lora_"
    tensors |= {f"{stem}A.weight": torch.ones(4, 64), f"{stem}B.weight": torch.ones(512, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter" / peft.WEIGHTS, {"format": "pt"})
    # under these names it may be a pi0, which uses no head: the base says what it is
    bridge.convert(source, tmp_path / "base", to="torch-base", layout="lerobot")
    with pytest.raises(Refusal) as caught:
        bridge.convert(tmp_path / "adapter", tmp_path / "out", to="torch-merged", base=tmp_path / "base")
    says = [problem.cause for problem in caught.value.problems]
    assert len(says) == 2 and all("openpi has one tensor for it and" in cause for cause in says)
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_adapters_own_numbers(trained: tuple[Path, State]) -> None:
    files = bridge.plan(trained[0], None, to="peft-adapter").output.files
    rows = [line for line in files["README.md"].decode().splitlines() if line.startswith("| expert")]
    assert set(rows) == {
        "| expert | rank | alpha | scale |",
        "| expert | 3 | 7 | 2.33333 |",
        "| expert | 3 | 2.5 | 0.833333 |",
        "| expert | 5 | 7 | 1.4 |",
    }
    assert json.loads(files[peft.CONFIG])["rank_pattern"]
