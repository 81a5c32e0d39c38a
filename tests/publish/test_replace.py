"""What ``--overwrite`` replaces: outputs of bridge, all of whose files bridge wrote; nothing else is ever deleted."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import bridge
from bridge.errors import Refusal
from bridge.publish.record import RECORD, self_checksum
from bridge.publish.replace import remove_output, replacement_problems
from tests.kit import checkpoints
from tests.kit.digest import snapshot


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run and its adapter, with the base in it."""
    root = tmp_path_factory.mktemp("made")
    small = {"layers": 2, "image_layers": 1}
    checkpoints.save(checkpoints.pi0_tree(**small), root / "7", quick=True)
    bridge.convert(root / "7", root / "out", to="peft-adapter", lora_alpha=4.0, with_base=True)
    return root


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def edited_record(out: Path) -> None:
    """A file more, in a record that nobody signed."""
    record = json.loads((out / RECORD).read_text())
    record["container"].append("thesis.tex")
    (out / RECORD).write_text(json.dumps(record, indent=2))
    (out / "thesis.tex").write_text("x")


def retrained(out: Path) -> None:
    """Weights that somebody trained further, under the same name."""
    file = out / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    later = (out / RECORD).stat().st_mtime_ns + 1_000_000_000
    os.utime(file, ns=(later, later))


def elsewhere(out: Path) -> None:
    file = out / "adapter_model.safetensors"
    file.symlink_to(file.rename(out.parent / "elsewhere"))


def write(*parts: str) -> Callable[[Path], object]:
    def provoke(out: Path) -> None:
        file = out.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")

    return provoke


FOREIGN = {
    "notes": (write("notes.md"), r"contains 1 file that bridge did not write: notes\.md$"),
    "results of an evaluation": (
        lambda out: [write("eval", name)(out) for name in "abcde"],
        r"5 files that bridge did not write: eval/a, eval/b, eval/c, eval/d, and 1 more$",
    ),
    "a directory with a file of that name": (write("thesis", RECORD), r"write: thesis/bridge\.json$"),
    "in the base": (write("base", "notes.md"), r"write: base/notes\.md$"),
    "in the place of the base": (
        lambda out: (shutil.rmtree(out / "base"), write("base", "x")(out)), r"write: base/x$",
    ),
    "a link": (lambda out: (out / "link").symlink_to("/etc"), r"write: link$"),
    "a link in the place of a file": (elsewhere, r"write: adapter_model\.safetensors$"),
    "a link in the place of the base": (
        lambda out: (out / "base").rename(out.parent / "b") and (out / "base").symlink_to("../b"), r"write: base$",
    ),
    "a pipe": (lambda out: os.mkfifo(out / "pipe"), r"write: pipe$"),
    "a hidden file": (write(".git", "config"), r"write: \.git/config$"),
    "no record": (lambda out: (out / RECORD).unlink(), r"was not written by bridge \(no bridge\.json\)$"),
    "another record": (write(RECORD), r"its bridge\.json is not as bridge writes it$"),
    "a record that is not JSON": (lambda out: (out / RECORD).write_text("# bridge"), r"not as bridge writes it$"),
    "a record that is a link": (
        lambda out: (out / RECORD).symlink_to((out / RECORD).rename(out.parent / "r")), r"not as bridge writes it$",
    ),
    "a record with a file more": (edited_record, r"not as bridge writes it$"),
    "a config that was edited": (write("adapter_config.json"), r"adapter_config\.json in it has changed since"),
    "norm stats that were edited": (
        write("base", "assets", "my_robot", "norm_stats.json"), r"base/assets/\S+ in it has changed since",
    ),
    "weights that were trained further": (retrained, r"base/model\.safetensors in it has changed since"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_bridges_is_named_and_stays(made: Path, out: Path, what: str) -> None:
    provoke, says = FOREIGN[what]
    provoke(out)
    before = snapshot(out.parent)
    with pytest.raises(Refusal, match=rf"(?m)out exists and .*{says}") as refused:
        bridge.convert(made / "7", out, to="peft-adapter", lora_alpha=4.0, overwrite=True)
    assert len(refused.value.problems) == 1 and "elsewhere" in refused.value.problems[0].fix
    assert snapshot(out.parent) == before


def test_a_repository_with_a_file_of_that_name(made: Path, tmp_path: Path) -> None:
    repository = tmp_path / "thesis"
    subprocess.run(["git", "init", "-q", repository], check=True)
    (repository / "thesis.tex").write_text("x")
    for record in ("{}", json.dumps({"files": {}, "container": [], "outputs": []})):
        (repository / RECORD).write_text(record)
        before = snapshot(tmp_path)
        with pytest.raises(Refusal, match="not as bridge writes it"):
            bridge.convert(made / "7", repository, to="torch-base", overwrite=True)
        assert snapshot(tmp_path) == before
    made_up = {"files": {}, "container": [], "outputs": []}
    (repository / RECORD).write_text(json.dumps({**made_up, "record": self_checksum(made_up)}))
    with pytest.raises(Refusal, match=r"files that bridge did not write: \.git/"):
        bridge.convert(made / "7", repository, to="torch-base", overwrite=True)


def test_a_directory_that_cannot_be_looked_through(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("assets"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (problem,) = replacement_problems(out)
    assert "cannot be looked through: Permission denied" in problem.cause


def copied(out: Path) -> None:
    """A copy whose times say nothing: its weights are read, and match."""
    for number, file in enumerate(sorted(out.rglob("*"), reverse=True)):
        os.utime(file, (number, number))


#: what leaves nothing behind that bridge did not write
OURS = {
    "as it was written": lambda out: None,
    "copied": copied,
    "without its weights": lambda out: (out / "adapter_model.safetensors").unlink(),
    "without its base": lambda out: shutil.rmtree(out / "base"),
    "an empty directory more": lambda out: (out / "empty" / "inner").mkdir(parents=True),
}


@pytest.mark.parametrize("what", OURS)
def test_an_output_of_bridge_is_replaced_and_removed(out: Path, what: str) -> None:
    OURS[what](out)
    assert replacement_problems(out) == []
    assert remove_output(out) == "" and list(out.parent.iterdir()) == []


@pytest.mark.parametrize("killed_after", range(0, 8, 3))
def test_a_removal_that_was_killed_is_carried_on(
    out: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record goes last: what is left is known for bridge's own."""
    calls, real = iter(range(100)), Path.unlink

    def unlink(self: Path, **options: bool) -> None:
        if next(calls) >= killed_after:
            raise KeyboardInterrupt
        real(self, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        remove_output(out)
    monkeypatch.undo()
    assert (out / RECORD).is_file()
    assert remove_output(out) == "" and list(out.parent.iterdir()) == []
