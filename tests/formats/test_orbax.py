"""Every way Orbax lays out a checkpoint reads to what Orbax itself restores."""

import json
import pickle
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from bridge.arrays import box
from bridge.checkpoint.open import open_source
from bridge.errors import SourceRefused
from bridge.formats.disk import readahead
from bridge.formats.disk.location import Location, tensorstore_context
from bridge.formats.orbax import listing, stream
from bridge.formats.orbax.source import OrbaxSource, open_orbax
from tests.kit import checkpoints
from tests.kit.checkpoints import Array, Tree

FIXTURE = Path(__file__).parents[1] / "data" / "orbax_0_11_13" / "100"

LAYOUTS: tuple[checkpoints.Layout, ...] = ("ocdbt", "ocdbt-zarr3", "zarr", "zarr3")

#: options of checkpoints.save; what is not asked for is what openpi's training runs write
VARIANTS: dict[str, dict[str, Any]] = {
    **{layout: {"layout": layout} for layout in LAYOUTS},
    **{f"{layout}-plain": {"layout": layout, "compress": False} for layout in LAYOUTS},
    **{f"{layout}-grid": {"layout": layout, "chunks": "grid"} for layout in LAYOUTS},
    **{f"{layout}-512-bytes": {"layout": layout, "chunks": 512} for layout in LAYOUTS},
    **{f"{layout}-quick": {"layout": layout, "quick": True} for layout in LAYOUTS},
    "two-processes": {"processes": 2},
    "three-processes-plain": {"processes": 3, "compress": False},
    "zarr3-in-processes": {"processes": 2, "layout": "ocdbt-zarr3"},
    "tall": {"node_bytes": 512},
    "tall-processes": {"node_bytes": 4096, "processes": 2},
    "tall-grid-zarr3": {"node_bytes": 1024, "chunks": "grid", "layout": "ocdbt-zarr3"},
    "grid-plain": {"chunks": "grid", "compress": False},
    "release": {"value_suffix": False, "step_dir": False},
    "release-zarr": {"value_suffix": False, "step_dir": False, "layout": "zarr", "quick": True},
    "no-suffix": {"value_suffix": False},
}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return checkpoints.pi0_tree(frozen_dtype="bfloat16")


def leaves(source: OrbaxSource) -> dict[str, str]:
    """Leaf path -> stored name."""
    return {name.removeprefix("params/").removesuffix("/value"): name for name in source.specs}


def assert_same(read: Array, expected: Array, name: str) -> None:
    assert read.dtype == expected.dtype and read.shape == expected.shape, name
    assert read.tobytes() == expected.tobytes(), name


def put_together(source: OrbaxSource, name: str) -> Array:
    """An array from its slabs, which must come in C order and fill it."""
    spec = source.specs[name]
    array, seen = np.empty(spec.shape, spec.dtype), b""
    for at, values in source.slabs(name):
        assert values.ndim == len(at) == array.ndim
        array[box(at, values.shape)] = values
        seen += values.tobytes()
    assert seen == array.tobytes(), name
    return array


def assert_reads(source: OrbaxSource, expected: Mapping[str, Array]) -> None:
    """read(), rows of it, and slabs() give the expected arrays, and the specs tell them before."""
    names = leaves(source)
    assert names.keys() == expected.keys()
    for leaf, name in names.items():
        array = expected[leaf]
        assert source.specs[name].shape == array.shape and source.specs[name].dtype == array.dtype
        assert_same(source.read(name), array, leaf)
        assert_same(put_together(source, name), array, leaf)
        assert source.stored_bytes(name) > 0 and source.buffered_bytes(name) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_orbax_restores(tmp_path: Path, tree: Tree, variant: str) -> None:
    path = checkpoints.save(tree, tmp_path / "7", **VARIANTS[variant])
    restored = checkpoints.restore(path)
    for leaf, array in tree.items():
        assert_same(restored[leaf], array, leaf)
    source = open_orbax(Location.parse(path))
    assert all(name.endswith("/value") for name in source.specs) is VARIANTS[variant].get(
        "value_suffix", True
    )
    assert_reads(source, restored)
    # workers get a pickled copy, and open their own files
    assert_reads(pickle.loads(pickle.dumps(source)), restored)


@pytest.mark.parametrize("variant", ["ocdbt", "tall", "ocdbt-plain", "zarr", "ocdbt-zarr3", "grid-plain"])
def test_says_how_each_array_is_read(tmp_path: Path, tree: Tree, variant: str) -> None:
    source = open_orbax(Location.parse(checkpoints.save(tree, tmp_path / "7", **VARIANTS[variant])))
    ways = {source.how(name) for name in source.specs}
    if variant in ("ocdbt", "tall", "ocdbt-plain", "zarr"):
        assert ways == {"streamed"}
    elif variant == "grid-plain":
        # one axis: chunks are runs of it whatever the grid
        assert ways == {"streamed", "chunk by chunk"}
    else:
        assert ways == {"tensorstore"}


