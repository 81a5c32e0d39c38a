"""What trainers leave: prefixes, wrappers, whole models with LoRA in them, heads that no model has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bridge
from bridge import Refusal
from tests.kit import checkpoints, trainers
from tests.kit.checkpoints import Array
from tests.kit.trainers import Tensors

EXPERT = "paligemma_with_expert.gemma_expert.model.layers"
GEMMA = "paligemma_with_expert.paligemma.model.language_model.layers"
#: rank of LoRA by module; alphas below differ from the ranks
RANKS = {
    **{f"{GEMMA}.{n}.self_attn.q_proj": 2 for n in range(2)},
    **{f"{EXPERT}.{n}.{name}": 3 for n in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")},
}
ALPHAS = {"paligemma": 8.0, "expert": 5.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def plain(home: Path) -> Tensors:
    return trainers.policy(home)


@pytest.fixture(scope="module")
def expected(home: Path, plain: Tensors) -> Tensors:
    """What the plain input becomes."""
    return trainers.leaves(trainers.save(plain, home / "plain"), home / "expected")


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "DistributedDataParallel": (prefixed("module."), "the prefix module. is taken off all 89 names"),
    "torch.compile": (prefixed("_orig_mod."), "_orig_mod taken out of the names: a trainer's wrapper"),
    "both": (prefixed("module._orig_mod."), "the prefix module. is taken off all 89 names"),
    "one's own module": (prefixed("policy.net."), "the prefix policy.net. is taken off all 89 names"),
    "PEFT without LoRA": (
        prefixed("base_model.model."),
        "the prefix base_model.model. is taken off all 89 names",
    ),
    "PEFT twice": (
        prefixed("base_model.model.base_model.model."),
        "the prefix base_model.model.base_model.model. is taken off all 89 names",
    ),
    "a part compiled": (
        lambda name: name.replace("gemma_expert.", "gemma_expert._orig_mod."),
        "_orig_mod taken out of the names: a trainer's wrapper",
    ),
    "FSDP, nested": (
        lambda name: "_fsdp_wrapped_module." + name.replace(".layers.", ".layers._fsdp_wrapped_module."),
        "_fsdp_wrapped_module taken out of the names: a trainer's wrapper",
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_taken_off_and_reported(
    tmp_path: Path, plain: Tensors, expected: Tensors, wrapper: str
) -> None:
    rename, note = WRAPPED[wrapper]
    source = trainers.save(trainers.renamed(plain, rename), tmp_path / "src")
    assert note in bridge.plan(source, None, to="orbax", size=trainers.SIZES).notes
    assert trainers.same(trainers.leaves(source, tmp_path / "out"), expected)


def test_two_names_that_would_become_one_are_refused(tmp_path: Path, plain: Tensors) -> None:
    twice = {**plain, "_orig_mod.action_out_proj.bias": plain["action_out_proj.bias"] + 1}
    source = trainers.save(twice, tmp_path / "src")
    with pytest.raises(Refusal, match=r"tensor _orig_mod\.action_out_proj\.bias is not part of pi0"):
        bridge.convert(source, tmp_path / "out", to="orbax", size=trainers.SIZES)
    assert not (tmp_path / "out").exists()


# Adapters behind wrappers.


def adapter(plain: Tensors, ending: str = ".lora_{}.weight", prefix: str = "base_model.model.") -> Tensors:
    found: Tensors = {}
    for module, rank in RANKS.items():
        for which, matrix in zip("AB", trainers.factors(plain, module, rank), strict=True):
            found[prefix + module + ending.format(which)] = matrix
    return found


CONFIG = {
    "peft_type": "LORA", "r": 3, "lora_alpha": 5.0, "rank_pattern": {r".*paligemma\..*": 2},
    "alpha_pattern": {r".*paligemma\..*": 8.0}, "target_modules": ["q_proj", "up_proj"],
    "exclude_modules": r".*(vision_tower.*|language_model.*up_proj)",
}  # fmt: skip


def save_adapter(tensors: Mapping[str, Array], directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG))
    return directory


def merged(path: Path, out: Path, **options: object) -> Tensors:
    bridge.convert(path, out, **{"to": "torch-merged", "dtype": "float32", "layout": "openpi", **options})  # type: ignore[arg-type]
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def expected_merge(home: Path, plain: Tensors) -> Tensors:
    """What PEFT's own files of base and adapter become; the sums themselves are checked by hand below."""
    base = trainers.save(plain, home / "base")
    return merged(save_adapter(adapter(plain), home / "adapter"), home / "merged", base=base)


