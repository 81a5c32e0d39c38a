"""Which base an adapter is for: fingerprints, and what meets another base."""

import io
import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import bridge
from bridge.arrays import Spec
from bridge.checkpoint.identity import Fingerprint, gap, recorded
from bridge.checkpoint.open import open_checkpoint, open_source
from bridge.errors import Refusal
from bridge.formats.orbax import stream
from bridge.formats.orbax.ocdbt import Extent
from bridge.formats.orbax.zarr import ZarrArray
from tests.kit import checkpoints, golden
from tests.kit.checkpoints import Tree

FILE = "adapter_model.safetensors"
ALPHA = {"paligemma": 8.0, "expert": 4.5}
#: what a LoRA run trains in full, and another run trains to something else
TRAINED = ("PaliGemma/img/head/kernel", "action_in_proj/kernel", "action_out_proj/bias")


def run(seed: int, **made: Any) -> Tree:
    """Frozen weights are the same in every run; factors and what is trained in full are its own."""
    tree, own = checkpoints.pi0_tree(layers=2, **made), checkpoints.pi0_tree(layers=2, seed=seed, **made)
    return {leaf: own[leaf] if leaf in TRAINED or "lora" in leaf else tree[leaf] for leaf in tree}


@dataclass(frozen=True)
class Runs:
    """Two runs from one base, the adapter of the first, and its base in several forms."""

    home: Path

    @property
    def adapter(self) -> Path:
        return self.home / "adapter"


FORMS = ("adapter/base", "bfloat16", "float16", "lerobot", "transformers", "orbax", "wide")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        checkpoints.save(run(seed), home / str(seed), quick=True)
    bridge.convert(home / "1", home / "adapter", to="peft-adapter", with_base=True, lora_alpha=ALPHA)
    for dtype in ("bfloat16", "float16"):
        bridge.convert(home / "1", home / dtype, to="torch-base", dtype=dtype)
    for layout in ("lerobot", "transformers"):
        bridge.convert(home / "1", home / layout, to="torch-base", layout=layout)
    bridge.convert(home / "adapter" / "base", home / "orbax", to="orbax")
    bridge.convert(home / "bfloat16", home / "wide", to="orbax", dtype="float32")
    bridge.convert(home / "2", home / "base2", to="torch-base")
    return Runs(home)


# What is in a fingerprint.


def corner(weight: torch.Tensor) -> np.ndarray:
    """Thirty-two values of a vector; of a matrix or a filter, four by eight, of the first and the last axis."""
    if weight.ndim == 1:
        return weight[:32].float().numpy()
    weight = weight[:4, ..., :8]
    while weight.ndim > 2:
        weight = weight[:, 0]
    return weight.float().numpy().reshape(-1)


@pytest.mark.parametrize("layout", ["ocdbt", "ocdbt-zarr3", "zarr", "zarr3", "grid"])
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_samples_are_the_corners_of_weights_in_pytorch(model: Any, layout: Any, tmp_path: Path) -> None:
    """By the names and transposes that are written down by hand, whatever container the leaf is in."""
    tree = checkpoints.pi0_tree(model=model, layers=2)
    how: dict[str, Any] = {"chunks": "grid"} if layout == "grid" else {"layout": layout}
    checkpoints.save(tree, tmp_path / "1", quick=True, **how)
    by_hand = golden.by_hand(tree)
    samples = Fingerprint.of(open_checkpoint(tmp_path / "1")).samples
    # one of every leaf that is a weight
    assert len(samples) == len([leaf for leaf in tree if "lora" not in leaf])
    for name, values in samples.items():
        assert np.array_equal(values, corner(by_hand[name])), name


@pytest.mark.parametrize("form", FORMS)
def test_a_base_has_one_fingerprint(runs: Runs, form: str) -> None:
    ours = recorded(open_source(runs.adapter))
    theirs = Fingerprint.of(open_checkpoint(runs.home / form))
    assert ours is not None and ours.samples.keys() == theirs.samples.keys()
    assert {gap(values, theirs.samples[name]) for name, values in ours.samples.items()} == {0.0}


