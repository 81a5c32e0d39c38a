"""What forbids an output, found before anything is read."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import bridge
from bridge.errors import OutputRefused
from bridge.publish import preflight as destination
from bridge.publish.preflight import (
    check_destination,
    check_kept,
    check_space,
    check_twins,
    destination_at,
)
from tests.kit import checkpoints


def test_every_fault_is_found(tmp_path: Path) -> None:
    source = tmp_path / "run" / "7"
    source.mkdir(parents=True)
    assert check_destination(tmp_path / "out", source, overwrite=False) == []
    assert check_destination(tmp_path / "run" / "8", source, overwrite=False) == []
    assert check_destination(tmp_path / "run" / "7_torch", source, overwrite=False) == []
    assert check_destination(tmp_path / "out", None, overwrite=False) == []
    assert len(check_destination(source, source, overwrite=False)) == 2


@pytest.mark.parametrize("name", ["a\0b", "..", "x/.."])
def test_what_names_nothing_to_make(tmp_path: Path, name: str) -> None:
    (problem,) = check_destination(tmp_path / name, None, overwrite=True)
    assert "is not a valid path for a directory" in problem.cause


def test_files_of_the_source_are_kept(tmp_path: Path) -> None:
    """A format of somebody else's may read files from anywhere."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "w").touch()
    (tmp_path / "link").symlink_to("out/w")
    assert check_kept(tmp_path / "out", [tmp_path / "other"]) == []
    (problem,) = check_kept(tmp_path / "out", [tmp_path / "link"])
    assert "out contains 1 file of the source (the first: " in problem.cause


def test_an_output_in_the_directory_that_was_named(tmp_path: Path) -> None:
    """It would be taken for a step of the run, or hide the steps."""
    run = tmp_path / "run"
    (run / "7").mkdir(parents=True)
    (problem,) = check_destination(run / "out", run / "7", run, overwrite=False)
    assert problem.cause == f"{run / 'out'} is inside the source {run}"


def test_no_folder_is_made_on_the_way_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path)
    assert destination_at("nowhere/../out") == tmp_path / "out"
    assert destination_at("link/../out") == tmp_path / "out"
    assert destination_at("link/out") == tmp_path / "link" / "out"
    assert destination_at("out/..").name == ".."
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    result = bridge.convert(step, "nowhere/../out", to="torch-merged")
    assert result.destination == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "link", "out", "there"]


def test_space(tmp_path: Path) -> None:
    assert check_space(tmp_path / "not" / "yet" / "out", 1) == []
    (problem,) = check_space(tmp_path / "not" / "yet" / "out", 1 << 60)
    assert "needs 1.15e+06 TB" in problem.cause and problem.fix


def test_the_file_system_says_how_long_a_name_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """eCryptfs allows 143 bytes."""
    name = "a" * 144
    assert check_destination(tmp_path / name, None, overwrite=False) == []
    monkeypatch.setattr(os, "pathconf", lambda path, what: 143)
    (problem,) = check_destination(tmp_path / name, None, overwrite=False)
    assert "a name of 144 bytes exceeds the 143 that the file system allows" in problem.cause


def test_files_that_would_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["assets/Robot/a.json", "assets/robot/a.json", "assets/caf\u00e9", "assets/cafe\u0301", "other"]
    assert check_twins(tmp_path / "out", names) == []
    monkeypatch.setattr(destination, "_is_case_insensitive", lambda path: True)
    causes = [problem.cause for problem in check_twins(tmp_path / "out", names)]
    assert (
        len(causes) == 2 and "assets/Robot/a.json and assets/robot/a.json would be the same file" in causes[0]
    )


def test_a_plan_for_a_file_system_without_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    stats = step / "assets" / "my_robot" / "norm_stats.json"
    other = step / "assets" / "My_Robot" / "norm_stats.json"
    other.parent.mkdir()
    other.write_bytes(stats.read_bytes())
    assert len([f for f in bridge.plan(step, tmp_path / "out", to="orbax").output.files if "obot" in f]) == 2
    monkeypatch.setattr(destination, "_is_case_insensitive", lambda path: True)
    with pytest.raises(
        OutputRefused, match=r"My_Robot/norm_stats\.json and .*my_robot.* would be the same file"
    ):
        bridge.plan(step, tmp_path / "out", to="orbax")


@pytest.mark.parametrize("folds", [False, True])
def test_case_is_found_out_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folds: bool) -> None:
    where = tmp_path / "Here"
    where.mkdir()
    real = os.stat

    def stat(path: object, **options: object) -> os.stat_result:
        found = str(path).replace("hERE", "Here") if folds else str(path)
        return real(found, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(destination, "os", SimpleNamespace(stat=stat, path=os.path))
    assert destination._is_case_insensitive(where / "out") is folds
