"""A source that bridge wrote, and that is not as it was: the record beside it knows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard

import bridge
from bridge.arrays import Spec
from bridge.errors import SourceRefused
from bridge.formats.disk.location import Location
from bridge.publish.record import RECORD, stale_arrays
from tests.kit import checkpoints
from tests.kit.digest import snapshot

ALPHA = 4.0
#: kind of source -> how it is made, and what it is converted to
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torch": ({"to": "torch-base", "layout": "lerobot"}, {"to": "orbax"}),
    "orbax": ({"to": "orbax", "fold": True}, {"to": "torch-merged"}),
    "peft": ({"to": "peft-adapter", "with_base": True}, {"to": "torch-merged"}),
    "base": ({"to": "peft-adapter", "with_base": True}, {"to": "torch-merged"}),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    small = {"layers": 2, "image_layers": 1}
    checkpoints.save(checkpoints.pi0_tree(**small), root / "7", quick=True)
    for name in ("torch", "orbax", "peft"):
        made, _ = KINDS[name]
        bridge.convert(root / "7", root / name, **made | ({} if name == "torch" else {"lora_alpha": ALPHA}))
    return root


@pytest.fixture
def source(
    outputs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, Any], Path]:
    """The source, how it is converted, and which directory of it is damaged."""
    kind = request.param
    src = tmp_path / "src"
    shutil.copytree(outputs / ("peft" if kind == "base" else kind), src)
    options = KINDS[kind][1] | ({"base": src / "base"} if kind in ("peft", "base") else {})
    return src, options, src / "base" if kind == "base" else src


def flip(directory: Path) -> str:
    """The lowest bit of a weight, which no reader can tell from another; returns the weight's name."""
    if (directory / "params").is_dir():
        chunk = directory / "params" / "params.action_in_proj.bias" / "0"
        chunk.write_bytes(zstandard.compress(flipped(zstandard.decompress(chunk.read_bytes()), 0)))
        return "params/action_in_proj/bias"
    file = next(directory.glob("*model.safetensors"))
    data = file.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:first])
    name = next(each for each in header if "lora_A" in each or each.endswith("action_in_proj.bias"))
    file.write_bytes(flipped(data, first + header[name]["data_offsets"][0]))
    return name


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_a_flipped_bit_is_noticed_while_it_is_read(
    source: tuple[Path, dict[str, Any], Path], tmp_path: Path
) -> None:
    src, options, spoiled = source
    name = flip(spoiled)
    before = snapshot(tmp_path)
    with pytest.raises(SourceRefused) as refused:
        bridge.convert(src, tmp_path / "made" / "out", **options)
    (problem,) = refused.value.problems
    shown = name.replace("layers.0.", "layers.{0..1}.") if "lora_A" not in name else name
    assert problem.cause == f"{spoiled}: {shown}: checksum mismatch: changed since bridge wrote it"
    assert "--no-check" in problem.fix and "delete" not in problem.fix
    assert snapshot(tmp_path) == before
    bridge.convert(src, tmp_path / "made" / "out", **options, no_check=True)


@pytest.mark.parametrize("source", ["orbax"], indirect=True)
def test_so_it_is_in_memory(source: tuple[Path, dict[str, Any], Path]) -> None:
    flip(source[0])
    with pytest.raises(SourceRefused, match="action_in_proj/bias: checksum mismatch"):
        bridge.load_torch(source[0])
    assert "action_in_proj.bias" in bridge.load_torch(source[0], no_check=True)


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_as_it_was_written(source: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    src, options, _ = source
    plan = bridge.plan(src, tmp_path / "out", **options)
    plan.run()
    assert not [note for note in plan.notes if "changed since" in note]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        described = json.loads((directory / name).read_text())
        change(described)
        (directory / name).write_text(json.dumps(described, indent=2))

    return damage


STATS = "assets/my_robot/norm_stats.json"


def touched(directory: Path) -> None:
    """The same values, in other bytes."""
    file = directory / STATS
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize("source", ["torch", "orbax", "peft"], indirect=True)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (STATS, touched),
        (RECORD, edit(RECORD, lambda record: record.update(dtype="float16"))),
        (RECORD, edit(RECORD, lambda record: record["files"].clear())),
    ],
    ids=["norm stats", "record", "record of files"],
)
def test_a_file_that_was_edited_is_refused_before_anything_is_read(
    source: tuple[Path, dict[str, Any], Path], tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    src, options, _ = source
    damage(src)
    with pytest.raises(SourceRefused) as refused:
        bridge.plan(src, tmp_path / "out", **options)
    assert [problem.cause for problem in refused.value.problems] == [
        f"{src / name}: checksum mismatch: changed since bridge wrote it"
    ]
    bridge.plan(src, tmp_path / "out", **options, no_check=True)


@pytest.mark.parametrize("source", ["peft"], indirect=True)
def test_a_config_that_was_edited_is_noted(source: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    """The name of the base is edited by hand, as the hub wants it."""
    src, options, _ = source
    edit("adapter_config.json", lambda config: config.update(base_model_name_or_path="me/base"))(src)
    plan = bridge.plan(src, tmp_path / "out", **options)
    assert "adapter_config.json has changed since bridge wrote it" in plan.notes


@pytest.mark.parametrize("source", ["torch"], indirect=True)
def test_a_record_of_an_earlier_version(source: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    """Without a checksum of its own, it is no witness."""
    src, options, _ = source
    edit(RECORD, lambda record: record.pop("record"))(src)
    flip(src)
    bridge.convert(src, tmp_path / "out", **options)


@pytest.mark.parametrize("nbytes", [0, 1, 1000, (1 << 20) - 1, 1 << 20, (3 << 20) + 7])
def test_tensors_of_zeros(nbytes: int, tmp_path: Path) -> None:
    """The record says that they are zeros, and has no checksum of them."""
    record = {"record": "", "tensors": {"w": {"checksum": "zeros"}}}
    (tmp_path / RECORD).write_text(json.dumps(record))
    source: Any = SimpleNamespace(root=Location(str(tmp_path)), specs={"w": Spec((nbytes,), np.dtype("u1"))})
    zeros = bytes(nbytes)
    assert stale_arrays(source, {"w": xxhash.xxh3_128(zeros).hexdigest()}) == []
    assert len(stale_arrays(source, {"w": xxhash.xxh3_128(zeros + b"x").hexdigest()})) == 1