def test_the_expected_merge_is_w_plus_scale_times_b_a(plain: Tensors, expected_merge: Tensors) -> None:
    for module, rank in RANKS.items():
        a, b = trainers.factors(plain, module, rank)
        scale = ALPHAS["expert" if "gemma_expert" in module else "paligemma"] / rank
        by_hand = plain[f"{module}.weight"].astype(np.float64) + scale * b.astype(np.float64) @ a
        np.testing.assert_allclose(expected_merge[f"{module}.weight"], by_hand, rtol=0, atol=2e-6)
    rest = plain.keys() - {f"{module}.weight" for module in RANKS}
    assert all(expected_merge[name].tobytes() == plain[name].tobytes() for name in rest)


@pytest.mark.parametrize(
    ("prefix", "ending", "note"),
    [
        ("base_model.model.base_model.model.", ".lora_{}.weight",
         "the prefix base_model.model.base_model.model. of all names is read as base_model.model."),
        ("module.base_model.model.", ".lora_{}.weight",
         "the prefix module.base_model.model. of all names is read as base_model.model."),
        ("_orig_mod.base_model.model.", ".lora_{}.weight", "_orig_mod taken out of the names: a trainer's wrapper"),
        ("base_model.model.", ".lora_{}.default.weight",
         "the adapter's name is taken out of the names of its factors"),
    ],
)  # fmt: skip
def test_an_adapter_behind_wrappers(
    tmp_path: Path, home: Path, plain: Tensors, expected_merge: Tensors, prefix: str, ending: str, note: str
) -> None:
    source = save_adapter(adapter(plain, ending, prefix), tmp_path / "src")
    assert note in bridge.plan(source, None, to="torch-merged", base=home / "base").notes
    assert trainers.same(merged(source, tmp_path / "out", base=home / "base"), expected_merge)


# A base and its adapter in one file.


def peft_whole(plain: Tensors) -> Tensors:
    """The state_dict of a PeftModel: base layers inside LoRA layers, factors of the adapter `default`."""
    moved = {f"{module}.weight": f"{module}.base_layer.weight" for module in RANKS}
    whole = {f"base_model.model.{moved.get(name, name)}": tensor for name, tensor in plain.items()}
    return whole | adapter(plain, ".lora_{}.default.weight")


def openpi_whole(plain: Tensors) -> Tensors:
    """openpi's LoRALinear (pull request 854): lora_a (rank, in) and lora_b (out, rank) beside the weight."""
    lower = {name.replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b"): tensor
             for name, tensor in adapter(plain, ".lora_{}", "").items()}  # fmt: skip
    return plain | lower


WHOLE = {"PEFT": peft_whole, "openpi": openpi_whole}


@pytest.mark.parametrize("whose", WHOLE)
def test_a_whole_model_with_lora_merges(
    tmp_path: Path, plain: Tensors, expected_merge: Tensors, whose: str
) -> None:
    source = trainers.save(WHOLE[whose](plain), tmp_path / "src")
    plan = bridge.plan(source, None, to="torch-merged", lora_alpha=ALPHAS)
    assert (
        "89 weights and the LoRA factors of 6 modules: a base and its adapter in one file (--item base or --item "
        "adapter takes one)"
    ) in plan.notes
    assert trainers.same(merged(source, tmp_path / "out", lora_alpha=ALPHAS), expected_merge)


