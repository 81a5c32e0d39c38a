"""`bridge diff`: what was changed is found, by as much as it was changed, in any two formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from click.testing import CliRunner

import bridge
from bridge.cli.main import cli
from bridge.compare.diff import Comparison
from bridge.compare.diff import diff as compare
from tests.kit import checkpoints, golden, mistakes
from tests.kit.forms import Forms

ALPHAS = "--lora-alpha=paligemma=8,expert=4"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(golden.golden("pi0_lora"), tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def trained(forms: Forms) -> Comparison:
    """The base against what LoRA made of it, the one in PyTorch and the other as openpi saved it."""
    return compare(forms["base"].path, forms["orbax"].path, **forms.golden.options)


def test_a_fine_tune_shows_what_it_trained(forms: Forms, trained: Comparison) -> None:
    """Exactly the weights with LoRA, by the norm of what the factors add, the most changed first."""
    source = forms.golden
    right = golden.by_hand(mistakes.folded(source.leaves, source.scales).tree)
    base = golden.by_hand({k: v for k, v in source.leaves.items() if "lora_" not in k})
    assert {each.name for each in trained.changed} == golden.merged_names(source.leaves)
    assert {each.name for each in trained.differences} == base.keys() - {golden.DEAD_HEAD}
    sizes = [each.relative for each in trained.changed]
    assert sizes == sorted(sizes, reverse=True)
    for each in trained.changed:
        gap = (right[each.name].double() - base[each.name].double()).norm()
        assert each.relative == pytest.approx(float(gap / base[each.name].double().norm()), rel=1e-4)
        assert each.lora == "b"


def test_spectra_are_those_of_the_product(forms: Forms, trained: Comparison) -> None:
    """Singular values and effective rank of the scaled product, against numpy's own SVD of it."""
    source = forms.golden
    base = golden.by_hand({k: np.zeros_like(v) for k, v in source.leaves.items() if "lora_" not in k})
    zeroed = {k: v if "lora_" in k else np.zeros_like(v) for k, v in source.leaves.items()}
    products = golden.by_hand(mistakes.folded(zeroed, source.scales).tree)
    for each in trained.changed:
        assert base[each.name].shape == products[each.name].shape
        values = np.linalg.svd(products[each.name].double().numpy(), compute_uv=False)[: len(each.spectrum)]
        np.testing.assert_allclose(each.spectrum, values, rtol=1e-3, atol=1e-5)
        share = values**2 / (values**2).sum()
        share = share[share > 0]
        assert each.effective_rank == pytest.approx(float(np.exp(-(share * np.log(share)).sum())), rel=1e-3)


def test_forms_of_one_policy_differ_by_rounding_alone(forms: Forms) -> None:
    comparison = compare(
        forms["merged"].path, forms["adapter"].path, base=forms["adapter"].base, **forms.golden.options
    )
    assert max(each.relative for each in comparison.differences) < 1e-6
    assert {each.name for each in comparison.changed} <= golden.merged_names(forms.golden.leaves)


def test_one_changed_entry_is_found(forms: Forms, tmp_path: Path) -> None:
    merged, other = forms["merged"].path, tmp_path / "other"
    shutil.copytree(merged, other)
    state = safetensors.torch.load_file(merged / "model.safetensors")
    state["state_proj.weight"][3, 5] += 0.5
    safetensors.torch.save_file(state, other / "model.safetensors", golden.header(merged))
    (changed,) = compare(merged, other).changed
    assert (changed.name, changed.lora) == ("state_proj.weight", "")
    assert changed.gap == pytest.approx(0.5) and changed.max_abs == pytest.approx(0.5)


def test_command_prints_the_most_changed_first(forms: Forms, tmp_path: Path) -> None:
    report = tmp_path / "diff.html"
    arguments = [
        "diff",
        "--only",
        "changed",
        "--report",
        report,
        ALPHAS,
        forms["base"].path,
        forms["orbax"].path,
    ]
    run = CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=False)
    assert run.exit_code == 0 and "42 of 106 weights differ" in run.stdout
    rows = [line.split() for line in run.stdout.splitlines() if "einsum" in line or "mlp" in line]
    assert rows[0][0].endswith("attn_vec_einsum/w") and len(rows) == 10
    assert "siglip" not in run.stdout and "img" not in run.stdout
    assert "42 of 106 weights differ" in report.read_text()


def test_json_names_every_weight(forms: Forms) -> None:
    merged, narrow = forms["merged"].path, forms["merged-bfloat16"].path
    run = CliRunner().invoke(cli, ["diff", "--json", str(merged), str(narrow)], catch_exceptions=False)
    said = json.loads(run.stdout)
    assert (said["weights"], len(said["differences"])) == (106, 106)
    assert all(each["relative"] < 2.0**-8 for each in said["differences"])
    run = CliRunner().invoke(cli, ["diff", str(merged), str(narrow)], catch_exceptions=False)
    assert "of another dtype, which alone may be why" in run.stdout


def test_other_dimensions_are_refused(forms: Forms, tmp_path: Path) -> None:
    other = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "100", quick=True)
    with pytest.raises(bridge.Refusal, match=r"paligemma\.width is 64 in .* but 13 in"):
        compare(forms["merged"].path, other)
