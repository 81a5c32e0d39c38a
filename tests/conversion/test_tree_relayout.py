"""A checkpoint with LoRA leaves as one: every factor, and what the runtime computes where ranks are others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from bridge import Refusal
from tests.kit import checkpoints, families, golden
from tests.kit.checkpoints import Array, Tree
from tests.kit.families import SCALED
from tests.kit.openpi_lora import dead_ranks
from tests.kit.plugins import registered

#: ranks 4 and 8, alphas 8 and 4
PI0 = golden.golden("pi0_lora")
#: stock, so that openpi's own configs give it the alpha
STOCK = {"paligemma": 16, "expert": 32}


def differing(expected: Mapping[str, Array], found: Mapping[str, Array]) -> set[str]:
    tensors = ({n: golden.tensor(np.asarray(a)) for n, a in tree.items()} for tree in (expected, found))
    return golden.differing(*tensors)


def off(found: Tree, scales: Mapping[str, float]) -> float:
    """Largest relative error of what openpi's modules compute, factors applied one after the other."""
    expected = golden.simulate(PI0.leaves, PI0.scales)
    made = golden.simulate(found, scales, expected)
    outputs = [name for name in expected if name.endswith("/output")]
    return max(float(np.abs(made[n] - expected[n]).max() / np.abs(expected[n]).max()) for n in outputs)


def test_every_factor_is_kept(tmp_path: Path) -> None:
    plan = bridge.plan(PI0.checkpoint, tmp_path / "out", to="orbax", **PI0.options)
    assert [str(edge.target) for edge in plan.route] == ["orbax[base+lora]"]
    assert plan.loss.name == "EXACT"
    plan.run()
    assert not differing(PI0.leaves, checkpoints.restore(tmp_path / "out"))
    # its record knows the alphas from now on
    assert bridge.plan(tmp_path / "out", None, to="torch-merged").scales["expert"].alpha == 4
    bridge.convert(tmp_path / "out", tmp_path / "again", to="orbax", value_suffix=True)
    assert not differing(PI0.leaves, checkpoints.restore(tmp_path / "again"))
    with bridge.open(tmp_path / "again") as opened:
        assert all(name.endswith("/value") for name in opened.specs)


def test_a_factor_keeps_its_own_dtype(tmp_path: Path) -> None:
    """Each of a pair, where nothing trained: zero in both, and still not drawn anew."""
    tree = checkpoints.pi0_tree(layers=2, image_layers=1)
    for name in [name for name in tree if name.endswith("lora_a")]:
        tree[name] = tree[name].astype("bfloat16")
    untrained = "PaliGemma/llm/layers/mlp/linear"
    for each in "ab":
        tree[f"{untrained}_lora_{each}"] = np.zeros_like(tree[f"{untrained}_lora_{each}"])
    source = checkpoints.save(tree, tmp_path / "7", quick=True)
    bridge.convert(source, tmp_path / "out", to="orbax", lora_alpha={"paligemma": 7, "expert": 11})
    assert not differing(tree, checkpoints.restore(tmp_path / "out"))


def test_larger_ranks_compute_the_same(tmp_path: Path) -> None:
    plan = bridge.plan(PI0.checkpoint, tmp_path / "wide", to="orbax", rank=STOCK, **PI0.options)
    assert plan.loss.name == "EQUIVALENT"
    assert {name: (each.rank, each.alpha) for name, each in plan.scales.items()} == {
        "paligemma": (16, 16.0),
        "expert": (32, 32.0),
    }
    assert any("the upper ranks of" in note and "--seed 0" in note for note in plan.notes)
    plan.run()
    wide = checkpoints.restore(tmp_path / "wide")
    assert sum(dead_ranks(wide).values()) == 0
    assert not differing(
        {name: leaf for name, leaf in PI0.leaves.items() if "lora" not in name},
        {name: leaf for name, leaf in wide.items() if "lora" not in name},
    )
    ranks = {leaf.shape[-1] for name, leaf in wide.items() if name.endswith("lora_a")}
    assert ranks == set(STOCK.values())
    assert off(wide, {"paligemma": 1.0, "expert": 1.0}) < 1e-6 < off(wide, PI0.scales)
    # and can be trained: of no component are both factors zero, which would give neither a gradient
    assert any("--seed 0" in note for note in plan.notes)
    for name in (name for name in wide if name.endswith("lora_a")):
        a, b = wide[name], wide[f"{name[:-1]}b"]
        assert not (~a.any(axis=-2) & ~b.any(axis=-1)).any()

    # each side by its own record, and what is given is the alpha before
    for options in ({}, PI0.options):
        verdict = bridge.verify(PI0.checkpoint, tmp_path / "wide", **options)
        assert verdict.holds, verdict.problems
        assert not [
            d for d in bridge.diff(tmp_path / "wide", PI0.checkpoint, **options).changed if d.relative > 1e-6
        ]

    # what was added is of no use, and may go again
    back = bridge.plan(tmp_path / "wide", tmp_path / "back", to="orbax", rank={"paligemma": 4, "expert": 8})
    assert back.loss.name == "EQUIVALENT" and back.scales["paligemma"].value == 1
    back.run()
    narrow = checkpoints.restore(tmp_path / "back")
    assert {n: a.shape for n, a in narrow.items()} == {n: a.shape for n, a in PI0.leaves.items()}
    assert off(narrow, {"paligemma": 1.0, "expert": 1.0}) < 1e-6