@pytest.mark.parametrize("block", [1, 64, 1000, 1 << 20])
@pytest.mark.parametrize("variant", ["ocdbt", "ocdbt-plain", "two-processes", "ocdbt-grid", "grid-plain"])
def test_streams_in_blocks_of_any_size(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, variant: str, block: int
) -> None:
    options = {**VARIANTS[variant], "quick": True}
    source = open_orbax(Location.parse(checkpoints.save(tree, tmp_path / "7", **options)))
    monkeypatch.setattr(stream, "SLAB_BYTES", block)
    monkeypatch.setattr(stream, "READ_BYTES", 96)
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 200)
    assert_reads(source, tree)
    for name, spec in source.specs.items():
        if source.how(name) == "streamed":
            sizes = [values.nbytes for _, values in source.slabs(name)]
            assert max(sizes) <= max(block, spec.dtype.itemsize)
            assert max(sizes) <= source.buffered_bytes(name)


def test_padded_edge_chunks_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks along the first axis alone, the last one longer than what is left of the array."""
    import tensorstore as ts

    path = checkpoints.save({"x": np.zeros((13, 3), np.float32)}, tmp_path / "7", quick=True)
    expected = np.arange(39, dtype=np.float32).reshape(13, 3)
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{path}/params/"},
        "path": "params.x.value/",
    }
    spec = {
        "driver": "zarr",
        "kvstore": kvstore,
        "metadata": {
            "shape": [13, 3],
            "chunks": [5, 3],
            "dtype": "<f4",
            "compressor": {"id": "zstd", "level": 1},
        },
    }
    store = ts.open(spec, create=True, delete_existing=True).result()
    store.write(expected).result()
    source = open_orbax(Location.parse(path))
    (name,) = source.specs
    assert source.how(name) == "streamed"
    for block in (1, 24, 1000):
        monkeypatch.setattr(stream, "SLAB_BYTES", block)
        assert_same(put_together(source, name), expected, name)
        assert {(5, 0), (10, 0)} <= {at for at, _ in source.slabs(name)}


@pytest.mark.parametrize("variant", ["ocdbt-quick", "ocdbt-grid", "zarr3-quick"])
def test_rows_are_numpys(tmp_path: Path, tree: Tree, variant: str) -> None:
    source = open_orbax(Location.parse(checkpoints.save(tree, tmp_path / "7", **VARIANTS[variant])))
    names = leaves(source)
    for leaf in ("PaliGemma/llm/layers/attn/q_einsum/w", "action_in_proj/bias"):
        for rows in (0, 3, -1, slice(1, 3), slice(None), slice(-2, None), slice(2, 999), slice(2, 1)):
            assert_same(source.read(names[leaf], rows), tree[leaf][rows], f"{leaf}[{rows}]")
    with pytest.raises(IndexError):
        source.read(names[leaf], 999)
    with pytest.raises(KeyError):
        source.read("no/such/leaf")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith("-quick")])
def test_scalars(tmp_path: Path, variant: str) -> None:
    """No weight is one, but `bridge.open` lists and reads whatever a pytree holds."""
    expected = {"step": np.asarray(3.5, np.float32), "w": np.ones(2, np.float32)}
    path = checkpoints.save(expected, tmp_path / "7", **VARIANTS[variant])
    with bridge.open(path) as opened:
        assert opened.specs["params/step/value"].shape == ()
        assert opened.read("params/step/value").item() == 3.5
    source = open_orbax(Location.parse(path))
    ((at, value),) = source.slabs("params/step/value")
    assert at == () and value.shape == () and value.item() == 3.5


def test_the_fixture_of_openpis_own_orbax() -> None:
    expected = checkpoints.pi0_tree(
        seed=11,
        frozen_dtype="bfloat16",
        lora={"paligemma": 2, "expert": 4},
        layers=3,
        heads=5,
        head_dim=7,
        width=11,
        expert_width=13,
        mlp=17,
        expert_mlp=19,
        action_dim=8,
        image_mlp=17,
        image_tokens=16,
    )
    source = open_orbax(Location.parse(FIXTURE))
    assert {source.how(name) for name in source.specs} == {"streamed"}
    assert_reads(source, expected)
    assert source.notes == ()


# What a path means.


def test_any_level_of_a_step_is_the_same_checkpoint(tmp_path: Path, tree: Tree) -> None:
    path = checkpoints.save(tree, tmp_path / "run" / "7", quick=True)
    opened = [open_source(where) for where in (path, path / "params", path.parent)]
    assert len({source.location for source in opened}) == 1
    assert {source.root for source in opened} == {Location.parse(path)}
    assert [bool(source.notes) for source in opened] == [False, False, True]


def test_a_directory_of_steps_means_the_newest_finished_one(tmp_path: Path, tree: Tree) -> None:
    run = tmp_path / "run"
    for step in ("900", "1000", "20"):
        checkpoints.save(tree, run / step, quick=True)
    (run / "3000" / "params").mkdir(parents=True)
    (run / "2000.orbax-checkpoint-tmp-17" / "params").mkdir(parents=True)
    (run / "wandb_id.txt").write_text("x")
    source = open_source(run)
    assert source.root == Location.parse(run / "1000")
    (note,) = source.notes
    assert note.startswith(f"using step 1000, the latest complete step of {run}")
    assert "3000" in note and "2000.orbax-checkpoint-tmp-17" in note
    assert note in bridge.plan(run, None, to="torch-merged", lora_alpha=1.0).notes


def test_a_symlinked_step_is_read(tmp_path: Path, tree: Tree) -> None:
    path = checkpoints.save(tree, tmp_path / "7", quick=True)
    (tmp_path / "latest").symlink_to(path)
    assert_reads(open_orbax(Location.parse(tmp_path / "latest")), tree)


@pytest.mark.parametrize("name", ["a b", "100%20", "é ü", "a'b\"c", "%"])
def test_paths_with_odd_characters(tmp_path: Path, tree: Tree, name: str) -> None:
    path = checkpoints.save(tree, tmp_path / name / "7", quick=True)
    assert_reads(open_orbax(Location.parse(path)), tree)


def test_arrays_saved_without_their_zero_chunks(tmp_path: Path) -> None:
    """Orbax before `store_array_data_equal_to_fill_value` left chunks of zeros out."""
    import tensorstore as ts

    expected = {"w": np.zeros((4, 3), np.float32), "x": np.ones((4, 3), np.float32)}
    path = checkpoints.save(expected, tmp_path / "7", quick=True)
    store = ts.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/params/"}}
    ).result()
    store.write("params.w.value/0.0", None).result()
    with pytest.raises(SourceRefused, match="params/w/value lacks 1 of 1 chunks"):
        open_orbax(Location.parse(path))
    metadata = path / "params" / "_METADATA"
    described = json.loads(metadata.read_text())
    del described["store_array_data_equal_to_fill_value"]
    metadata.write_text(json.dumps(described))
    source = open_orbax(Location.parse(path))
    assert_reads_values(source, expected)
    assert "1 array with chunks of zeros omitted" in source.notes[0]


def assert_reads_values(source: OrbaxSource, expected: Mapping[str, Array]) -> None:
    for leaf, name in leaves(source).items():
        assert_same(source.read(name), expected[leaf], leaf)
        assert_same(put_together(source, name), expected[leaf], leaf)


# Buckets: `memory://` takes the code path of `gs://`.


def upload(directory: Path, prefix: str) -> Location:
    import tensorstore as ts

    spec = {"driver": "memory", "path": f"{prefix}/"}
    store = ts.KvStore.open(spec, context=tensorstore_context()).result()
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            store.write(str(file.relative_to(directory)), file.read_bytes()).result()
    return Location.parse(f"memory://{prefix}")


@pytest.mark.parametrize(
    "variant", ["ocdbt-quick", "two-processes", "tall", "ocdbt-zarr3-quick", "zarr-quick"]
)
def test_a_bucket_reads_like_a_directory(tmp_path: Path, tree: Tree, variant: str) -> None:
    path = checkpoints.save(tree, tmp_path / "7", **VARIANTS[variant])
    source = open_orbax(upload(path, f"bucket/{variant}/7"))
    assert_reads(source, tree)
    local = open_orbax(Location.parse(path))
    for name in source.specs:
        # without an index, only a local file system tells the sizes of files
        stored = local.stored_bytes(name) if source.ocdbt else source.specs[name].nbytes
        assert source.stored_bytes(name) == stored


def test_a_bucket_converts_like_a_directory(tmp_path: Path, tree: Tree) -> None:
    path = checkpoints.save(tree, tmp_path / "run" / "7", quick=True)
    url = upload(path.parent, "bucket/converts/run")
    here = bridge.convert(path, tmp_path / "here", to="torch-merged", lora_alpha=2.0)
    there = bridge.convert(str(url), tmp_path / "there", to="torch-merged", lora_alpha=2.0)
    assert here.checksum == there.checksum
    files = sorted(file.relative_to(tmp_path / "here") for file in (tmp_path / "here").rglob("*"))
    for file in files:
        if (tmp_path / "here" / file).is_file():
            assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
    assert Path("assets/my_robot/norm_stats.json") in files


@pytest.mark.parametrize("url", ["memory://nothing", "memory://nothing/here", "memory://nothing/here/"])
def test_nothing_in_a_bucket(url: str) -> None:
    with pytest.raises(SourceRefused, match="does not exist"):
        open_source(url)


def test_a_damaged_checkpoint_in_a_bucket(tmp_path: Path, tree: Tree) -> None:
    path = checkpoints.save(tree, tmp_path / "7", quick=True)
    biggest = max((path / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    url = upload(path, "bucket/damaged/7")
    with pytest.raises(SourceRefused, match="cannot be read"):
        bridge.convert(str(url), tmp_path / "out", to="torch-merged", lora_alpha=2.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["http://x/y", "hf://a/b", "ftp://x"])
def test_schemes_that_cannot_be_read(url: str) -> None:
    with pytest.raises(SourceRefused, match="cannot be read"):
        Location.parse(url)


def test_file_urls_are_paths(tmp_path: Path, tree: Tree) -> None:
    path = checkpoints.save(tree, tmp_path / "7", quick=True)
    assert Location.parse(f"file://{path}") == Location.parse(path)
    shutil.rmtree(path)


@pytest.mark.parametrize("name", ["../../../evil", "/evil", "a//b", "./x"])
def test_names_of_assets_in_a_bucket_stay_below_it(tmp_path: Path, tree: Tree, name: str) -> None:
    """Objects may have any name; as files of an output they must not lead out of it."""
    path = checkpoints.save(tree, tmp_path / "7", quick=True)
    prefix = f"bucket/names-{zlib.crc32(name.encode())}/7"
    url = upload(path, prefix)
    write_object(f"{prefix}/assets/", name, b"x")
    with pytest.raises(SourceRefused, match="contains an unsafe path"):
        bridge.convert(str(url), tmp_path / "made" / "out", to="torch-merged", lora_alpha=2.0)
    assert not (tmp_path / "made").exists() and not (tmp_path / "evil").exists()


def write_object(prefix: str, key: str, value: bytes) -> None:
    import tensorstore as ts

    spec = {"driver": "memory", "path": prefix}
    ts.KvStore.open(spec, context=tensorstore_context()).result().write(key, value).result()


def test_a_bomb_in_a_bucket(tmp_path: Path, tree: Tree) -> None:
    """What TensorStore would decode to its end is decoded as far as its shape goes."""
    import zstandard

    path = checkpoints.save(tree, tmp_path / "7", quick=True, layout="zarr")
    prefix = "bucket/bomb/7"
    url = upload(path, prefix)
    chunk = "params/params.action_in_proj.kernel.value/"
    made = zstandard.ZstdCompressor(write_content_size=False)
    write_object(f"{prefix}/{chunk}", "0.0", made.compress(bytes(1 << 26)))
    with pytest.raises(
        SourceRefused, match=r"kernel/value (has more bytes than|cannot be read|is truncated)|exceeds"
    ):
        open_orbax(url).read("params/action_in_proj/kernel/value")


def test_a_path_with_parents_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`..` is resolved through links, as the system does."""
    checkpoints.save({"x": np.ones((3, 5), np.float32)}, tmp_path / "deep" / "run", quick=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "run")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for path in ("../deep/run", "../link/../run"):
        with bridge.open(path) as opened:
            assert opened.specs and opened.read(next(iter(opened.specs))).size


@pytest.mark.parametrize("layout", ["ocdbt", "zarr"])
def test_the_metadata_of_an_array_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: checkpoints.Layout
) -> None:
    """To the byte, in the store as in a file of its own."""
    tree = {"a/w": np.ones((3, 5), np.float32)}
    path = checkpoints.save(tree, tmp_path / "1", quick=True, layout=layout, assets=False)
    monkeypatch.setattr(listing, "MAX_TEXT", 1 << 20)
    (name,) = open_orbax(Location.parse(path)).specs
    sizes: list[int] = []
    read = listing._array_metadata

    def noted(*arguments: Any) -> bytes:
        text = read(*arguments)
        sizes.append(len(text))
        return text

    monkeypatch.setattr(listing, "_array_metadata", noted)
    open_orbax(Location.parse(path))
    (size,) = sizes
    monkeypatch.setattr(listing, "MAX_TEXT", size)
    assert open_orbax(Location.parse(path)).specs.keys() == {name}
    monkeypatch.setattr(listing, "MAX_TEXT", size - 1)
    with pytest.raises(SourceRefused, match=rf"the metadata of {name} is damaged|exceeds"):
        open_orbax(Location.parse(path))
