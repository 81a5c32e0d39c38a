"""A container that bridge does not know, registered from outside: examples/own_format, through its entry point.

Sources are written here with numpy alone, from the leaves that Orbax restores; what is converted from them is
compared byte for byte with what is converted from the Orbax checkpoint.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bridge
from bridge import Form, Format, Location, Refusal, SourceRefused, State
from bridge.conversion.converters import converters, targets
from bridge.errors import PluginRefused
from bridge.formats.contract import formats
from bridge.graph import route
from tests.kit.checkpoints import Array
from tests.kit.digest import digest
from tests.kit.golden import ROOT, Golden, golden
from tests.kit.plugins import Entry, registered

EXAMPLE = ROOT / "examples" / "own_format"
INDEX = "arrays.json"


def entry_point() -> EntryPoint:
    """As the example's own pyproject.toml declares it."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["bridge.formats"].items()
    return EntryPoint(name, value, "bridge.formats")


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        with registered(formats=[entry_point()]):
            yield


def written(arrays: Mapping[str, Array], path: Path) -> Path:
    """The container, by numpy."""
    path.mkdir(parents=True)
    for number, array in enumerate(arrays.values()):
        np.save(path / f"{number}.npy", array.view(np.uint16) if array.dtype.name == "bfloat16" else array)
    described = [
        {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}
        for name, array in arrays.items()
    ]
    (path / INDEX).write_text(json.dumps({"arrays": described, "metadata": {}}))
    return path


def arrays_of(path: Path) -> dict[str, Array]:
    """What is in a container, by numpy."""
    described = json.loads((path / INDEX).read_text())["arrays"]
    found = {}
    for number, each in enumerate(described):
        array = np.load(path / f"{number}.npy")
        found[each["name"]] = array.view(ml_dtypes.bfloat16) if each["dtype"] == "bfloat16" else array
    return found


def values_of(checkpoint: Path) -> dict[str, str]:
    """The files of arrays in an Orbax output, by their hash, without the record of what it was made from."""
    return {name: file for name, file in digest(checkpoint).items() if name.startswith("params/")}


@pytest.fixture(scope="module")
def run() -> Golden:
    return golden("pi0_lora")


