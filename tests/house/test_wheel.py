"""The wheel: the three folders, whole, below the one name `bridge`, and nothing else."""

import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED_AS = {"bridge": "bridge", "adapters": "bridge/adapters", "cli": "bridge/cli"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel built, offline, from a copy: setuptools leaves build/ and an egg-info where it builds."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*INSTALLED_AS, "tests", "examples"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    out = source / "out"
    build = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        cwd=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert build.returncode == 0, build.stdout[-4000:]
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def packaged(wheel: zipfile.ZipFile) -> set[str]:
    """Its files, without the metadata and without folders' own entries."""
    return {n for n in wheel.namelist() if ".dist-info/" not in n and not n.endswith("/")}


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_holds_every_file_of_the_three_folders_and_no_other(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in INSTALLED_AS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = packaged(wheel)
    assert expected - held == set(), "not in the wheel: see [tool.setuptools] packages and package-data"
    assert held - expected == set(), "in the wheel, but in none of the folders"


def test_files_are_the_same_bytes(wheel: zipfile.ZipFile) -> None:
    for folder, inside in INSTALLED_AS.items():
        for name in packaged(wheel):
            relative = Path(name).relative_to(inside) if name.startswith(f"{inside}/") else None
            if relative and (ROOT / folder / relative).is_file():
                assert wheel.read(name) == (ROOT / folder / relative).read_bytes(), name


def test_installs_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in packaged(wheel)} == {"bridge"}
    assert metadata(wheel, "top_level.txt").split() == ["bridge"]


def test_entry_points_name_files_that_are_there(wheel: zipfile.ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = configparser.ConfigParser()
    points.optionxform = str  # type: ignore[assignment,method-assign]
    points.read_string(metadata(wheel, "entry_points.txt"))
    declared = {"console_scripts": project["scripts"], **project["entry-points"]}
    assert {group: dict(points[group]) for group in points.sections()} == declared
    held = packaged(wheel)
    for group in declared.values():
        for target in group.values():
            assert target.partition(":")[0].replace(".", "/") + ".py" in held


def test_metadata_says_licence_and_python(wheel: zipfile.ZipFile) -> None:
    lines = metadata(wheel, "METADATA").splitlines()
    assert {"Name: openpi-bridge", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= set(lines)
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("folder", ["adapters", "cli"])
def test_folders_refuse_their_short_names(folder: str) -> None:
    """From the repository's root the short name is importable: it must say what to import instead."""
    run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"ImportError: this folder installs as bridge.{folder}" in run.stderr