def test_the_record_and_the_header_both_have_it(runs: Runs, tmp_path: Path) -> None:
    record = json.loads((runs.adapter / "bridge.json").read_text())["base_identity"]
    with_header = shutil.copytree(
        runs.adapter, tmp_path / "header", ignore=shutil.ignore_patterns("bridge.json")
    )
    with_record = shutil.copytree(runs.adapter, tmp_path / "record")
    save_file(load_file(with_record / FILE), with_record / FILE)
    for form in (with_header, with_record):
        found = recorded(open_source(form))
        assert found is not None and json.loads(found.text()) == record
    shutil.rmtree(with_record / "base")
    (with_record / "bridge.json").unlink()
    assert recorded(open_source(with_record)) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model": 3, "samples": {}}',
        '{"model": "pi0", "samples": {"a": "?"}}',
        '{"samples": 1}',
    ],
)
def test_what_cannot_be_read_records_nothing(runs: Runs, text: str, tmp_path: Path) -> None:
    adapter = shutil.copytree(runs.adapter, tmp_path / "a", ignore=shutil.ignore_patterns("bridge.json"))
    save_file(load_file(adapter / FILE), adapter / FILE, {"format": "pt", "base_identity": text})
    assert recorded(open_source(adapter)) is None
    bridge.plan(adapter, None, to="torch-merged", base=runs.home / "base2")


def random(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(32).astype(np.float32) * np.float32(0.02)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).float().numpy()


def test_rounding_is_no_difference() -> None:
    """torch rounds; of two float32 samples of which neither is rounded, only the last bits may differ."""
    values = random(0)
    narrow, half = rounded(values, torch.bfloat16), rounded(values, torch.float16)
    for a, b in ((values, narrow), (values, half), (narrow, half), (rounded(half, torch.bfloat16), values)):
        assert gap(a, b) == gap(b, a) == 0
    assert gap(values, np.nextafter(values, np.float32(1))) == 0
    # a step of training, far below bfloat16's precision
    moved = values + np.float32(2e-5)
    assert gap(values, moved) > 0 and gap(moved, values) > 0
    # and one that a base in bfloat16 still shows
    assert gap(narrow, values + np.float32(5e-5)) > 0
    assert gap(np.zeros(32, np.float32), values) > 1
    assert gap(values, np.full(32, np.nan, np.float32)) == np.inf


# Meeting a base.


@pytest.mark.parametrize("form", FORMS)
def test_its_own_base_is_accepted(runs: Runs, form: str) -> None:
    plan = bridge.plan(runs.adapter, None, to="torch-merged", base=runs.home / form)
    assert not [note for note in plan.notes if "made for" in note]


def refused(adapter: Path, place: Path, says: str, **options: Any) -> None:
    before = golden.files(adapter)
    for verb in (
        lambda: bridge.convert(adapter, place / "out", to="torch-merged", **options),
        lambda: bridge.convert(adapter, place / "out", to="orbax", **options),
        lambda: bridge.load_torch(adapter, **options),
        lambda: bridge.diff(adapter, adapter, **options),
        lambda: bridge.verify(adapter, adapter, **options),
    ):
        with pytest.raises(Refusal) as caught:
            verb()
        assert len(caught.value.problems) == 1 and says in caught.value.problems[0].cause, caught.value
        assert "--base" in caught.value.problems[0].fix
    assert golden.files(adapter) == before and not (place / "out").exists()


@pytest.mark.parametrize("form", ["base2", "orbax2"])
def test_the_base_of_another_run_is_refused(runs: Runs, form: str, tmp_path: Path) -> None:
    """Its frozen weights are the same; what that run trained in full is named and counted."""
    if form == "orbax2":
        bridge.convert(runs.home / "base2", runs.home / "orbax2", to="orbax")
    adapter = shutil.copytree(runs.adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("base"))
    refused(adapter, tmp_path, "3 of 50 sampled weights differ, relative up to ", base=runs.home / form)
    with pytest.raises(Refusal) as caught:
        bridge.plan(adapter, None, to="orbax", base=runs.home / form)
    says = str(caught.value)
    for name in ("multi_modal_projector.linear.weight", "action_in_proj.weight", "action_out_proj.bias"):
        assert name in says


