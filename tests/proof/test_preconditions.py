"""What would fail at the end is said at the beginning: packages, versions, recordings, where a report goes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from bridge.errors import ProofFailed, Refusal, ValueRefused
from tests.faults.table import run_here
from tests.kit import checkpoints
from tests.kit.digest import snapshot

SMALL = {"layers": 2, "image_layers": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run, its adapter with the base, and it merged in transformers' names."""
    home = tmp_path_factory.mktemp("home")
    checkpoints.save(checkpoints.pi0_tree(**SMALL), home / "run", quick=True)
    bridge.convert(home / "run", home / "adapter", to="peft-adapter", lora_alpha=4.0, with_base=True)
    bridge.convert(home / "run", home / "merged", to="torch-merged", lora_alpha=4.0, layout="transformers")
    np.savez(home / "recorded.npz", actions=np.zeros((1, 50, 31), np.float32))
    (home / "empty.npz").touch()
    return home


@pytest.fixture
def nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever walks over the weights has done the work that a precondition should have saved."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were compared")

    monkeypatch.setattr("bridge.proof.verify.walk", fail)


@pytest.mark.parametrize("verb", ["verify", "diff"])
def test_an_adapter_is_no_base(home: Path, verb: str) -> None:
    for a, b in (("adapter", "adapter"), ("run", "adapter")):
        with pytest.raises(Refusal, match="adapter is an adapter, not a base"):
            getattr(bridge, verb)(home / a, home / b, base=home / "adapter", lora_alpha=4.0)


def test_an_adapter_is_no_base_of_an_adapter(home: Path, tmp_path: Path) -> None:
    for to in ("torch-merged", "orbax", "peft-adapter"):
        with pytest.raises(Refusal, match="adapter is an adapter, not a base"):
            bridge.convert(home / "adapter", tmp_path / "out", to=to, base=home / "adapter")
    assert list(tmp_path.iterdir()) == []


def verify_full(home: Path, reference: str) -> None:
    bridge.verify(home / "run", home / "merged", lora_alpha=4.0, reference=home / reference)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.usefixtures("nothing_is_compared")
def test_the_runtime_of_a_whole_model(home: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """transformers before 5 has no PI0; where it is not installed, its import fails."""
    module = types.ModuleType("transformers")
    module.__version__ = "4.53.2"
    monkeypatch.setitem(sys.modules, "transformers", module if old else None)
    with pytest.raises(Refusal) as refused:
        verify_full(home, "recorded.npz")
    causes = [problem.cause for problem in refused.value.problems]
    if old:
        assert causes == [
            f"--full-model needs {name}, which transformers 4.53.2 lacks"
            for name in ("PI0Config", "PI0ForConditionalGeneration")
        ]
    else:
        assert len(causes) == 2 and "needs transformers, which cannot be imported" in causes[0]


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("empty.npz", "is not a recording: No data left in file"),
        ("nowhere.npz", "\\n  fix: give an existing file"),
        ("recorded.npz", "lacks noise, state, tokenized_prompt"),
    ],
)
@pytest.mark.usefixtures("nothing_is_compared")
def test_the_recording(home: Path, reference: str, says: str) -> None:
    with pytest.raises(Refusal, match=f"{reference} ?{says}"):
        verify_full(home, reference)


def test_an_empty_recording_is_no_interrupt(home: Path) -> None:
    arguments = ["verify", "--full-model", f"--reference={home / 'empty.npz'}", "--lora-alpha=4"]
    ran = run_here([*arguments, str(home / "run"), str(home / "merged")])
    assert ran.code == 1 and "empty.npz is not a recording" in ran.err and "interrupted" not in ran.err


@pytest.mark.parametrize("verb", ["verify", "diff"])
@pytest.mark.usefixtures("nothing_is_compared")
def test_where_a_report_goes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    arguments = [verb, "--lora-alpha=4", str(home / "run"), str(home / "merged"), "--report"]
    ran = run_here([*arguments, str(tmp_path / "no" / "report.html")])
    assert ran.code == 2 and f"{tmp_path / 'no'} is not a directory that can be written to" in ran.err
    without(monkeypatch, "matplotlib")
    ran = run_here([*arguments, str(tmp_path / "report.html")])
    assert ran.code == 2 and "matplotlib is not installed: pip install matplotlib" in ran.err


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == package else real(name, *rest)

    for module in ("bridge.cli.options", "bridge.proof.peft_skeleton"):
        monkeypatch.setattr(f"{module}.find_spec", find)


