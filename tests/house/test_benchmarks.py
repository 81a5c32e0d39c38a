"""The benchmark's own parts: where bytes lie, what is a floor, that both ways make the same tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from bridge.checkpoint.open import open_source
from bridge.formats.disk.location import Location
from tests.benchmarks import bench, floor, full_size, looking, naive, ranges, tables, watched
from tests.benchmarks.routes import MADE, ROUTES
from tests.kit import checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tree = checkpoints.pi0_tree(frozen_dtype="bfloat16", lora=full_size.LORA)
    checkpoints.save_stream(((name, tree[name]) for name in sorted(tree)), folder / MADE)
    bridge.convert(folder / MADE, folder / "float32", to="torch-merged")
    bridge.convert(folder / "float32", folder / "float32-orbax", to="orbax")
    return folder


@pytest.mark.parametrize("name", [MADE, "float32", "float32-orbax"])
def test_ranges_are_all_bytes_of_all_tensors(folder: Path, name: str) -> None:
    found = ranges.tensors(folder / name)
    source = open_source(Location.parse(folder / name))
    for tensor, lie in found.items():
        assert lie[0].zstd == (name != "float32")
        stored = source.stored_bytes(tensor)
        # chunks in files of their own have no index that tells bridge their length
        assert ranges.size(lie) == stored or name == "float32-orbax"
    missing = source.specs.keys() - found.keys()
    assert (missing and name == MADE) or not missing, "small arrays lie inside the index"
    assert all(source.stored_bytes(tensor) < 1024 for tensor in missing)


def test_ranges_decode_to_the_tensors(folder: Path) -> None:
    import zstandard

    name = "params/PaliGemma/llm/layers/mlp/gating_einsum/value"
    (lies,) = ranges.tensors(folder / MADE)[name]
    with lies.path.open("rb") as file:
        file.seek(lies.offset)
        data = zstandard.ZstdDecompressor().decompressobj().decompress(file.read(lies.length))
    with bridge.open(folder / MADE) as opened:
        assert data == opened.read(name).tobytes()
    everything = [one for lie in ranges.tensors(folder / MADE).values() for one in lie]
    assert floor.read(everything) > 0 and floor.decode(everything) > 0 and floor.encode(everything) > 0


def test_writing_leaves_nothing(tmp_path: Path) -> None:
    assert floor.write(tmp_path / "plain", 3 * floor.BLOCK + 7) > 0
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_needs_the_factors_only(folder: Path) -> None:
    (route,) = (route for route in ROUTES if route.name == "adapter")
    lie = ranges.tensors(folder / MADE)
    factors = [one for name, part in lie.items() if "lora" in name for one in part]
    assert sorted(map(str, route.reads(folder))) == sorted(map(str, factors))


def test_the_naive_way_makes_the_same_tensors(folder: Path) -> None:
    naive.convert(folder / MADE, folder / "naive")
    looking.same(folder / "naive", folder / "float32")
    with bridge.open(folder / "naive") as a, bridge.open(folder / "float32") as b:
        for name in a.specs:
            np.testing.assert_allclose(a.read(name), b.read(name), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        looking.same(folder / "naive", folder / "float32-orbax")


@pytest.mark.parametrize(
    ("took", "seconds"),
    [
        ({"read": 3.0, "write": 4.0, "decode": 5.0, "encode": 0.0}, 7.0),
        ({"read": 1.0, "write": 1.0, "decode": 22.0, "encode": 0.0}, 11.0),
        ({"read": 1.0, "write": 1.0, "decode": 0.0, "encode": 26.0}, 13.0),
    ],
)
def test_the_floor_is_input_and_output_or_coding(took: dict[str, float], seconds: float) -> None:
    assert bench.floor_of(took, cores=2) == seconds


def test_reads_of_tensors_are_told_from_reads_of_the_index(tmp_path: Path) -> None:
    lie = [ranges.Range(tmp_path / "d", 100, 50, True)]

    def count(line: str) -> int:
        return looking._of_tensors(line, lie)

    file = f"5<{tmp_path}/d>"
    assert count(f'12 pread64({file}, ""..., 4096, 0) = 90') == 0
    assert count(f'12 pread64({file}, ""..., 4096, 90) = 30') == 20
    assert count(f'12 pread64({file}, ""..., 4096, 90) = -1 EIO (Input/output error)') == 0
    assert count(f'12 read({file}, ""..., 4096) = 7') == 7
    assert count(f"12 mmap(NULL, 8192, PROT_READ, MAP_PRIVATE, {file}, 0) = 0x7f00") == 8192
    assert count(f'12 pread64(6<{tmp_path}/e>, ""..., 4096, 90) = 30') == 0


def test_looking_at_a_checkpoint_reads_no_tensor(folder: Path) -> None:
    looks = looking.look(folder / MADE, 1, lambda paths: None)
    assert len(looks) == 2
    assert all(look["tensor_bytes"] in (0, None) and look["seconds"][0] > 0 for look in looks.values())


def test_memory_of_a_process_is_seen_and_bounded() -> None:
    code = "import time; held = bytearray(b'1') * (200 << 20); time.sleep(0.2); print('{\"seconds\": 1}')"
    ran = watched.watch([watched.sys.executable, "-c", code])
    assert 200 << 20 < ran.private <= ran.resident < 300 << 20 and ran.said == {"seconds": 1}
    assert watched.watch([watched.sys.executable, "-c", code], 100 << 20).stopped
    with pytest.raises(RuntimeError, match="no such verb"):
        watched.watch([watched.sys.executable, "-c", "raise SystemExit('no such verb')"])


def test_full_size_is_pi0() -> None:
    assert 3.2e9 < full_size.parameters(18) < 3.4e9
    assert 1.4e9 < full_size.parameters(6) < 1.5e9


def test_tables_hold_medians_and_ratios() -> None:
    took: dict[str, Any] = {"read": 1.0, "write": 1.0, "decode": 3.0, "encode": 0.0, "floor": 2.0,
            "bytes_read": 10, "bytes_written": 20, "private": 5e8, "resident": 6e8, "others": 0.25}  # fmt: skip
    rounds = [{**took, "bridge": seconds, "process": seconds + 1} for seconds in (3.0, 9.0, 4.0)]
    naive_rounds = [{"process": 50.0, "private": 1e10}]
    found = {
        "machine": "M", "layers": 18, "parameters": 3.3e9, "rounds": 3, "sources": "cold", "most_cached": 0.0,
        "looks": {"bridge inspect": {"seconds": [0.5, 0.7, 0.6], "tensor_bytes": 0}},
        "routes": {"float32": {"title": "there", "rounds": rounds}},
        "naive": {"layers": 6, "rounds": naive_rounds, "bridge": [{"process": 5.0, "private": 5e8}], "full": None},
    }  # fmt: skip
    text = tables.markdown(found)
    assert "2.00 (2.50)" in text and "| 4.00 s | 5.00 s |" in text and "others" not in text
    assert "| 50.00 | 10.0 | 10.00 GB | 20.0 |" in text and "| bridge inspect | 0.60 | 0 |" in text