def test_another_base_is_accepted_when_told(runs: Runs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": runs.home / "base2", "base_differs": True}
    plan = bridge.plan(runs.adapter, None, to="torch-merged", **options)
    told = [note for note in plan.notes if "is not the base that the adapter was made for: 3 of 50" in note]
    assert len(told) == 1
    assert told[0] in bridge.diff(runs.adapter, runs.adapter, **options).notes
    assert told[0] in bridge.verify(runs.adapter, runs.adapter, **options).notes
    # how far it is: the norm of what differs over that of its own base, in the corner
    ours, theirs = (golden.by_hand(run(seed)) for seed in (1, 2))
    far = max(
        np.linalg.norm(corner(ours[name]) - corner(theirs[name])) / np.linalg.norm(corner(ours[name]))
        for name in ours
        if not torch.equal(ours[name], theirs[name])
        and "lora" not in name
        and name
        in (
            "action_in_proj.weight",
            "action_out_proj.bias",
            f"{golden.PALIGEMMA}.model.multi_modal_projector.linear.weight",
        )
    )
    assert f"relative up to {far:.1e}" in told[0]


def test_a_base_of_another_model_is_refused_whatever_is_told(runs: Runs, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.pi0_tree(model="pi05", layers=2, lora={}), tmp_path / "pi05", quick=True)
    adapter = shutil.copytree(runs.adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("base"))
    for options in ({}, {"base_differs": True}):
        refused(adapter, tmp_path, "is an adapter of pi0 (", base=tmp_path / "pi05", **options)


def test_a_moved_output_finds_its_base(runs: Runs, tmp_path: Path) -> None:
    config = json.loads((runs.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    moved = shutil.copytree(runs.adapter, tmp_path / "elsewhere" / "moved")
    described = bridge.describe(moved)
    assert described.base == f"{moved}/base, base/ in the adapter's directory, the one it was made for"
    result = bridge.convert(moved, tmp_path / "out", to="torch-merged")
    assert result.tensors and bridge.verify(runs.home / "1", moved).holds
    # and says so when it is another's
    shutil.rmtree(moved / "base")
    shutil.copytree(runs.home / "base2", moved / "base")
    assert [problem for problem in bridge.describe(moved).problems if "3 of 50" in problem]
    refused(moved, tmp_path / "none", "3 of 50 sampled weights differ")


def test_what_the_adapter_brings_itself_is_not_compared(runs: Runs, tmp_path: Path) -> None:
    """With --modules-to-save the weights that differ travel along: it fits both bases."""
    bridge.convert(
        runs.home / "1",
        tmp_path / "a",
        to="peft-adapter",
        lora_alpha=ALPHA,
        base=runs.home / "base2",
        modules_to_save=True,
    )
    for base in (runs.home / "base2", runs.home / "orbax"):
        bridge.plan(tmp_path / "a", None, to="torch-merged", base=base)


# What sampling costs.


def leaf(count: int) -> ZarrArray:
    return ZarrArray(Spec((count,), np.dtype(np.float32)), (count,), "zarr", "zstd", ".", "")


def test_little_is_read_of_a_large_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    values = np.random.default_rng(0).standard_normal(1 << 21).astype(np.float32)
    (tmp_path / "c").write_bytes(data := zstandard.compress(values.tobytes()))
    lengths = []
    open_range = stream.open_range
    monkeypatch.setattr(stream, "open_range", lambda *a: lengths.append(a[2]) or open_range(*a))
    found = stream.beginning(leaf(len(values)), tmp_path / "c", Extent(len(data), file="c"), "x", 1000)
    assert np.array_equal(found, values[:1000]) and lengths == [4000 + (256 << 10)]


def test_a_stream_that_begins_with_empty_blocks(tmp_path: Path) -> None:
    """No encoder writes these; they decode, so they are read."""
    values = np.arange(8, dtype=np.float32)
    block = struct.pack("<I", 1 | len(values.tobytes()) << 3)[:3]
    frame = io.BytesIO()
    # magic, a descriptor without a size, a window of 1 KiB, raw blocks
    frame.write(b"\x28\xb5\x2f\xfd\x00\x00" + bytes(3) * 100_000 + block + values.tobytes())
    (tmp_path / "c").write_bytes(data := frame.getvalue())
    found = stream.beginning(leaf(8), tmp_path / "c", Extent(len(data), file="c"), "x", 8)
    assert np.array_equal(found, values)
    with pytest.raises(Refusal, match="x is truncated"):
        stream.beginning(leaf(9), tmp_path / "c", Extent(len(data), file="c"), "x", 9)
