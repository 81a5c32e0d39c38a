"""Adapters as lerobot-train leaves them, joined to their base for openpi: LoRA where openpi has it, the rest folded.

The oracle is PEFT's own forward; openpi's equations, written by hand, run what Orbax restores.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig

import bridge
from bridge.errors import Refusal
from tests.kit import checkpoints, golden, peft
from tests.kit.checkpoints import Array, Tree
from tests.kit.golden import DATA, TOLERANCE
from tests.kit.openpi_lora import dead_ranks, jax_gradients, online, stems, untrained_after_a_step
from tests.kit.record import Record

LEROBOT = DATA / "lerobot"
ADAPTERS = {
    name: LEROBOT / name / "checkpoints" / "000003" / "pretrained_model" for name in ("peft_pi0", "qv_pi0")
}
BASE = LEROBOT / "base_pi0"
#: the head counts, which no shape tells
SIZE = {"paligemma.head": 8, "siglip.head": 4}
#: what LeRobot trains beside the attention of the expert by default
DENSE = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
#: how it is joined, and openpi's alpha / rank then
JOINED: dict[str, tuple[dict[str, Any], float]] = {
    "stock rank": ({}, 1.0),
    "its own rank": ({"rank": 4, "lora_alpha": 6.0}, 1.5),
}


def dense(leaves: Mapping[str, Array], name: str, x: Array) -> Array:
    """`nnx.Linear`, in float32."""
    kernel, bias = (leaves[f"{name}/{part}"].astype(np.float32) for part in ("kernel", "bias"))
    result: Array = x @ kernel + bias
    return result


def errors(model: Any, leaves: Mapping[str, Array], scale: float) -> dict[str, float]:
    """max |openpi - PEFT| / max |PEFT|, of every projection of both Gemmas and of every dense layer."""
    outputs = [(path, x, np.asarray(out)) for path, x, out in online(leaves, {"expert": scale})]
    rng = np.random.default_rng(5)
    for name in DENSE:
        x = rng.standard_normal((3, len(leaves[f"{name}/kernel"])), dtype=np.float32)
        outputs.append((name, x, dense(leaves, name, x)))
    found = {}
    with torch.no_grad():
        for path, x, out in outputs:
            expected = model.get_submodule(f"{peft.PREFIX}model.{path}")(torch.from_numpy(x)).numpy()
            found[path] = float(np.abs(out - expected).max() / np.abs(expected).max())
    return found


def adapted(model: Any) -> set[str]:
    return {path.removeprefix("model.") for path in peft.lora_modules(model)}


@pytest.mark.parametrize("how", ["stock rank", "its own rank"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_openpi_computes_what_peft_does(name: str, how: str, tmp_path: Path, record_property: Record) -> None:
    options, scale = JOINED[how]
    adapter = ADAPTERS[name]
    bridge.convert(adapter, tmp_path / "joined", to="orbax", base=BASE, size=SIZE, **options)
    leaves = checkpoints.restore(tmp_path / "joined")
    model = peft.load_adapter(golden.read(BASE), adapter)
    found = errors(model, leaves, scale)
    worst = max(found, key=found.__getitem__)
    record_property("relative error of modules", found[worst])
    print(f"{len(found)} modules, relative error {found[worst]:.2g} ({worst})")
    assert found[worst] <= TOLERANCE and len(found) == 2 * 3 * 7 + len(DENSE)
    with model.disable_adapter():
        off = errors(model, leaves, scale)
    # the comparison has teeth: what the adapter changes is far from the base's, and nothing else moved
    assert {path for path, error in off.items() if error > 1e-5} == adapted(model)

    assert len(stems(leaves)) == 5 and all("_1" in stem for stem in stems(leaves))
    assert dead_ranks(leaves) == dict.fromkeys(stems(leaves), 0)
    assert untrained_after_a_step(leaves) == []
    if (name, how) == ("peft_pi0", "stock rank"):
        # once by jax itself, which takes seconds to compile: layers are alike
        first = {leaf: array[:1] if "/layers/" in leaf else array for leaf, array in leaves.items()}
        gradient = jax_gradients(first, {"expert": scale})
        assert dead_ranks(first, gradient) == dict.fromkeys(stems(leaves), 0)
        assert untrained_after_a_step(first, gradient) == []

    verdict = bridge.verify(adapter, tmp_path / "joined", base=BASE, size=SIZE)
    assert verdict.holds, verdict.problems
    assert len(verdict.checks) == 106


def test_the_plan_names_what_is_folded() -> None:
    plan = bridge.plan(ADAPTERS["peft_pi0"], None, to="orbax", base=BASE, size=SIZE)
    assert (
        "openpi has no LoRA for 5 weights that the adapter changes: the change is summed into them"
        in plan.notes
    )
    summed = {note.removeprefix("summed into ") for note in plan.notes if note.startswith("summed into")}
    assert summed == {f"{name}.weight" for name in DENSE}
    assert plan.loss.name == "ROUNDED"
    unchanged = bridge.plan(ADAPTERS["qv_pi0"], None, to="orbax", base=BASE, size=SIZE)
    assert unchanged.loss.name == "EQUIVALENT" and not any("summed" in note for note in unchanged.notes)


def test_a_16_bit_base_does_not_round_the_change_away(tmp_path: Path) -> None:
    """What is folded is kept in float32, as openpi trains these layers; the rest keeps its dtype."""
    shutil.copytree(BASE, tmp_path / "base")
    state = {name: weight.to(torch.bfloat16) for name, weight in golden.read(BASE).items()}
    safetensors.torch.save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    kept: dict[str, Tree] = {}
    for dtype in (None, "keep", "bfloat16"):
        output = tmp_path / f"joined-{dtype}"
        bridge.convert(
            ADAPTERS["peft_pi0"], output, to="orbax", base=tmp_path / "base", size=SIZE, dtype=dtype
        )
        kept[str(dtype)] = checkpoints.restore(output)
    factors = peft.tensors_of(ADAPTERS["peft_pi0"])
    for name in DENSE:
        a, b = (factors[f"{peft.PREFIX}model.{name}.lora_{which}.weight"].double() for which in "AB")
        expected = (state[f"model.{name}.weight"].double() + 2 * b @ a).T.numpy()
        leaf = kept["None"][f"{name}/kernel"]
        assert leaf.dtype == np.float32
        assert np.abs(leaf - expected).max() <= 1e-7 * np.abs(expected).max()
        assert kept["keep"][f"{name}/kernel"].dtype.name == "bfloat16"
    wide = {leaf for leaf, array in kept["None"].items() if array.dtype == np.float32 and "lora" not in leaf}
    assert wide == {f"{name}/kernel" for name in DENSE}
    assert all(array.dtype.name == "bfloat16" for leaf, array in kept["bfloat16"].items() if "lora" in leaf)


def test_weights_saved_whole_are_taken_beside_both(tmp_path: Path) -> None:
    """LoRA that openpi has, LoRA that it has not, and `modules_to_save`, in one adapter."""
    state = golden.read(BASE)
    config = LoraConfig(
        target_modules=r".*gemma_expert.*\.(k|o|up|down)_proj|model\.(state_proj|action_time_mlp_out)",
        r=3,
        lora_alpha=7,
        modules_to_save=["action_out_proj", "action_in_proj"],
    )
    merged = peft.train(state, config, tmp_path / "adapter")
    bridge.convert(tmp_path / "adapter", tmp_path / "joined", to="orbax", base=BASE, size=SIZE)
    leaves = checkpoints.restore(tmp_path / "joined")
    for name in ("action_out_proj", "action_in_proj"):
        assert leaves[f"{name}/kernel"].tobytes() == merged[f"model.{name}.weight"].numpy().T.tobytes()
        assert leaves[f"{name}/bias"].tobytes() == merged[f"model.{name}.bias"].numpy().tobytes()
    model = peft.load_adapter(state, tmp_path / "adapter")
    found = errors(model, leaves, 1.0)
    assert max(found.values()) <= TOLERANCE
    assert not any(dead_ranks(leaves).values())
    verdict = bridge.verify(tmp_path / "adapter", tmp_path / "joined", base=BASE, size=SIZE)
    assert verdict.holds, verdict.problems


def refused(tmp_path: Path, says: str, base: Path, **options: Any) -> None:
    before = golden.files(tmp_path)
    with pytest.raises(Refusal, match=says) as caught:
        bridge.convert(tmp_path / "adapter", tmp_path / "new" / "joined", to="orbax", base=base, **options)
    assert any("--fold" in problem.fix for problem in caught.value.problems)
    assert golden.files(tmp_path) == before and not (tmp_path / "new").exists()


def test_an_adapter_of_dense_layers_alone_has_no_lora_to_join(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=r"model\.(state_proj|action_in_proj)", r=3, lora_alpha=7)
    peft.train(golden.read(BASE), config, tmp_path / "adapter")
    says = "openpi has no LoRA for any of the 2 weights that the adapter changes"
    refused(tmp_path, says, BASE, size=SIZE)


def test_a_weight_that_is_used_twice_takes_no_change_of_one_use(tmp_path: Path) -> None:
    """pi0-FAST's embedding, which is its head as well."""
    bridge.convert(DATA / "pi0_fast_lora" / "checkpoint" / "3", tmp_path / "base", to="torch-base")
    state = golden.read(tmp_path / "base")
    config = LoraConfig(target_modules=r".*language_model.*\.(v_proj|embed_tokens)", r=3, lora_alpha=7)
    peft.train(state, config, tmp_path / "adapter")
    says = r"embed_tokens\.weight has LoRA factors, but openpi ties this weight to another"
    refused(tmp_path, says, tmp_path / "base")