@pytest.mark.parametrize("package", ["torch", "peft"])
def test_peft_is_there_before_the_adapter_is_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    without(monkeypatch, package)
    plan = bridge.plan(home / "run", tmp_path / "out", to="peft-adapter", lora_alpha=4.0)
    monkeypatch.setattr("bridge.conversion.run.run_steps", None)
    with pytest.raises(ProofFailed, match=f"{package} is not installed\n  fix: install it: pip install"):
        plan.run()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_no_internal_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ModuleNotFoundError("No module named 'jax'", name="jax")

    monkeypatch.setattr("bridge.proof.verify.walk", fail)
    ran = run_here(["verify", "--lora-alpha=4", str(home / "run"), str(home / "merged")])
    assert ran.code == 1 and "internal error" not in ran.err
    assert "error: jax cannot be imported, and this needs it: No module named 'jax'\n" in ran.err
    assert "  fix: install it: pip install jax\n" in ran.err


# What is wrong with the numbers is not blamed on PEFT.


def test_factors_that_overflow_are_the_cause(tmp_path: Path) -> None:
    """Finite, and too large for any runtime that multiplies them in float32."""
    tree = checkpoints.pi0_tree(**SMALL)
    for factor in ("lora_a", "lora_b"):
        tree[f"PaliGemma/llm/layers/attn/q_einsum/{factor}"][1] *= np.float32(1e25)
    step = checkpoints.save(tree, tmp_path / "7", quick=True)
    before = snapshot(tmp_path)
    with pytest.raises(ValueRefused) as refused:
        bridge.convert(step, tmp_path / "out", to="peft-adapter", lora_alpha=4.0)
    (problem,) = refused.value.problems
    assert (
        "7/params: the factors of " in problem.cause and "layers.1.self_attn.q_proj overflow" in problem.cause
    )
    assert "PEFT" not in problem.cause + problem.fix and "earlier step" in problem.fix
    assert snapshot(tmp_path) == before


# A config that contradicts what is known.


def with_heads(source: Path, heads: int, directory: Path, *, record: bool) -> Path:
    import shutil

    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["vlm_config"]["vision_config"]["num_attention_heads"] == 3
    config["vlm_config"]["vision_config"]["num_attention_heads"] = heads
    (directory / "config.json").write_text(json.dumps(config))
    if not record:
        os.unlink(directory / "bridge.json")
    return directory


def test_heads_that_the_record_contradicts(home: Path, tmp_path: Path) -> None:
    """5 heads of 3 are as wide as 3 heads of 5: no shape tells one from the other."""
    edited = with_heads(home / "merged", 5, tmp_path / "edited", record=True)
    with pytest.raises(
        Refusal, match=r"config\.json has siglip\.head 5, and bridge\.json 3\n.*--size siglip\.head=N"
    ):
        bridge.convert(edited, tmp_path / "out", to="orbax", no_check=True)
    assert not (tmp_path / "out").exists()
    bridge.convert(edited, tmp_path / "out", to="orbax", size={"siglip.head": 3})
    name = "params/PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"
    with bridge.open(tmp_path / "out") as opened:
        assert opened.specs[name].shape == (1, 15, 3, 5)


def test_heads_that_nothing_contradicts(home: Path, tmp_path: Path) -> None:
    edited = with_heads(home / "merged", 5, tmp_path / "edited", record=False)
    plan = bridge.plan(edited, None, to="orbax")
    assert not [note for note in plan.notes if "config.json has" in note], "16 heads do not fit 15"


def test_heads_that_the_stock_model_contradicts(tmp_path: Path) -> None:
    """As far as shapes tell: its heads of 256, and a width that 16 heads divide."""
    tree = checkpoints.pi0_tree(lora={}, image_heads=16, head_dim=256, **SMALL)
    step = checkpoints.save(tree, tmp_path / "7", quick=True)
    bridge.convert(step, tmp_path / "merged", to="torch-merged", layout="transformers")
    for heads, told in ((16, False), (8, True)):
        made = tmp_path / f"{heads}"
        (tmp_path / "merged").rename(made)
        config = json.loads((made / "config.json").read_text())
        config["vlm_config"]["vision_config"]["num_attention_heads"] = heads
        (made / "config.json").write_text(json.dumps(config))
        (made / "bridge.json").unlink(missing_ok=True)
        notes = [note for note in bridge.plan(made, None, to="orbax").notes if "siglip.head" in note]
        assert bool(notes) == told
        assert notes == [note for note in bridge.describe(made).notes if "siglip.head" in note]
        made.rename(tmp_path / "merged")
    assert notes == ["config.json has siglip.head 8; the pi0 whose other sizes are these has 16"]
