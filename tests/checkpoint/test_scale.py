"""Time and memory in proportion to what a checkpoint has: modules, tensors, patterns, files beside it."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from bridge.arrays import FLOAT32, Spec
from bridge.checkpoint import assets
from bridge.checkpoint.describe import describe
from bridge.checkpoint.open import open_source
from bridge.cli.main import run
from bridge.errors import CheckpointRefused
from bridge.formats.safetensors.header import compose

pytestmark = pytest.mark.slow

SAMPLE = (
    next(path for path in (files("bridge.cli") / "sample").iterdir() if path.is_dir()) / "checkpoint" / "100"
)
LAYERS = "paligemma_with_expert.paligemma.model.language_model.layers"
#: module -> in, out
SEVEN = {
    **{f"self_attn.{name}_proj": (5, 3) for name in "qkvo"},
    **{f"mlp.{name}_proj": (5, 7) for name in ("gate", "up", "down")},
}


def tensors(directory: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros that takes no space."""
    directory.mkdir(parents=True)
    first, header = compose({name: Spec(shape, FLOAT32) for name, shape in shapes.items()}, {})
    with (directory / name).open("wb") as file:
        file.write(first)
        file.truncate(header.length)
    return directory


def modules(count: int) -> list[str]:
    return [f"{LAYERS}.{n // len(SEVEN)}.{[*SEVEN][n % len(SEVEN)]}" for n in range(count)]


def adapter(directory: Path, count: int, config: dict[str, object]) -> Path:
    shapes = {}
    for module in modules(count):
        into, out = SEVEN[".".join(module.split(".")[-2:])]
        shapes[f"base_model.model.{module}.lora_A.weight"] = (2, into)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (out, 2)
    tensors(directory, "adapter_model.safetensors", shapes)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def by_names(directory: Path, count: int) -> Path:
    return adapter(directory, count, {"target_modules": [name.split(".")[1] for name in SEVEN]})


def by_pattern(directory: Path, count: int) -> Path:
    pattern = rf"{LAYERS}\.\d+\.(self_attn|mlp)\.\w+".replace("_model.", r"_model\.")
    return adapter(directory, count, {"target_modules": pattern, "rank_pattern": {r".*\.q_proj": 2}})


def ranks_of_their_own(directory: Path, count: int) -> Path:
    """As adaptive ranks are saved: a rank and an alpha for each module."""
    ranks = dict.fromkeys(modules(count), 2)
    names = [name.split(".")[1] for name in SEVEN]
    return adapter(
        directory, count, {"r": 3, "target_modules": names, "rank_pattern": ranks, "alpha_pattern": ranks}
    )


def saved_whole(directory: Path, count: int) -> Path:
    """With names in modules_to_save that none of the modules has."""
    names = [name.split(".")[1] for name in SEVEN]
    saved = [f"head_{n}.of_many" for n in range(count // 5)]
    return adapter(directory, count, {"target_modules": names, "modules_to_save": saved})


def misshapen(directory: Path, count: int) -> Path:
    return tensors(directory, "model.safetensors", {f"{module}.weight": (1,) for module in modules(count)})


def foreign(directory: Path, count: int) -> Path:
    shapes = {f"net.block{n * 7919 % count}.{n}.w": (1,) for n in range(count)}
    return tensors(directory, "model.safetensors", shapes)


def wrapped(directory: Path, count: int) -> Path:
    return tensors(directory, "model.safetensors", {"a." * 60 + f"t{n}": (1,) for n in range(count)})


def with_assets(directory: Path, count: int) -> Path:
    checkpoint = Path(shutil.copytree(str(SAMPLE), directory))
    for n in range(count):
        (checkpoint / "assets" / f"group_{n % 7}").mkdir(parents=True, exist_ok=True)
        (checkpoint / "assets" / f"group_{n % 7}" / f"{n}.json").write_bytes(b"{}")
    return checkpoint


KINDS: dict[str, Callable[[Path, int], Path]] = {
    make.__name__: make
    for make in (
        by_names,
        by_pattern,
        ranks_of_their_own,
        saved_whole,
        misshapen,
        foreign,
        wrapped,
        with_assets,
    )
}


def seconds(path: Path) -> float:
    """Processor time of inspecting: the least of several, as other programs only add to it."""
    least = float("inf")
    for _ in range(2):
        began = time.process_time()
        with contextlib.suppress(CheckpointRefused):
            # a budget of time must not stand in for time in proportion
            assert not any("takes longer" in problem for problem in describe(path).problems)
        least = min(least, time.process_time() - began)
    return least


@pytest.mark.parametrize("kind", KINDS)
def test_ten_times_as_much_takes_ten_times_as_long(kind: str, tmp_path: Path) -> None:
    small, large = (seconds(KINDS[kind](tmp_path / f"{count}", count)) for count in (200, 2000))
    # a square would be a hundred times; what does not depend on the size makes it less than ten
    assert large < 25 * small, f"{large:.3f} s for ten times of what takes {small:.3f} s"


def test_the_arrays_of_a_source_are_listed_once(tmp_path: Path) -> None:
    """Specs are asked for at every tensor."""
    for path in (SAMPLE, by_names(tmp_path / "adapter", 7)):
        source = open_source(str(path))
        assert source.specs is source.specs


def test_no_more_files_are_read_than_a_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = with_assets(tmp_path / "run", 30)
    monkeypatch.setattr(assets, "MAX_FILES", 31)
    assert len(describe(checkpoint).assets) == 31
    monkeypatch.setattr(assets, "MAX_FILES", 30)
    (problem,) = describe(checkpoint).problems
    assert problem.endswith("assets contains 31 files, more than 30")


def test_a_few_of_many_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = with_assets(tmp_path / "run", 30)
    assert run(["inspect", str(checkpoint)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  assets "))
    assert line.count(".json") == 20 and line.endswith(", and 11 more")