def test_the_config_beside_a_whole_model_has_its_alphas(
    tmp_path: Path, plain: Tensors, expected_merge: Tensors
) -> None:
    source = trainers.save(peft_whole(plain), tmp_path / "src")
    (source / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert trainers.same(merged(source, tmp_path / "out"), expected_merge)


def test_an_adapter_that_was_lost_beside_its_base(tmp_path: Path, plain: Tensors, expected: Tensors) -> None:
    source = trainers.save(plain, tmp_path / "src")
    (source / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(Refusal, match=r"adapter_config\.json, but no LoRA factors"):
        bridge.plan(source, None, to="orbax", size=trainers.SIZES)
    assert trainers.same(trainers.leaves(source / "model.safetensors", tmp_path / "out"), expected)


@pytest.mark.parametrize("whose", WHOLE)
def test_a_whole_model_with_lora_is_joined_as_base_and_adapter_are(
    tmp_path: Path, home: Path, plain: Tensors, whose: str
) -> None:
    source = trainers.save(WHOLE[whose](plain), tmp_path / "src")
    joined = trainers.leaves(source, tmp_path / "out", lora_alpha=ALPHAS)
    apart = trainers.leaves(home / "adapter", tmp_path / "apart", base=home / "base")
    assert any("lora_a" in name for name in joined)
    assert trainers.same(joined, apart)


def test_the_adapter_alone(tmp_path: Path, home: Path, plain: Tensors, expected_merge: Tensors) -> None:
    source = trainers.save(peft_whole(plain), tmp_path / "src")
    bridge.convert(source, tmp_path / "out", to="peft-adapter", lora_alpha=ALPHAS)
    alone = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert trainers.same(alone, adapter(plain))
    # the alphas that no file had are in its config now
    assert trainers.same(merged(tmp_path / "out", tmp_path / "merged", base=home / "base"), expected_merge)


def test_the_base_alone(tmp_path: Path, plain: Tensors, expected: Tensors) -> None:
    source = trainers.save(peft_whole(plain), tmp_path / "src")
    assert trainers.same(trainers.leaves(source, tmp_path / "out", item="base"), expected)
    with pytest.raises(Refusal, match="without a base"):
        bridge.plan(source, None, to="torch-merged", item="adapter", lora_alpha=ALPHAS)
    with pytest.raises(Refusal, match="has no item ema") as refused:
        bridge.plan(source, None, to="torch-merged", item="ema", lora_alpha=ALPHAS)
    assert "leave --item out for both, or give base or adapter" in refused.value.problems[0].fix


def test_an_alpha_that_no_file_tells_is_asked_for(tmp_path: Path, plain: Tensors) -> None:
    source = trainers.save(peft_whole(plain), tmp_path / "src")
    with pytest.raises(Refusal) as refused:
        bridge.convert(source, tmp_path / "out", to="torch-merged", lora_alpha={"expert": 5})
    (problem,) = refused.value.problems
    assert problem.cause == f"{source}: paligemma has LoRA of rank 2, and no file tells its alpha"
    assert problem.fix.startswith("add --lora-alpha paligemma=ALPHA")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refusal, match="--lora-alpha names siglip, which has no LoRA in it"):
        bridge.convert(source, tmp_path / "out", to="torch-merged", lora_alpha={**ALPHAS, "siglip": 5})


def test_diff_reads_a_whole_model(tmp_path: Path, home: Path, plain: Tensors) -> None:
    source = trainers.save(peft_whole(plain), tmp_path / "src")
    changed = {each.name for each in bridge.diff(home / "base", source, lora_alpha=ALPHAS).changed}
    assert changed == {f"{module}.weight" for module in RANKS}


def test_two_adapters_in_one_file_are_refused(tmp_path: Path, plain: Tensors) -> None:
    both = peft_whole(plain) | adapter(plain, ".lora_{}.second.weight")
    with pytest.raises(Refusal, match="several adapters in one file"):
        bridge.plan(trainers.save(both, tmp_path / "src"), None, to="torch-merged", lora_alpha=ALPHAS)


def test_modules_to_save_of_a_whole_model_win(
    tmp_path: Path, plain: Tensors, expected_merge: Tensors
) -> None:
    whole = peft_whole(plain)
    trained = {}
    for name in ("action_out_proj.weight", "action_out_proj.bias"):
        module, _, kind = name.rpartition(".")
        whole[f"base_model.model.{module}.original_module.{kind}"] = whole.pop(f"base_model.model.{name}")
        trained[name] = plain[name] + 1
        whole[f"base_model.model.{module}.modules_to_save.default.{kind}"] = trained[name]
    source = trainers.save(whole, tmp_path / "src")
    made = merged(source, tmp_path / "out", lora_alpha=ALPHAS)
    assert trainers.same(made, {**expected_merge, **trained})


# Arrays that no model has.

HEAD = {"value_head.0.weight": np.ones((3, 17), np.float32), "value_head.0.bias": np.ones(3, np.float32)}


def test_an_extra_head_is_refused_and_can_be_left_out(
    tmp_path: Path, plain: Tensors, expected: Tensors
) -> None:
    source = trainers.save(plain | HEAD, tmp_path / "src")
    with pytest.raises(Refusal) as refused:
        bridge.convert(source, tmp_path / "out", to="orbax", size=trainers.SIZES)
    assert {problem.cause for problem in refused.value.problems} == {
        f"{source}: tensor {name} is not part of pi0" for name in HEAD
    }
    assert "add --leave-out 'value_head.0." in refused.value.problems[0].fix
    assert not (tmp_path / "out").exists()
    plan = bridge.plan(source, None, to="orbax", size=trainers.SIZES, leave_out=["value_head.*"])
    assert "left out, as --leave-out says: value_head.0.weight" in plan.notes
    assert trainers.same(trainers.leaves(source, tmp_path / "out", leave_out=["value_head.*"]), expected)
    record = json.loads((tmp_path / "out" / "bridge.json").read_text())
    assert record["sources"]["source"]["left_out"] == {
        "value_head.0.bias": "float32[3]",
        "value_head.0.weight": "float32[3, 17]",
    }
    assert not bridge.diff(source, tmp_path / "out", leave_out=["value_head.*"]).changed


def test_an_extra_leaf_of_a_tree(tmp_path: Path) -> None:
    tree = checkpoints.pi0_tree(layers=2)
    extra = {"value_head/kernel": np.ones((3, 2), np.float32)}
    source = checkpoints.save(tree | extra, tmp_path / "src", quick=True)
    with pytest.raises(Refusal) as refused:
        bridge.plan(source, None, to="torch-base")
    assert "add --leave-out 'value_head/kernel'" in refused.value.problems[0].fix
    notes = bridge.plan(source, None, to="torch-base", leave_out="value_head/kernel").notes
    assert "left out, as --leave-out says: params/value_head/kernel/value" in notes
    with pytest.raises(Refusal, match=r"which is LoRA: --to torch-base writes the model without it"):
        bridge.plan(source, None, to="torch-merged", leave_out=["*lora_a*", "value_head/*"])


def test_the_library_leaves_out_and_takes_apart_as_well(tmp_path: Path, plain: Tensors) -> None:
    source = trainers.save(plain | HEAD, tmp_path / "src")
    state = bridge.load_torch(source, leave_out=["value_head.*"])
    assert plain.keys() <= state.keys() and not state.keys() & HEAD.keys()
    whole = trainers.save(peft_whole(plain), tmp_path / "whole")
    base = bridge.load_torch(whole, item="base")
    assert trainers.same({name: base[name].numpy() for name in plain}, plain)


def test_a_head_beside_a_wrapped_model(tmp_path: Path, plain: Tensors, expected: Tensors) -> None:
    source = trainers.save(trainers.renamed(plain, prefixed("policy.")) | HEAD, tmp_path / "src")
    assert trainers.same(trainers.leaves(source, tmp_path / "out", leave_out="value_head.*"), expected)


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        (
            "action_out_proj.bias",
            r"--leave-out 'action_out_proj\.bias' matches action_out_proj\.bias, which pi0 has",
        ),
        ("*", r"--leave-out '\*' matches .*, which pi0 has"),
        (
            "*lora*",
            r"--leave-out '\*lora\*' matches .*lora_A.*, which is LoRA: --item base reads the model without it",
        ),
        ("value_heads.*", r"--leave-out 'value_heads\.\*' matches no array"),
    ],
)
def test_what_the_model_needs_is_not_left_out(
    tmp_path: Path, plain: Tensors, pattern: str, cause: str
) -> None:
    source = trainers.save(peft_whole(plain) if "lora" in pattern else plain, tmp_path / "src")
    with pytest.raises(Refusal, match=cause):
        bridge.convert(source, tmp_path / "out", to="orbax", size=trainers.SIZES, leave_out=[pattern])
    assert not (tmp_path / "out").exists()
