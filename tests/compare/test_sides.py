"""How verify and diff look at the weights of two checkpoints: by any number of workers, each byte once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig

import bridge
from bridge.compare.diff import diff
from bridge.errors import SourceRefused
from bridge.formats.orbax.source import OrbaxSource
from bridge.proof.verify import Verdict, verify
from bridge.publish import record
from tests.kit import checkpoints, golden
from tests.kit.peft import train

ALPHA = {"paligemma": 8.0, "expert": 4.5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with LoRA, and what it is merged to."""
    home = tmp_path_factory.mktemp("pair")
    source = checkpoints.save(checkpoints.pi0_tree(frozen_dtype="bfloat16"), home / "7", quick=True)
    bridge.convert(source, home / "merged", to="torch-merged", lora_alpha=ALPHA)
    return source, home / "merged"


def said(verdict: Verdict) -> dict[str, Any]:
    return verdict.as_json()


# Workers.


def test_any_number_of_workers_finds_the_same(pair: tuple[Path, Path]) -> None:
    verdicts = [verify(*pair, lora_alpha=ALPHA, workers=workers) for workers in (1, 3)]
    assert verdicts[0].holds
    assert said(verdicts[0]) == said(verdicts[1])
    comparisons = [diff(*pair, lora_alpha=ALPHA, workers=workers) for workers in (1, 3)]
    assert comparisons[0].as_json() == comparisons[1].as_json()


def test_inputs_are_of_the_seed_and_the_weight(pair: tuple[Path, Path]) -> None:
    first, again, other = (
        {check.name: check.mean_abs for check in verify(*pair, lora_alpha=ALPHA, seed=seed).checks}
        for seed in (0, 0, 1)
    )
    assert first == again
    run = [name for name, error in first.items() if error]
    assert run and all(first[name] != other[name] for name in run)


def test_progress_ends_at_its_total(pair: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    verify(*pair, lora_alpha=ALPHA, workers=3, progress=lambda *at: seen.append(at))
    counts = [count for count, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == seen[-1][1]


def test_an_error_ends_every_worker(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = OrbaxSource.slabs

    def broken(self: OrbaxSource, name: str, *arguments: Any) -> Any:
        if "q_einsum_1/w" in name:
            raise SourceRefused(bridge.Problem("gone", "look for it"))
        return inner(self, name, *arguments)

    monkeypatch.setattr(OrbaxSource, "slabs", broken)
    before = threading.active_count()
    with pytest.raises(SourceRefused, match="gone"):
        verify(*pair, lora_alpha=ALPHA, workers=3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bridge")]
    assert threading.active_count() <= before


def test_torch_has_its_threads_back(pair: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verify(*pair, lora_alpha=ALPHA)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_checksums_come_from_what_was_compared(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No array is read a second time for the record, and a record that says otherwise is seen."""
    read = []
    inner = record._matches
    monkeypatch.setattr(
        record,
        "_matches",
        lambda source, name, recorded: read.append(name) or inner(source, name, recorded),
    )
    verdict = verify(*pair, lora_alpha=ALPHA)
    assert verdict.holds and verdict.files[str(pair[1] / "bridge.json")]
    # but for what no runtime uses, which is compared with nothing
    assert read == list(verdict.unused)


def test_of_an_untied_pair_the_used_weight_is_compared(tmp_path: Path) -> None:
    """LeRobot keeps both names; openpi's policies look tokens up and predict none."""
    source = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    bridge.convert(source, tmp_path / "out", to="torch-merged", dtype="float32", layout="lerobot")
    (tmp_path / "out" / "bridge.json").unlink()
    file = tmp_path / "out" / "model.safetensors"
    for name in (golden.LM_HEAD, golden.EMBED_TOKENS):
        state = safetensors.torch.load_file(file)
        state[f"model.{name}"][3, 5] += 1
        safetensors.torch.save_file(state, file)
        verdict, difference = verify(source, tmp_path / "out"), bridge.diff(source, tmp_path / "out")
        used = [golden.LM_HEAD] * (name == golden.EMBED_TOKENS)
        assert [problem.cause.partition(":")[0] for problem in verdict.problems] == used
        assert [(each.name, round(each.max_abs, 6)) for each in difference.changed] == [
            (n, 1.0) for n in used
        ]
    assert "is used in its place" in verdict.unused[f"model.{golden.LM_HEAD}"]


@pytest.mark.parametrize("form", ["7", "torch"])
def test_adapters_on_any_matrix(form: str, tmp_path: Path) -> None:
    """Modules for which openpi has no LoRA, and no einsum that bridge knows."""
    tree = checkpoints.pi0_tree(lora={})
    checkpoints.save(tree, tmp_path / "7", quick=True, assets=False)
    base = golden.convert(tmp_path / "7", tmp_path / "torch", dtype="float32")
    config = LoraConfig(target_modules=["q_proj", "fc1", "state_proj"], r=3, lora_alpha=7)
    train(base, config, tmp_path / "adapter")
    golden.convert(tmp_path / "adapter", tmp_path / "out", base=tmp_path / form, dtype="float32")
    for pair in (("adapter", "out"), ("out", "adapter")):
        verdict = verify(*(tmp_path / name for name in pair), base=tmp_path / form)
        assert verdict.holds, verdict.problems
        run = {check.name.rpartition(".")[0].rpartition(".")[2] for check in verdict.checks if check.max_abs}
        assert run >= {"q_proj", "fc1", "state_proj"}
    spoil(tmp_path / "out" / "model.safetensors", "state_proj.weight")
    verdict = verify(tmp_path / "adapter", tmp_path / "out", base=tmp_path / form)
    assert [problem.cause for problem in verdict.problems if "state_proj.weight" in problem.cause]


def spoil(file: Path, name: str) -> None:
    state = safetensors.torch.load_file(file)
    state[name][2, 3] += state[name].abs().max() * 1e-4
    safetensors.torch.save_file(state, file)
