"""verify and diff where weights come in many slabs, of other lengths on both sides, as all large ones do."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import bridge
from bridge.checkpoint.open import open_source
from bridge.compare.diff import diff
from bridge.formats.orbax import stream
from bridge.formats.safetensors import torch as torch_format
from bridge.proof.verify import verify
from tests.kit import checkpoints, golden
from tests.kit.forms import Form

ALPHA: dict[str, Any] = {"lora_alpha": {"paligemma": 8.0, "expert": 4.5}}
FILE = "model.safetensors"
LLM = golden.EXPERTS[0][2]
#: entries off by a fifth, in the first slab of a weight, in the last, in between
PLANTED = {
    "paligemma_with_expert.paligemma.lm_head.weight": (0, 0),
    f"{LLM}.layers.1.mlp.down_proj.weight": (-1, -1),
    f"{LLM}.layers.0.self_attn.k_proj.weight": (5, 6),
    "action_in_proj.weight": (-1, 3),
    "action_out_proj.bias": (-2,),
}  # fmt: skip
#: bytes of a slab: no row of some weights, a few rows of most
SLABS = (52, 740)
PAIRS = {
    "JAX with LoRA, merged": ("orbax", "float32"),
    "merged, JAX with LoRA": ("float32", "orbax"),
    "JAX with LoRA, merged in bfloat16": ("orbax", "bfloat16"),
    "merged in float32 and in bfloat16": ("float32", "bfloat16"),
    "merged in bfloat16 and in float32": ("bfloat16", "float32"),
    "an adapter on its base, merged in bfloat16": ("adapter", "bfloat16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Form]:
    """One policy in each form, and those of PyTorch with errors planted: ``"planted float32"``."""
    home = tmp_path_factory.mktemp("slabs")
    source = checkpoints.save(checkpoints.pi0_tree(layers=2), home / "7", quick=True)
    bridge.convert(source, home / "adapter", to="peft-adapter", **ALPHA)
    bridge.convert(source, home / "base", to="torch-base")
    forms = {"orbax": Form(source), "adapter": Form(home / "adapter", home / "base")}
    for dtype in ("float32", "bfloat16"):
        bridge.convert(source, home / dtype, to="torch-merged", dtype=dtype, **ALPHA)
        forms[dtype] = Form(home / dtype)
        state = safetensors.torch.load_file(home / dtype / FILE)
        for name, at in PLANTED.items():
            state[name][at] += 0.2 * state[name].abs().max()
        shutil.copytree(home / dtype, home / f"planted {dtype}")
        safetensors.torch.save_file(state, home / f"planted {dtype}" / FILE, golden.header(home / dtype))
        (home / f"planted {dtype}" / "bridge.json").unlink()  # its checksums would give them away
        forms[f"planted {dtype}"] = Form(home / f"planted {dtype}")
    return forms


@pytest.fixture(params=SLABS)
def slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The bytes of a slab, of both containers."""
    monkeypatch.setattr(stream, "SLAB_BYTES", request.param)
    # never in step with those of the other side
    monkeypatch.setattr(torch_format, "SLAB_BYTES", request.param * 3 // 2)
    yield request.param


@pytest.mark.parametrize("pair", PAIRS)
def test_verify_proves_what_comes_in_many_slabs(forms: dict[str, Form], slab: int, pair: str) -> None:
    a, b = (forms[name] for name in PAIRS[pair])
    verdict = verify(a.path, b.path, base=a.base or b.base, workers=1, **ALPHA)
    assert not verdict.problems and verdict.holds
    assert {check.name for check in verdict.checks} >= PLANTED.keys()


@pytest.mark.parametrize("pair", PAIRS)
def test_verify_sees_every_error_in_many_slabs(forms: dict[str, Form], slab: int, pair: str) -> None:
    a, b = (forms[f"planted {name}" if index == (PAIRS[pair][1] == "orbax") ^ 1 else name]
            for index, name in enumerate(PAIRS[pair]))  # fmt: skip
    verdict = verify(a.path, b.path, base=a.base or b.base, workers=1, **ALPHA)
    assert not verdict.holds
    assert {problem.cause.split(": ")[0] for problem in verdict.problems} == PLANTED.keys()
    for check in (check for check in verdict.checks if check.name in PLANTED):
        (cause,) = {
            problem.cause for problem in verdict.problems if problem.cause.startswith(f"{check.name}: ")
        }
        # the numbers that disagree, and what is allowed
        assert f"{check.relative:.1e} of" in cause and f"up to {check.max_abs:.1e}" in cause
        assert f"({check.allowed:.1e} allowed)" in cause or "(they must be equal)" in cause


@pytest.mark.parametrize("planted", ["", "planted "])
def test_diff_measures_what_comes_in_many_slabs(forms: dict[str, Form], slab: int, planted: str) -> None:
    """float32 against bfloat16: every distance as torch computes it of the whole tensors."""
    a, b = forms["float32"].path, forms[f"{planted}bfloat16"].path
    ours, theirs = (safetensors.torch.load_file(each / FILE) for each in (a, b))
    found = {each.name: each.relative for each in diff(a, b, workers=1).differences}
    assert found.keys() >= PLANTED.keys()
    for name, relative in found.items():
        gap = (ours[name].double() - theirs[name].double()).norm() / ours[name].double().norm()
        assert relative == pytest.approx(float(gap), rel=1e-5, abs=1e-12), name
        assert not planted or (relative > 0.004) == (name in PLANTED), name


def test_slabs_are_no_step_of_the_result(
    forms: dict[str, Form], monkeypatch: pytest.MonkeyPatch, slab: int
) -> None:
    """The same differences, factors included, as of weights in one slab each, to rounding of the sums."""
    a, b = forms["adapter"], forms["planted bfloat16"]

    def measured() -> dict[str, float]:
        return {each.name: each.relative for each in diff(a.path, b.path, base=a.base, workers=1).differences}

    small = measured()
    for module in (stream, torch_format):
        monkeypatch.setattr(module, "SLAB_BYTES", 8 << 20)
    assert small == pytest.approx(measured(), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("spoiled", [None, (0, 1), (16, 30)])
def test_factors_are_cut_with_the_rows_that_they_change(
    forms: dict[str, Form], tmp_path: Path, slab: int, spoiled: tuple[int, int] | None
) -> None:
    """LoRA on a layer whose rows are compared as they come, against a fold by hand."""
    base = forms["adapter"].base
    assert base is not None
    state = safetensors.torch.load_file(base / FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["action_in_proj"]}
    a, b = torch.randn(2, 31, generator=torch.manual_seed(0)), torch.randn(17, 2)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": a, "lora_B": b}
    named = {f"base_model.model.action_in_proj.{name}.weight": each for name, each in factors.items()}
    safetensors.torch.save_file(named, tmp_path / "adapter" / "adapter_model.safetensors")
    shutil.copytree(base, tmp_path / "folded")
    (tmp_path / "folded" / "bridge.json").unlink()
    state["action_in_proj.weight"] += 3 * b @ a
    if spoiled is not None:
        state["action_in_proj.weight"][spoiled] += 0.5
    safetensors.torch.save_file(state, tmp_path / "folded" / FILE, golden.header(base))
    verdict = verify(tmp_path / "adapter", tmp_path / "folded", base=base, workers=1)
    named_wrong = {problem.cause.split(": ")[0] for problem in verdict.problems}
    assert named_wrong == (set() if spoiled is None else {"action_in_proj.weight"})


def test_the_weights_do_come_in_slabs_of_other_lengths(forms: dict[str, Form], slab: int) -> None:
    """What the tests above are about: more than one slab a weight, which end elsewhere on the other side."""
    name = "paligemma_with_expert.paligemma.lm_head.weight"
    sources = [open_source(forms[dtype].path) for dtype in ("float32", "bfloat16")]
    cuts = [[at[0] for at, _ in itertools.islice(source.slabs(name), 4)] for source in sources]
    assert len(cuts[0]) > 1 and cuts[0] != cuts[1]
