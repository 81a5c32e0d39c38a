"""``bridge demo``: the whole tour on a small pi0 checkpoint, with what openpi's runtime computed from it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .convert import convert
from .inspect import inspect
from .show import say, style

if TYPE_CHECKING:
    import numpy as np

_EXPERTS = {
    "": "paligemma_with_expert.paligemma.model.language_model.layers",
    "_1": "paligemma_with_expert.gemma_expert.model.layers",
}


@click.command()
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.pass_context
def demo(ctx: click.Context, directory: Path | None) -> None:
    """Take a small pi0 checkpoint with LoRA through bridge, and prove the result.

    The checkpoint ships with bridge: openpi's own JAX code trained, saved and ran it. DIR keeps
    the checkpoint and the outputs; without it they are removed again.
    """
    with _workplace(directory) as place, as_file(files(__package__) / "sample" / "pi0_lora") as sample:
        checkpoint, merged, stripped = place / "checkpoint", place / "pi0_torch", place / "pi0_without_lora"
        shutil.copytree(sample / "checkpoint", checkpoint)
        facts = json.loads((sample / "facts.json").read_text())
        alphas = [f"{expert}={lora['alpha']:g}" for expert, lora in facts["lora"].items()]

        _step("What is it?", f"bridge inspect {checkpoint}")
        with inspect.make_context("inspect", [str(checkpoint)], parent=ctx) as made:
            inspect.invoke(made)

        flags = [f"--lora-alpha {alpha}" for alpha in alphas]
        _step(
            "Fold LoRA into the weights. The ranks are not stock ones, so the alphas must be given.",
            f"bridge convert --to torch-merged {' '.join(flags)} {checkpoint} {merged}",
        )
        _convert(ctx, checkpoint, merged, "torch-merged", alphas)

        _step(
            "For comparison: the same without LoRA, as converters write it that do not know of it.",
            f"bridge convert --to torch-base {checkpoint} {stripped}",
        )
        _convert(ctx, checkpoint, stripped, "torch-base", [])

        _step("Is it the same policy? Every module of every layer against openpi's own JAX runtime:", None)
        rows = _errors(sample / "runtime.npz", merged, stripped)
        say(f"  {'module':24}  {'merged':>10}  {'LoRA dropped':>12}   relative error, worst layer")
        for module, (ours, without) in rows.items():
            say(f"  {module:24}  {ours:10.1e}  {without:12.1e}")
        worst = max(ours for ours, _ in rows.values())
        if not worst <= 2e-6:
            raise click.ClickException(f"the merged policy is off by {worst:.1e}")
        say("")
        say(f"{style('the same policy', fg='green')}: worst relative error {worst:.1e} in float32")
        if directory is not None:
            say(f"kept in {place}")


@contextlib.contextmanager
def _workplace(directory: Path | None) -> Iterator[Path]:
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="bridge-demo-") as temporary:
            yield Path(temporary)
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise click.BadParameter(f"{directory} exists and is not an empty directory", param_hint="DIR")
    directory.mkdir(parents=True, exist_ok=True)
    yield directory


def _step(what: str, command: str | None) -> None:
    say("")
    say(f"{style(what, bold=True)}")
    if command is not None:
        say(style(f"$ {command}", fg="cyan"))


def _convert(ctx: click.Context, source: Path, target: Path, to: str, alphas: list[str]) -> None:
    arguments = ["--to", to, str(source), str(target)]
    arguments += [word for alpha in alphas for word in ("--lora-alpha", alpha)]
    with convert.make_context("convert", arguments, parent=ctx) as made:
        convert.invoke(made)


def _errors(recorded: Path, *converted: Path) -> dict[str, tuple[float, ...]]:
    """Worst relative error over the layers, per module, of each converted checkpoint."""
    import numpy as np

    import bridge

    worst: dict[str, tuple[float, ...]] = {}
    with np.load(recorded) as runtime, contextlib.ExitStack() as opened:
        weights = [opened.enter_context(bridge.open(path)) for path in converted]
        for key in (key for key in runtime.files if key.endswith("/input")):
            *_, module, layer, _ = key.split("/")
            suffix = "_1" if module.endswith("_1") else ""
            expected = runtime[key.removesuffix("input") + "output"]
            found = []
            for checkpoint in weights:
                prefix = f"{_EXPERTS[suffix]}.{layer}"
                actual = _forward(checkpoint, module.removesuffix("_1"), prefix, runtime[key], expected.shape)
                found.append(float(np.abs(actual - expected).max() / np.abs(expected).max()))
            before = worst.get(module, (0.0,) * len(found))
            worst[module] = tuple(map(max, before, found))
    return worst


def _forward(checkpoint: Any, module: str, prefix: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What PyTorch computes with the converted weights, arranged as openpi's module returns it."""
    import numpy as np

    def linear(name: str, inputs: np.ndarray) -> np.ndarray:
        weight = checkpoint.read(f"{prefix}.{name}.weight")
        return np.asarray(inputs @ weight.astype(np.float32).T)

    if module == "q_einsum":
        return linear("self_attn.q_proj", x).reshape(shape)
    if module == "kv_einsum":
        return np.stack([linear(f"self_attn.{name}_proj", x) for name in "kv"]).reshape(shape)
    if module == "attn_vec_einsum":
        return linear("self_attn.o_proj", x.reshape(*x.shape[:-2], -1))
    gate = linear("mlp.gate_proj", x)
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return linear("mlp.down_proj", gelu * linear("mlp.up_proj", x))