@pytest.fixture(scope="module")
def source(run: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    leaves = {f"params/{name}/value": array for name, array in run.leaves.items()}
    path = written(leaves, tmp_path_factory.mktemp("npy") / "run")
    (assets,) = run.checkpoint.rglob("assets")
    shutil.copytree(assets, path / "assets")
    return path


@pytest.fixture(scope="module")
def merged(run: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "from_orbax"
    bridge.convert(run.checkpoint, path, to="torch-merged", **run.options)
    return path


def test_it_is_in_the_graph() -> None:
    states = {str(edge.source) for edge in converters()} | {str(edge.target) for edge in converters()}
    assert {"npy[base]", "npy[base+lora]"} <= states
    assert "npy" in targets()
    edges = {(edge.name, str(edge.source), str(edge.target)) for edge in converters() if "npy" in str(edge)}
    assert ("split", "npy[base+lora]", "peft-adapter[lora]") in edges
    assert ("join", "peft-adapter[lora]", "npy[base+lora]") in edges


def test_only_the_package_registers_it() -> None:
    assert [known.name for known in formats()] == ["orbax", "peft", "torch", "npy"]
    core = "".join(file.read_text() for file in (ROOT / "bridge").rglob("*.py"))
    assert "npy" not in core.replace("examples/own_format", "")


def test_inspect(source: Path, run: Golden) -> None:
    ours, orbax = bridge.describe(source), bridge.describe(run.checkpoint)
    assert ours.state == "npy[base+lora]" and ours.format == "npy" and not ours.problems
    assert (
        replace(
            ours,
            path=orbax.path,
            format=orbax.format,
            state=orbax.state,
            stored_bytes=orbax.stored_bytes,
            notes=orbax.notes,
        )
        == orbax
    )


def test_merging_it_gives_the_bytes_that_orbax_gives(
    source: Path, run: Golden, merged: Path, tmp_path: Path
) -> None:
    result = bridge.convert(source, tmp_path / "merged", to="torch-merged", **run.options)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        merged / "model.safetensors"
    ).read_bytes()
    record = json.loads((tmp_path / "merged" / "bridge.json").read_text())
    assert record["sources"]["source"]["format"] == "npy"
    assert (
        record["checksum"] == json.loads((merged / "bridge.json").read_text())["checksum"] == result.checksum
    )


def test_splitting_it_gives_the_bytes_that_orbax_gives(source: Path, run: Golden, tmp_path: Path) -> None:
    bridge.convert(source, tmp_path / "ours", to="peft-adapter", with_base=True, **run.options)
    bridge.convert(run.checkpoint, tmp_path / "orbax", to="peft-adapter", with_base=True, **run.options)
    for name in ("adapter_model.safetensors", "adapter_config.json", "base/model.safetensors"):
        ours, orbax = (tmp_path / which / name for which in ("ours", "orbax"))
        expected = orbax.read_bytes().replace(
            str(tmp_path / "orbax").encode(), str(tmp_path / "ours").encode()
        )
        assert ours.read_bytes() == expected, name


def test_writing_it(merged: Path, tmp_path: Path) -> None:
    """From PyTorch, and on to Orbax: what PyTorch to Orbax gives at once."""
    bridge.convert(merged, tmp_path / "npy", to="npy")
    bridge.convert(merged, tmp_path / "orbax", to="orbax")
    bridge.convert(tmp_path / "npy", tmp_path / "by_npy", to="orbax")
    assert values_of(tmp_path / "by_npy") == values_of(tmp_path / "orbax")
    assert len(values_of(tmp_path / "orbax")) > 100
    with bridge.open(tmp_path / "orbax") as orbax:
        found = arrays_of(tmp_path / "npy")
        assert found.keys() == orbax.specs.keys()
        for name, array in found.items():
            assert array.dtype == orbax.specs[name].dtype
            assert array.tobytes() == orbax.read(name).tobytes(), name
    assert bridge.verify(tmp_path / "npy").holds
    bridge.convert(merged, tmp_path / "again", to="npy", workers=1)
    assert digest(tmp_path / "again") == digest(tmp_path / "npy")


def test_bfloat16(merged: Path, tmp_path: Path) -> None:
    bridge.convert(merged, tmp_path / "npy", to="npy", dtype="bfloat16")
    bridge.convert(merged, tmp_path / "orbax", to="orbax", dtype="bfloat16")
    with bridge.open(tmp_path / "orbax") as orbax, bridge.open(tmp_path / "npy") as npy:
        assert "bfloat16" in {spec.dtype.name for spec in npy.specs.values()}
        assert npy.specs == orbax.specs
        for name in npy.specs:
            assert npy.read(name).tobytes() == orbax.read(name).tobytes()
    bridge.convert(tmp_path / "npy", tmp_path / "back", to="torch-merged", dtype="keep")
    assert not bridge.diff(tmp_path / "npy", tmp_path / "back").changed


def test_joining_an_adapter_into_it(source: Path, run: Golden, tmp_path: Path) -> None:
    bridge.convert(source, tmp_path / "adapter", to="peft-adapter", with_base=True, **run.options)
    bridge.convert(
        tmp_path / "adapter",
        tmp_path / "joined",
        to="npy",
        base=tmp_path / "adapter" / "base",
        value_suffix=True,
    )
    assert bridge.describe(tmp_path / "joined").state == "npy[base+lora]"
    joined, leaves = arrays_of(tmp_path / "joined"), arrays_of(source)
    assert joined.keys() == leaves.keys()
    weights = [name for name in leaves if "lora" not in name]
    assert all(joined[name].tobytes() == leaves[name].tobytes() for name in weights)
    verdict = bridge.verify(run.checkpoint, tmp_path / "joined", **run.options)
    assert verdict.holds, verdict.problems


def test_reading_it_lazily(source: Path) -> None:
    expected = arrays_of(source)
    with bridge.open(source) as opened:
        name = next(name for name in expected if name.endswith("q_einsum/w/value"))
        assert opened.specs[name].shape == expected[name].shape
        assert np.array_equal(opened.read(name), expected[name])
        assert np.array_equal(opened.read(name, 1), expected[name][1])
        assert np.array_equal(opened.read(name, slice(1, 3)), expected[name][1:3])
        with pytest.raises(IndexError):
            opened.read(name, slice(None, None, 2))
        with pytest.raises(KeyError):
            opened.read("nothing")


def test_loading_it(source: Path, merged: Path, run: Golden) -> None:
    params = bridge.load_jax(source)
    leaf = params["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum"]["lora_a"]
    expected = run.leaves["PaliGemma/llm/layers/attn/q_einsum/lora_a"]
    assert np.array_equal(np.asarray(leaf), expected)
    state = bridge.load_torch(source, **run.options)
    for name, tensor in bridge.load_torch(merged).items():
        assert np.array_equal(state[name].numpy(), tensor.numpy()), name


def test_verify_and_diff(source: Path, merged: Path, run: Golden) -> None:
    verdict = bridge.verify(source, merged, **run.options)
    assert verdict.holds and verdict.counts == bridge.verify(run.checkpoint, merged).counts
    assert not bridge.diff(source, run.checkpoint, **run.options).changed


def test_a_source_is_pickled_and_reads_on(source: Path) -> None:
    opened = formats()[-1].open(Location.parse(source))
    again = pickle.loads(pickle.dumps(opened))
    assert again == opened
    name = next(iter(opened.specs))
    assert np.array_equal(again.read(name), opened.read(name))


@pytest.mark.parametrize("bytes_", [1, 64, 1000])
def test_slabs_are_runs_in_order(source: Path, monkeypatch: pytest.MonkeyPatch, bytes_: int) -> None:
    """As the contract has it: of the array's own shape, and of another."""
    import npy_format  # type: ignore[import-not-found]

    monkeypatch.setattr(npy_format, "SLAB", bytes_)
    opened = npy_format.open_npy(Location.parse(source))
    name = next(name for name in opened.specs if name.endswith("action_in_proj/kernel/value"))
    array = opened.read(name)
    for shape in (None, array.shape, (array.size,), (array.shape[0], 2, array.shape[1] // 2)):
        parts = []
        for at, values in opened.slabs(name, shape):
            assert len(at) == values.ndim == len(shape or array.shape)
            parts.append(values.tobytes())
        assert b"".join(parts) == array.tobytes()
        assert len(parts) > 1


# What is wrong with it.


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        bridge.plan(path, None, to="torch-merged", **options)
    return str(caught.value)


def test_damage_is_refused(source: Path, run: Golden, tmp_path: Path) -> None:
    broken = written(arrays_of(source), tmp_path / "broken")
    (broken / INDEX).write_text("{")
    assert "arrays.json is damaged" in refusal(broken)
    short = written(arrays_of(source), tmp_path / "short")
    (short / "3.npy").unlink()
    with pytest.raises(SourceRefused, match=r"3\.npy"):
        bridge.convert(short, tmp_path / "out", to="torch-merged", **run.options)
    assert not (tmp_path / "out").exists()


def test_what_it_lacks_is_named_as_of_any_pytree(source: Path, tmp_path: Path) -> None:
    leaves = arrays_of(source)
    name = next(name for name in leaves if name.endswith("q_einsum/lora_b/value"))
    del leaves[name]
    said = refusal(written(leaves, tmp_path / "lost"))
    assert "q_einsum/lora_a is there, but its counterpart" in said


def test_a_change_while_it_is_read_is_refused(source: Path, run: Golden, tmp_path: Path) -> None:
    copy = written(arrays_of(source), tmp_path / "copy")
    planned = bridge.plan(copy, tmp_path / "out", to="torch-merged", **run.options)
    np.save(copy / "0.npy", np.load(copy / "0.npy"))
    with pytest.raises(SourceRefused, match="changed while"):
        planned.run()


def test_a_path_that_two_formats_claim(source: Path, tmp_path: Path) -> None:
    both = written(arrays_of(source), tmp_path / "both")
    (both / "params").mkdir()
    said = refusal(both)
    assert "matches more than one format: orbax, npy" in said and "--from" in said
    assert bridge.describe(both, "npy").state == "npy[base+lora]"


# Formats of another form, and such as contradict themselves.


@pytest.fixture
def tensors() -> Iterator[Format]:
    """The same container with the tensors of a state_dict."""
    import npy_format

    format = replace(
        npy_format.FORMAT,
        name="npy-torch",
        states=(State(name="npy-torch", contents="base", format="npy-torch", form=Form.STATE_DICT),),
        open=lambda location: replace(npy_format.open_npy(location), format="npy-torch"),
        claims=lambda location: False,
    )
    with registered(formats=[entry_point(), format]):
        yield format


def test_a_container_of_a_state_dict(
    tensors: Format, source: Path, run: Golden, merged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tensors"
    bridge.convert(source, out, to="npy-torch", **run.options)
    from safetensors.numpy import load_file

    found, expected = arrays_of(out), load_file(merged / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    assert json.loads((out / INDEX).read_text())["metadata"]["format"] == "pt"
    assert bridge.describe(out, "npy-torch").state == "npy-torch[base]"
    bridge.convert(out, tmp_path / "orbax", to="orbax", from_="npy-torch")
    bridge.convert(merged, tmp_path / "expected", to="orbax")
    assert values_of(tmp_path / "orbax") == values_of(tmp_path / "expected")


def test_a_format_that_is_only_read_is_no_target(tensors: Format) -> None:
    import npy_format

    with registered(formats=[replace(npy_format.FORMAT, create=None)]):
        assert "npy" not in targets()
        assert any(edge.source.name == "npy" for edge in converters())
        with pytest.raises(Refusal, match="no route"):
            route(
                converters(),
                State(name="torch-merged", contents="base", format="torch", form=Form.STATE_DICT),
                "npy",
            )


@pytest.mark.parametrize(
    "states",
    [
        (),
        (State(name="npy", contents="base", format="orbax", form=Form.PYTREE),),
        (
            State(name="npy", contents="base", format="npy", form=Form.PYTREE),
            State(name="npy", contents="lora", format="npy", form=Form.ADAPTER),
        ),
    ],
    ids=["none", "of another format", "of two forms"],
)
def test_a_format_that_contradicts_itself_is_refused_when_declared(states: tuple[State, ...]) -> None:
    import npy_format

    with pytest.raises(ValueError, match="format npy"):
        replace(npy_format.FORMAT, states=states)


class Broken:
    """An entry point whose module raises."""

    name, value, dist = "broken", "broken:FORMAT", None

    def load(self) -> Any:
        raise ValueError("rule for a/w: 'x' is an axis of the leaf itself")


def test_a_plugin_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import bridge.plugins as plugins

    for point, said in (
        (Broken(), "plugin broken (broken:FORMAT) of bridge.formats cannot be loaded: rule for a/w"),
        (Entry("odd", "a string"), "plugin odd (a test) of bridge.formats is a builtins.str, not a Format"),
    ):
        monkeypatch.setattr(plugins, "entry_points", lambda group, point=point: [point])
        plugins.load.cache_clear()
        with pytest.raises(PluginRefused) as caught:
            formats()
        assert str(caught.value).startswith(said)
        assert "reinstall or uninstall the package" in str(caught.value)
    monkeypatch.undo()
    plugins.load.cache_clear()
