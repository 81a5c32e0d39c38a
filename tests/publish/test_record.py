"""A directory alone, against its own record."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import bridge
from bridge.proof.verify import verify
from bridge.publish.record import RECORD
from tests.kit import checkpoints

OPTIONS = {
    "torch": {"to": "torch-merged"},
    "orbax": {"to": "orbax"},
    "peft": {"to": "peft-adapter", "lora_alpha": 4.0, "with_base": True},
}
WEIGHTS = {
    "torch": "model.safetensors",
    "orbax": "params/params.action_in_proj.bias/0",
    "peft": "adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    for name, options in OPTIONS.items():
        tree = checkpoints.pi0_tree(**({} if name == "peft" else {"lora": {}}))
        step = checkpoints.save(tree, root / "run" / name, quick=True)
        bridge.convert(step, root / name, **options)
    return root


@pytest.fixture
def out(outputs: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    import shutil

    shutil.copytree(outputs / request.param, tmp_path / request.param)
    return tmp_path / request.param


def fails(out: Path, *said: str) -> None:
    verdict = verify(out)
    assert not verdict.holds
    causes = "\n".join(problem.cause for problem in verdict.problems)
    assert all(each in causes for each in said), causes


@pytest.mark.parametrize("out", OPTIONS, indirect=True)
def test_as_written(out: Path) -> None:
    verdict = verify(out)
    assert verdict.holds and str(out / RECORD) in verdict.files
    assert (str(out / "base" / RECORD) in verdict.files) == (out.name == "peft")


@pytest.mark.parametrize("out", OPTIONS, indirect=True)
def test_a_file_more(out: Path) -> None:
    (out / "assets" / "extra").write_text("x")
    fails(out, f"{out}/assets/extra is not listed in bridge.json")


@pytest.mark.parametrize("out", OPTIONS, indirect=True)
def test_a_link_more(out: Path) -> None:
    (out / "link").symlink_to(out.parent)
    fails(out, f"{out}/link is not listed in bridge.json")


@pytest.mark.parametrize("out", ["orbax"], indirect=True)
def test_a_file_more_within_the_container(out: Path) -> None:
    (out / "params" / "params.action_in_proj.bias" / "1").write_text("x")
    fails(out, "params.action_in_proj.bias/1 is not listed in bridge.json")


@pytest.mark.parametrize("out", OPTIONS, indirect=True)
def test_a_file_less(out: Path) -> None:
    (out / WEIGHTS[out.name]).unlink()
    (out / "assets" / "my_robot" / "norm_stats.json").unlink()
    fails(out, f"{out / WEIGHTS[out.name]} is missing", "norm_stats.json is missing")


@pytest.mark.parametrize("out", OPTIONS, indirect=True)
def test_a_file_cut_short(out: Path) -> None:
    path = out / WEIGHTS[out.name]
    os.truncate(path, path.stat().st_size - 1)
    fails(out, "action_in_proj" if out.name == "orbax" else WEIGHTS[out.name])


@pytest.mark.parametrize("out", OPTIONS, indirect=True)
def test_norm_stats_changed(out: Path) -> None:
    path = out / "assets" / "my_robot" / "norm_stats.json"
    path.write_text(path.read_text().replace("1.5", "1.6"))
    fails(out, "norm_stats.json: checksum mismatch")


@pytest.mark.parametrize("out", ["torch", "peft"], indirect=True)
def test_a_weight_changed(out: Path) -> None:
    with (out / WEIGHTS[out.name]).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    fails(out, "checksum mismatch: changed since bridge wrote it")


def edit(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda record: record.update(changes)


@pytest.mark.parametrize(
    "change",
    [
        edit(scales={"expert": 2}),
        edit(tensors={}),
        edit(container=[]),
        edit(more=1),
        lambda record: record.pop("record"),
    ],
    ids=["scales", "tensors", "container", "more", "unsigned"],
)
@pytest.mark.parametrize("out", ["torch"], indirect=True)
def test_a_record_changed(out: Path, change: Callable[[dict[str, object]], None]) -> None:
    record = json.loads((out / RECORD).read_text())
    change(record)
    if record == json.loads((out / RECORD).read_text()):
        pytest.fail("nothing changed")
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    fails(out, f"{out / RECORD}: checksum mismatch")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"record": 1}'])
@pytest.mark.parametrize("out", ["torch"], indirect=True)
def test_a_record_damaged(out: Path, text: str) -> None:
    (out / RECORD).write_text(text)
    fails(out, f"{out / RECORD}: checksum mismatch")


@pytest.mark.parametrize("out", ["torch"], indirect=True)
def test_no_record(out: Path) -> None:
    (out / RECORD).unlink()
    fails(out, f"has no {RECORD} to check it against")


@pytest.mark.parametrize("out", ["peft"], indirect=True)
def test_the_base_of_an_adapter(out: Path) -> None:
    stats = out / "base" / "assets" / "my_robot" / "norm_stats.json"
    stats.write_text(stats.read_text() + " ")
    fails(out, "base/assets/my_robot/norm_stats.json: checksum mismatch")
    (out / "base" / RECORD).unlink()
    fails(out, f"base/{RECORD} is missing")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(bridge.Refusal, match="does not exist"):
        verify(tmp_path / "nowhere")
