"""There and back: what must return bit for bit, and the one leaf whose numbers may cancel out differently."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bridge
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Array, Tree
from tests.kit.peft import CONFIG, WEIGHTS
from tests.kit.record import Record

SUMMED = "attn_vec_einsum"


@dataclass(frozen=True)
class Case:
    """A checkpoint as openpi saved it, and what converting it takes."""

    path: Path
    tree: Tree
    """As Orbax restores it."""
    options: dict[str, Any]
    scales: Mapping[str, float]
    """alpha / rank of the attention, by part."""

    home: Path
    """Where its outputs are kept, for all tests that want them."""

    @property
    def base(self) -> Tree:
        return {leaf: array for leaf, array in self.tree.items() if "lora" not in leaf}

    def torch_base(self) -> Path:
        return self.once("base", self.path, to="torch-base")

    def adapter(self, *, keep_alpha: bool = True) -> Path:
        """orbax[lora] -> peft."""
        name = "kept" if keep_alpha else "folded"
        return self.once(name, self.path, to="peft-adapter", keep_alpha=keep_alpha, **self.options)

    def returned(self, *, keep_alpha: bool = True) -> Path:
        """orbax[lora] -> peft + base -> orbax."""
        name = f"orbax-{keep_alpha}"
        return self.once(name, self.adapter(keep_alpha=keep_alpha), to="orbax", base=self.torch_base())

    def once(self, name: str, source: Path, **options: Any) -> Path:
        if not (self.home / name).exists():
            bridge.convert(source, self.home / name, **options)
        return self.home / name


BOTH = {"paligemma": 5, "expert": 3}
ALPHA = {"paligemma": 8.0, "expert": 4.5}
UNEVEN = {"paligemma": 8 / 5, "expert": 1.5}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = {
    # name: (the checkpoint, how it is converted, alpha / rank as openpi's LoRAConfig has it)
    "a rank for each": ({}, {"lora_alpha": ALPHA}, UNEVEN),
    "one expert": ({"lora": {"expert": 3}}, {"lora_alpha": 4.5}, {"expert": 1.5}),
    "stock ranks": ({"lora": {"paligemma": 16, "expert": 32}}, {}, {"paligemma": 1.0, "expert": 1.0}),
    "rslora": (
        {},
        {"lora_alpha": ALPHA, "rslora": True},
        {"paligemma": 8 / 5**0.5, "expert": 4.5 / 3**0.5},
    ),
    "fused qkv": ({"fused_qkv": True}, {"lora_alpha": ALPHA}, UNEVEN),
    "three kv heads": ({"heads": 6, "kv_heads": 3}, {"lora_alpha": ALPHA}, UNEVEN),
    "pi05": ({"model": "pi05"}, {"lora_alpha": ALPHA}, UNEVEN),
    "pi05, fused qkv, frozen bfloat16": (
        {"model": "pi05", "fused_qkv": True, "frozen_dtype": "bfloat16"},
        {"lora_alpha": ALPHA},
        UNEVEN,
    ),
    "rank one": (
        {"lora": {"paligemma": 1, "expert": 1}},
        {"lora_alpha": 3.0},
        {"paligemma": 3.0, "expert": 3.0},
    ),
}
EVERY = (*golden.NAMES, *FORMS)
WITH_LORA = (*golden.WITH_LORA, *FORMS)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def case(request: pytest.FixtureRequest, homes: Path) -> Case:
    """A golden checkpoint, or one of the forms that no golden one has."""
    name: str = request.param
    home = homes / name.replace(" ", "-")
    if name in golden.NAMES:
        source = golden.golden(name)
        return Case(source.checkpoint, source.leaves, source.options, source.scales, home)
    make, options, scales = FORMS[name]
    tree = checkpoints.pi0_tree(**make)
    if not home.exists():
        checkpoints.save(tree, home / "100", quick=True)
    return Case(home / "100", tree, options, scales, home)


def changed(expected: Mapping[str, Array], found: Mapping[str, Array]) -> set[str]:
    """Leaves that only one side has, or whose dtype, shape or bits differ."""
    return golden.differing(
        *({leaf: golden.tensor(array) for leaf, array in tree.items()} for tree in (expected, found))
    )


def assets(directory: Path) -> dict[str, bytes]:
    return golden.files(directory / "assets")


def head_sums(leaf: Array) -> Array:
    """`lora_b` (layers, heads, rank, width) summed over heads, one after the other."""
    total: Array = functools.reduce(np.add, np.moveaxis(leaf, 1, 0))
    return total


# Without LoRA.


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
@pytest.mark.parametrize("case", golden.NAMES, indirect=True)
def test_the_base_through_pytorch(case: Case, layout: str, tmp_path: Path) -> None:
    """orbax -> torch -> orbax, in float32: leaves, names, shapes, dtypes, assets."""
    way = "torch-base" if case.options else "torch-merged"
    bridge.convert(case.path, tmp_path / "torch", to=way, dtype="float32", layout=layout)
    bridge.convert(tmp_path / "torch", tmp_path / "orbax", to="orbax")
    wide = {leaf: array.astype(np.float32) for leaf, array in case.base.items()}
    assert changed(wide, checkpoints.restore(tmp_path / "orbax")) == set()
    assert assets(tmp_path / "orbax") == assets(case.path) != {}


@pytest.mark.parametrize("case", EVERY, indirect=True)
def test_dtypes_are_kept_leaf_by_leaf(case: Case, tmp_path: Path) -> None:
    """Frozen bfloat16 beside trained float32, there and back."""
    way = "torch-base" if case.options else "torch-merged"
    if any("lora" in leaf for leaf in case.tree):
        way = "torch-base"
    bridge.convert(case.path, tmp_path / "torch", to=way, dtype="keep")
    bridge.convert(tmp_path / "torch", tmp_path / "orbax", to="orbax")
    assert changed(case.base, checkpoints.restore(tmp_path / "orbax")) == set()


@pytest.mark.parametrize("dtype", [None, "keep"])
@pytest.mark.parametrize("layout", ["openpi", "lerobot", "transformers"])
@pytest.mark.parametrize("name", golden.NAMES)
def test_pytorch_through_orbax(name: str, layout: str, dtype: str | None, tmp_path: Path) -> None:
    """torch -> orbax -> torch: the file byte for byte, and what lies beside it."""
    if name == "pi05_lora" and layout == "transformers":
        pytest.skip("transformers has no pi0.5")
    source = golden.golden(name)
    options: dict[str, Any] = {"to": "torch-merged", "layout": layout}
    bridge.convert(source.checkpoint, tmp_path / "torch", dtype=dtype, **options, **source.options)
    bridge.convert(tmp_path / "torch", tmp_path / "orbax", to="orbax")
    bridge.convert(tmp_path / "orbax", tmp_path / "again", dtype="keep", **options)
    first, again = golden.files(tmp_path / "torch"), golden.files(tmp_path / "again")
    assert first.keys() == again.keys()
    # the record says what a file was made from, and may differ
    assert {file for file in first if first[file] != again[file]} <= {"bridge.json"}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    model=st.sampled_from(["pi0", "pi05"]),
    dims=st.fixed_dictionaries(
        {
            "layers": st.integers(1, 3),
            "heads": st.integers(1, 4),
            "head_dim": st.sampled_from([2, 6, 10]),
            "width": st.integers(1, 9),
            "expert_width": st.integers(1, 9),
            "image_heads": st.integers(1, 3),
            "vocab": st.integers(1, 30),
        }
    ),
    kv=st.integers(1, 4),
    suffix=st.booleans(),
)
def test_every_size_comes_back(
    tmp_path_factory: pytest.TempPathFactory, model: Any, dims: dict[str, int], kv: int, suffix: bool
) -> None:
    """Sizes of one, equal sizes, as many kv heads as heads."""
    tree = checkpoints.pi0_tree(model=model, lora={}, kv_heads=min(kv, dims["heads"]), **dims)
    home = tmp_path_factory.mktemp("sizes")
    source = checkpoints.save(tree, home / "1", quick=True)
    bridge.convert(source, home / "torch", to="torch-merged", dtype="float32")
    bridge.convert(home / "torch", home / "orbax", to="orbax", value_suffix=suffix)
    assert changed(tree, checkpoints.restore(home / "orbax")) == set()


# With LoRA.


@pytest.mark.parametrize("keep_alpha", [True, False], ids=["kept", "folded"])
@pytest.mark.parametrize("case", WITH_LORA, indirect=True)
def test_lora_through_peft(case: Case, keep_alpha: bool, record_property: Record) -> None:
    """orbax[lora] -> peft + base -> orbax, ranks and alphas as `bridge.json` recorded them.

    Every leaf returns, but `lora_b` of `attn_vec_einsum`: its sum over heads does, in head 0. With
    the scale folded into `lora_B` and out again, numbers may be off by one unit in the last place
    where the scale is no power of two.
    """
    restored = checkpoints.restore(case.returned(keep_alpha=keep_alpha))
    summed = {leaf for leaf in case.tree if SUMMED in leaf and leaf.endswith("lora_b")}
    assert len(summed) == len(case.scales)
    scaled = {leaf for leaf in case.tree if leaf.endswith("/lora_b")}
    rounds = set() if keep_alpha else {s for s in case.scales if np.log2(case.scales[s]) % 1}
    loose = {
        leaf for leaf in scaled if ("expert" if leaf.split("/")[4].endswith("_1") else "paligemma") in rounds
    }
    assert bool(loose) == bool(rounds)
    assert changed(without(case.tree, summed | loose), without(restored, summed | loose)) == set()

    worst = 0.0
    for leaf in summed | loose:
        expected, found = case.tree[leaf], restored[leaf]
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if leaf in summed:
            assert not found[:, 1:].any()
            expected, found = head_sums(expected), found[:, 0]
        if leaf not in loose:
            assert expected.tobytes() == found.tobytes()
        off = np.abs(found.astype(np.float64) - expected)
        worst = max(worst, float((off / np.spacing(np.abs(expected))).max()))
    record_property(f"units in the last place, keep_alpha={keep_alpha}", worst)
    print(f"off by {worst:.2g} units in the last place")
    assert worst <= (1 if rounds else 0)


def without(tree: Mapping[str, Array], names: set[str]) -> Tree:
    return {leaf: array for leaf, array in tree.items() if leaf not in names}


@pytest.mark.parametrize("case", WITH_LORA, indirect=True)
def test_the_same_adapter_comes_out_again(case: Case, tmp_path: Path) -> None:
    """... -> peft again: file and config, byte for byte; and the factors return bit for bit ever after."""
    orbax = case.returned()
    bridge.convert(orbax, tmp_path / "again", to="peft-adapter", keep_alpha=True, **case.options)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (case.adapter() / file).read_bytes()
    assert assets(tmp_path / "again") == assets(case.path)
    bridge.convert(tmp_path / "again", tmp_path / "twice", to="orbax", base=case.torch_base())
    assert changed(checkpoints.restore(orbax), checkpoints.restore(tmp_path / "twice")) == set()


@pytest.mark.parametrize("case", golden.WITH_LORA, indirect=True)
def test_what_returns_computes_what_openpi_computed(case: Case, record_property: Record) -> None:
    """The returned leaves in openpi's own equations, against outputs that openpi's runtime recorded."""
    restored = checkpoints.restore(case.returned(keep_alpha=False))
    source = golden.golden(case.path.parents[1].name)
    simulated = golden.simulate(restored, case.scales, source.runtime)
    errors = {
        key: float(np.abs(simulated[key] - output).max() / np.abs(output).max())
        for key, output in source.runtime.items()
        if key.endswith("/output")
    }
    worst = max(errors, key=errors.__getitem__)
    record_property(f"{source.name}: relative error of {len(errors)} modules", errors[worst])
    print(f"{source.name}: {len(errors)} modules, relative error {errors[worst]:.2g} ({worst})")
    assert errors[worst] <= golden.TOLERANCE


@pytest.mark.parametrize("base", ["torch", "orbax", "training form"])
@pytest.mark.parametrize("case", golden.WITH_LORA, indirect=True)
def test_a_base_may_lie_in_any_format(case: Case, base: str, tmp_path: Path) -> None:
    """The exact base in PyTorch, or as Orbax keeps it: the same leaves, assets from whoever has them."""
    place = case.torch_base()
    if base != "torch":
        bridge.convert(place, tmp_path / "base", to="orbax", value_suffix=base == "training form")
        place = tmp_path / "base"
    bridge.convert(case.adapter(), tmp_path / "out", to="orbax", base=place)
    restored = checkpoints.restore(tmp_path / "out")
    summed = {leaf for leaf in case.tree if SUMMED in leaf and leaf.endswith("lora_b")}
    assert changed(without(case.tree, summed), without(restored, summed)) == set()
    assert assets(tmp_path / "out") == assets(case.path)


@pytest.mark.parametrize("case", WITH_LORA, indirect=True)
def test_merged_both_ways(case: Case, tmp_path: Path) -> None:
    """peft + base -> orbax, folded, in one plan; and orbax -> torch-merged -> orbax.

    The same numbers where the factors are the same: all but `attn_vec_einsum`, whose heads are summed
    before the product in one and after in the other.
    """
    plan = bridge.plan(case.adapter(), tmp_path / "one", to="orbax", fold=True, base=case.torch_base())
    assert plan.loss.name == "LOSSY" and [edge.name for edge in plan.route] == ["merge", "import"]
    plan.run()
    bridge.convert(case.path, tmp_path / "torch", to="torch-merged", **case.options)
    bridge.convert(tmp_path / "torch", tmp_path / "two", to="orbax")
    one, two = checkpoints.restore(tmp_path / "one"), checkpoints.restore(tmp_path / "two")
    assert not any("lora" in leaf for leaf in one)
    assert {leaf: array.shape for leaf, array in one.items()} == {
        leaf: array.shape for leaf, array in case.base.items()
    }
    # both default to float32, as always where LoRA is folded
    assert {array.dtype.name for array in one.values()} == {"float32"}
    differ = changed(one, two)
    for leaf in differ:
        assert one[leaf].dtype == two[leaf].dtype and one[leaf].shape == two[leaf].shape
        off = np.abs(one[leaf].astype(np.float64) - two[leaf]).max() / np.abs(two[leaf]).max()
        assert off <= 1e-6, leaf
    assert all("einsum" in leaf or "/mlp" in leaf for leaf in differ)
    moved = {leaf for leaf, array in case.base.items() if not np.array_equal(array, one[leaf])}
    assert len(moved) == (4 if "fused" in str(case.path) else 5) * len(case.scales)
    assert assets(tmp_path / "one") == assets(case.path)


@pytest.mark.parametrize("case", golden.WITH_LORA, indirect=True)
def test_folding_in_one_go_is_folding_in_two(case: Case, tmp_path: Path) -> None:
    """orbax[lora] -> orbax, merged, in one plan: bit for bit what the two conversions give.

    It has no base beside it to read the factors from: they lie in the source itself, and must not be lost.
    """
    bridge.convert(case.path, tmp_path / "one", to="orbax", fold=True, **case.options)
    bridge.convert(case.path, tmp_path / "torch", to="torch-merged", **case.options)
    bridge.convert(tmp_path / "torch", tmp_path / "two", to="orbax")
    assert changed(checkpoints.restore(tmp_path / "one"), checkpoints.restore(tmp_path / "two")) == set()
    assert assets(tmp_path / "one") == assets(case.path)
