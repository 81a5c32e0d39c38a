"""Every example runs, and the README shows what is really there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bridge.conversion.converters import converters
from bridge.graph import mermaid
from tests.kit.checkpoints import save

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "cli" / "sample" / "pi0_lora" / "checkpoint"


def python(*arguments: str | Path, path: Path | None = None) -> str:
    env = None
    if path is not None:
        import os

        env = os.environ | {"PYTHONPATH": str(path)}
    run = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_convert_example(tmp_path: Path) -> None:
    said = python(ROOT / "examples/convert.py", SAMPLE, tmp_path / "out", "paligemma=8", "expert=4")
    assert "107 tensors" in said
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_read_one_layer_example() -> None:
    said = python(ROOT / "examples/read_one_layer.py", SAMPLE, "1")
    assert "params/PaliGemma/llm/layers/attn/attn_vec_einsum/w/value float32[3, 8, 16, 64]: layer 1" in said


def test_load_into_nnx_example(tmp_path: Path) -> None:
    """The same numbers from the JAX checkpoint and, in memory, from its PyTorch form."""
    said = python(ROOT / "examples/load_into_nnx.py", SAMPLE)
    assert said.startswith("14 actions -> 48: (1, 48)")
    python(
        "-c", f"import bridge; bridge.convert({str(SAMPLE)!r}, {str(tmp_path / 'out')!r}, to='torch-base')"
    )
    assert python(ROOT / "examples/load_into_nnx.py", tmp_path / "out") == said


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example adapter, installed as a package of its own."""
    import shutil

    source = tmp_path_factory.mktemp("source") / "own_adapter"
    shutil.copytree(ROOT / "examples/own_adapter", source)
    target = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source)
    return target


def test_own_adapter_is_found_and_converts(installed: Path, tmp_path: Path) -> None:
    """A model that bridge does not know, registered from outside, folds as openpi's einsums compute."""
    random = np.random.default_rng(0)
    layers, heads, width, dim, rank, alpha = 2, 3, 7, 5, 2, 6.0
    shapes = {
        "embed": (11, width),
        "mix/w": (layers, heads, width, dim),
        "mix/lora_a": (layers, heads, width, rank),
        "mix/lora_b": (layers, heads, rank, dim),
        "out/w": (layers, heads, dim, width),
        "out/lora_a": (layers, heads, dim, rank),
        "out/lora_b": (layers, heads, rank, width),
    }
    tree = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    source = save(tree, tmp_path / "toy", quick=True)

    convert = (
        "import sys, bridge; src, dst = sys.argv[1:]; "
        f"bridge.convert(src, dst, to='torch-merged', lora_alpha={alpha})"
    )
    python("-c", convert, source, tmp_path / "out", path=installed)
    assert json.loads((tmp_path / "out" / "bridge.json").read_text())["model"] == "toy"

    from safetensors.numpy import load_file

    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert set(weights) == {
        "embed.weight",
        *(f"layers.{i}.{n}.weight" for i in range(2) for n in ("mix", "out")),
    }
    x = random.normal(size=(4, heads, dim)).astype(np.float32)
    for layer in range(layers):
        w, a, b = (tree[f"out/{name}"][layer] for name in ("w", "lora_a", "lora_b"))
        online = np.einsum("TNH,NHD->TD", x, w) + alpha / rank * np.einsum(
            "TL,NLD->TD", np.einsum("TNH,NHL->TL", x, a), b
        )
        merged = x.reshape(4, -1) @ weights[f"layers.{layer}.out.weight"].T
        np.testing.assert_allclose(merged, online, rtol=1e-5, atol=1e-5)


def test_without_the_package_the_model_is_unknown(tmp_path: Path) -> None:
    source = save({"embed": np.zeros((3, 5), np.float32)}, tmp_path / "toy", quick=True, assets=False)
    run = subprocess.run(
        [sys.executable, "-c", f"import bridge; bridge.describe({str(source)!r})"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "these 1 names match no supported model" in run.stderr


def test_readme_links_every_example_and_names_only_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    for example in sorted((ROOT / "examples").iterdir()):
        assert f"examples/{example.name}" in readme, f"{example.name} is not linked from the README"
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme):
        assert (ROOT / link).exists(), f"the README links to {link}, which is not there"


def test_readme_names_only_commands_and_flags_that_exist() -> None:
    from bridge.cli.main import cli

    readme = (ROOT / "README.md").read_text()
    for name, rest in re.findall(r"bridge (convert|inspect|routes|demo)\b([^\n`]*)", readme):
        command = cli.commands[name]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
            assert flag in known, f"the README shows `bridge {name} {flag}`, which is no option"
    shown = set(re.findall(r"\bbridge ([a-z]+)\b", "\n".join(re.findall(r"`(bridge [^`]*)`", readme))))
    assert shown <= set(cli.commands), f"no such command: {shown - set(cli.commands)}"


def test_the_readme_has_the_graph_that_there_is() -> None:
    readme = (ROOT / "README.md").read_text()
    graph = readme.partition("```mermaid\n")[2].partition("```")[0]
    assert graph.strip() == mermaid(converters()).strip()
