"""The command as people meet it: what it prints, what it exits with, what it imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bridge.cli import demo, main
from bridge.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "cli" / "sample" / "pi0_lora" / "checkpoint"
BRIDGE = Path(sys.executable).with_name("bridge")
ALPHAS = ("--lora-alpha", "paligemma=8", "--lora-alpha", "expert=4")


def bridge(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BRIDGE, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", str(SAMPLE)], ["routes"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['bridge', *{arguments!r}]\n"
        "from bridge.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'torch', 'orbax', 'peft', 'flax', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_convert_writes_and_says_what_it_did(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = bridge("convert", "--to", "torch-merged", *ALPHAS, SAMPLE, out)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "assets",
        "bridge.json",
        "config.json",
        "model.safetensors",
    ]
    for said in ("orbax[base+lora] -> fold", "alpha/rank = 2", "107 tensors", "peak memory", "checksum"):
        assert said in run.stdout


def test_an_adapter_is_proven_in_words_and_in_json(tmp_path: Path) -> None:
    run = bridge("convert", "--to", "peft-adapter", *ALPHAS, "--json", SAMPLE, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    proof = json.loads(run.stdout)["proof"]
    assert proof["modules"] == 3 * 2 * 7
    assert 0 < proof["largest_error"] < 2e-6 and 0 < proof["largest_output_error"] < 1e-5
    line = next(line for line in run.stderr.splitlines() if line.startswith("proof"))
    assert f"PEFT {proof['peft']} loads 42 modules, largest error {proof['largest_error']:.1e}, " in line


def test_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    run = bridge("convert", "--to", "torch-merged", *ALPHAS, "--json", SAMPLE, tmp_path / "out")
    said = json.loads(run.stdout)
    assert (said["model"], said["route"], said["loss"]) == ("pi0", ["fold"], "lossy")
    assert said["scales"]["expert"]["scale"] == 0.5
    assert said["checksum"] in run.stderr
    record = json.loads((tmp_path / "out" / "bridge.json").read_text())
    assert record["checksum"] == said["checksum"]


def test_dry_run_prints_every_rule_and_writes_nothing(tmp_path: Path) -> None:
    run = bridge("convert", "--to", "torch-merged", *ALPHAS, "--dry-run", SAMPLE, tmp_path / "out")
    assert run.returncode == 0
    for said in (
        "layers/attn/attn_vec_einsum/w",
        "float32[3, 8, 16, 64] + 2 a b",
        "layers.{0..2}.self_attn.{k_proj|v_proj}.weight",
        "float32[3, 160, 64] + a b",
        "alpha 4 (given)",
        "reads",
        "writes",
        "memory",
    ):
        assert said in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    run = bridge("convert", "--to", "torch-merged", *ALPHAS, "--quiet", SAMPLE, tmp_path / "out")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_refusal_is_a_cause_and_a_fix_and_exits_1(tmp_path: Path) -> None:
    run = bridge("convert", "--to", "torch-merged", SAMPLE, tmp_path / "out")
    assert run.returncode == 1
    assert run.stdout == ""
    causes = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    fixes = [line for line in run.stderr.splitlines() if line.startswith("  fix:")]
    assert len(causes) == len(fixes) == 2, "one for each expert, both at once"
    assert "paligemma has LoRA of rank 4" in causes[0]
    assert "--lora-alpha paligemma=ALPHA" in fixes[0]
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_for_machines(tmp_path: Path) -> None:
    run = bridge("convert", "--to", "torch-merged", "--json", tmp_path / "nowhere", tmp_path / "out")
    (error,) = json.loads(run.stdout)["errors"]
    assert "does not exist" in error["cause"] and error["fix"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "--to", "floppy", "a", "b"],
        ["convert", "--to", "torch-merged", "--lora-alpha", "many", "a", "b"],
        ["convert", "--to", "torch-merged", "--lora-alpha", "-1", "a", "b"],
        ["convert", "--to", "torch-merged", "--lora-alpha", "expert=1", "--lora-alpha", "expert=2", "a", "b"],
        ["fly"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert bridge(*arguments).returncode == 2


def test_debug_shows_where_a_refusal_comes_from(tmp_path: Path) -> None:
    run = bridge("convert", "--to", "torch-merged", "--debug", tmp_path / "nowhere", tmp_path / "out")
    assert run.returncode == 1
    assert "Traceback" in run.stderr


def test_inspect_tells_what_it_is() -> None:
    run = bridge("inspect", SAMPLE)
    assert run.returncode == 0
    for said in ("orbax[base+lora]", "pi0", "rank 4", "rank 8", "my_robot/norm_stats.json", "step 100"):
        assert said in run.stdout


def test_inspect_as_json() -> None:
    said = json.loads(bridge("inspect", "--json", SAMPLE).stdout)
    assert (said["format"], said["model"], said["arrays"]) == ("orbax", "pi0", 70)
    parts = {part["name"]: part for part in said["parts"]}
    assert parts["expert"]["lora"]["ranks"] == {"attention": 8, "feed-forward": 8}
    assert parts["paligemma"]["sizes"]["hidden"] == 160


def test_inspect_reads_what_convert_wrote(tmp_path: Path) -> None:
    bridge("convert", "--to", "torch-merged", *ALPHAS, "--layout", "lerobot", SAMPLE, tmp_path / "out")
    said = json.loads(bridge("inspect", "--json", tmp_path / "out").stdout)
    assert (said["format"], said["model"], said["layout"], said["arrays"]) == ("torch", "pi0", "lerobot", 108)


def test_routes() -> None:
    run = bridge("routes", "orbax", "torch-merged")
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["export", "fold"]
    assert bridge("routes", "--mermaid").stdout.startswith("flowchart LR")
    edges = json.loads(bridge("routes", "--json").stdout)["converters"]
    assert not any(e["from"] == "orbax[base+lora]" and e["name"] == "export" for e in edges)


def test_demo_proves_the_merge(tmp_path: Path) -> None:
    run = bridge("demo", tmp_path / "demo")
    assert run.returncode == 0, run.stderr
    worst = re.search(r"the same policy: worst relative error (\S+)", run.stdout)
    assert worst is not None and 0 < float(worst.group(1)) <= 2e-6
    assert (tmp_path / "demo" / "pi0_torch" / "model.safetensors").is_file()
    assert bridge("demo", tmp_path / "demo").returncode == 2, "a directory that is not empty is left alone"


@pytest.mark.parametrize(
    "module",
    ["paligemma.model.language_model.layers.2.self_attn.v_proj", "gemma_expert.model.layers.0.mlp.up_proj"],
)
def test_demo_sees_one_module_of_one_layer_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    made = demo._convert

    def broken(ctx: click.Context, source: Path, target: Path, to: str, alphas: list[str]) -> None:
        made(ctx, source, target, to, alphas)
        if to == "torch-merged":
            tensors = load_file(target / "model.safetensors")
            tensors[f"paligemma_with_expert.{module}.weight"][1, 2] += 0.01
            save_file(tensors, target / "model.safetensors")

    monkeypatch.setattr(demo, "_convert", broken)
    run = CliRunner().invoke(cli, ["demo", str(tmp_path / "demo")])
    assert run.exit_code == 1 and "the same policy: worst" not in run.stdout
    assert re.search(r"the merged policy is off by \d\.\de-\d\d", run.stderr)


@pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort])
def test_an_interrupt_is_said_on_stderr_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    def interrupted(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(cli, "main", interrupted)
    assert main.run(["inspect", "x"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (click.UsageError("no such thing"), 2, "Error: no such thing\n"),
        (click.ClickException("it is off"), 1, "Error: it is off\n"),
        (click.exceptions.Exit(3), 3, ""),
    ],
)
def test_the_status_is_that_of_the_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    says: str,
) -> None:
    def failing(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(cli, "main", failing)
    assert main.run(["inspect", "x"]) == status
    assert capsys.readouterr() == ("", says)


def test_inspect_of_an_adapter_says_what_it_is_for_and_what_it_trains(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bridge("convert", "--to", "peft-adapter", *ALPHAS, SAMPLE, out).returncode == 0
    run = CliRunner().invoke(cli, ["inspect", str(out)])
    assert run.exit_code == 0, run.output
    facts = json.loads((SAMPLE.parent / "facts.json").read_text())["lora"]
    assert "peft-adapter" in run.stdout and re.search(r"model +pi0,", run.stdout)
    said = json.loads(CliRunner().invoke(cli, ["inspect", "--json", str(out)]).stdout)
    assert (said["state"], said["model"], said["arrays"]) == ("peft-adapter[lora]", "pi0", 2 * 3 * 2 * 7)
    with safe_open(out / "adapter_model.safetensors", "np") as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    assert said["parameters"] == sum(rows * columns for rows, columns in shapes)
    parts = {part["name"]: part for part in said["parts"] if part["lora"]}
    assert parts.keys() == facts.keys()
    for name, part in parts.items():
        # q has a block for each of eight heads
        assert set(part["lora"]["ranks"].values()) == {facts[name]["rank"], 8 * facts[name]["rank"]}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    # every step of it takes a second, and there are dozens: the signal surely comes while one runs
    code = (
        "import os, sys, time, bridge.conversion.run as runner\n"
        "inner = runner.run_step\n"
        "def slow(*arguments):\n"
        "    os.write(1, b'running\\n'); time.sleep(1.0); return inner(*arguments)\n"
        "runner.run_step = slow\n"
        f"sys.argv = ['bridge', 'convert', '--to', 'torch-merged', *{ALPHAS!r}, {str(SAMPLE)!r}, "
        f"{str(tmp_path / 'out')!r}, '--quiet']\n"
        "from bridge.cli.main import main\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == status, stderr
    assert "nothing was written" in stderr
    assert list(tmp_path.iterdir()) == []