def test_smaller_ranks_are_refused_or_approximated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "orbax", "rank": {"paligemma": 3}, **PI0.options}
    with pytest.raises(Refusal, match=r"llm/layers/mlp/linear_lora_a has rank 4; openpi's is 3") as caught:
        bridge.convert(PI0.checkpoint, tmp_path / "out", **options)
    assert "--lossy" in str(caught.value) and not (tmp_path / "out").exists()
    plan = bridge.plan(PI0.checkpoint, tmp_path / "out", lossy=True, **options)
    assert plan.loss.name == "ROUNDED"
    assert plan.scales["paligemma"].value == 2 and "keeps the scale" in str(plan.scales["paligemma"])
    plan.run()
    found = checkpoints.restore(tmp_path / "out")
    worst = 0.0
    leaf = f"{golden.BLOCK}/mlp/linear_lora"
    for a, b, small_a, small_b in zip(
        *(tree[f"{leaf}_{each}"].astype(np.float64) for tree in (PI0.leaves, found) for each in "ab"),
        strict=True,
    ):
        s = np.linalg.svd(a @ b, compute_uv=False)
        best = float(np.linalg.norm(s[3:]) / np.linalg.norm(s))
        gap = float(np.linalg.norm(small_a @ small_b - a @ b) / np.linalg.norm(s))
        assert best > 0 and abs(gap - best) < 1e-6
        worst = max(worst, best)
    assert f"approximated: {leaf}_a {worst:.2e}" in plan.notes
    # the other expert keeps its rank, and every bit
    others = {name for name in PI0.leaves if "_1" in name}
    assert not differing({n: PI0.leaves[n] for n in others}, {n: found[n] for n in others})


def test_a_part_without_factors_has_no_rank() -> None:
    with pytest.raises(Refusal, match="--rank names siglip, which has no LoRA factors to change"):
        bridge.plan(PI0.checkpoint, None, to="orbax", rank={"siglip": 4}, **PI0.options)


def test_without_its_factors_where_that_is_asked_for(tmp_path: Path) -> None:
    plan = bridge.plan(PI0.checkpoint, tmp_path / "out", to="orbax", fold=True, **PI0.options)
    assert [(edge.name, str(edge.target)) for edge in plan.route] == [("fold", "orbax[base]")]
    plan.run()
    found = checkpoints.restore(tmp_path / "out")
    assert not [name for name in found if "lora" in name]
    assert off(found, {}) < golden.TOLERANCE


@pytest.mark.parametrize(("rank", "lossy"), [(families.RANK, False), (7, False), (2, True)])
def test_factors_by_role(rank: int, lossy: bool, tmp_path: Path) -> None:
    """k and v share their first factor, and have to go on sharing it."""
    with registered([SCALED.family], alone=True):
        leaves = SCALED.leaves()
        source = families.save(leaves, tmp_path / "src", SCALED.family.tree)
        plan = bridge.plan(source, tmp_path / "out", to="orbax", rank=rank, lossy=lossy, **SCALED.alphas)
        assert plan.loss.name == {families.RANK: "EXACT", 7: "EQUIVALENT", 2: "ROUNDED"}[rank]
        plan.run()
        found = families.restore(tmp_path / "out", SCALED.family.tree, suffixed=False)
    assert plan.scales["body"].value == SCALED.scale
    expected, made = SCALED.outputs(leaves), SCALED.outputs(found)
    error = max(
        float(np.abs(made[name][1] - out).max() / np.abs(out).max()) for name, (_, out) in expected.items()
    )
    assert (error > 1e-3) if lossy else (error < 1e-6)
    if rank == families.RANK:
        assert not differing(leaves, found)
