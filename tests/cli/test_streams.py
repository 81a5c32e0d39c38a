"""What becomes of the command's lines: closed streams, readers that go, and names that would forge a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.cli.show import say, style
from bridge.publish.record import RECORD
from tests.faults.table import run_here

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "cli" / "sample" / "pi0_lora" / "checkpoint"
BRIDGE = Path(sys.executable).with_name("bridge")
ALPHAS = "--lora-alpha paligemma=8 --lora-alpha expert=4"


def shell(script: str, out: Path) -> tuple[int, str]:
    """The status of ``bridge``, and what any process said on stderr."""
    script = script.replace("CONVERT", f'"$B" convert --to torch-merged {ALPHAS}')
    run = subprocess.run(
        ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={"B": str(BRIDGE), "SRC": str(SAMPLE), "OUT": str(out), "PATH": "/usr/bin:/bin"},
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize(
    "script",
    [
        'CONVERT "$SRC" "$OUT" >&-',
        'CONVERT "$SRC" "$OUT" >/dev/null 2>&-',
        'CONVERT "$SRC" "$OUT" <&- >&- 2>&-',
        'CONVERT --json "$SRC" "$OUT" 2>/dev/full >/dev/null',
        'CONVERT --json "$SRC" "$OUT" 2> >(true) >/dev/null',
    ],
)
def test_an_output_that_is_made_is_done_whoever_listens(tmp_path: Path, script: str) -> None:
    status, said = shell(script, tmp_path / "out")
    assert (status, said) == (0, "")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / RECORD).is_file() and weights[8:9] == b"{", "nothing was printed into a file"


@pytest.mark.parametrize(
    ("script", "makes"),
    [
        ('CONVERT "$SRC" "$OUT" | true', True),
        ('CONVERT --json "$SRC" "$OUT" 2>/dev/null | true', True),
        ('"$B" inspect "$SRC" | true', False),
        ('"$B" convert --help | true', False),
    ],
)
def test_a_reader_that_goes_is_no_error(tmp_path: Path, script: str, makes: bool) -> None:
    """As `| head` does; the status is that of a process that SIGPIPE ended."""
    status, said = shell(script, tmp_path / "out")
    assert (status, said) == (141, "")
    assert (tmp_path / "out" / RECORD).is_file() == makes


def test_a_reader_that_goes_before_a_refusal(tmp_path: Path) -> None:
    status, said = shell('"$B" inspect --json /nowhere | true', tmp_path)
    assert status == 1 and said.startswith("error: /nowhere does not exist")


def test_a_full_disk_below_stdout_is_said(tmp_path: Path) -> None:
    status, said = shell('"$B" inspect "$SRC" >/dev/full', tmp_path)
    assert status == 1 and said.startswith("error: standard output: No space left on device\n  fix: ")


def test_the_end_of_a_file_is_no_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Click takes it for Ctrl-D at a prompt."""
    (tmp_path / "empty.npz").touch()
    arguments = ["verify", "--full-model", "--reference", str(tmp_path / "empty.npz"), str(SAMPLE)]

    def fail(*arguments: object, **options: object) -> None:
        raise EOFError("No data left in file")

    monkeypatch.setattr("bridge.verify", fail, raising=False)
    ran = run_here(arguments)
    assert ran.code == 1 and "interrupted" not in ran.err
    assert ran.err.startswith("error: a file ends before its data: No data left in file\n  fix: ")


# Names.

FORGED = "\nwrote        /etc/passwd\x1b[2J\x1b]0;title\x07\x1b[31m\r\x9b1A\u202e"


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{style('note', fg='red')} {FORGED} {style(FORGED, bold=True)}")
    (line,) = capsys.readouterr().out.splitlines()
    shown = r"\nwrote        /etc/passwd\x1b[2J\x1b]0;title\x07\x1b[31m\r\x9b1A\u202e"
    assert line == f"note {shown} {shown}"


def test_styles_are_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    monkeypatch.setattr("click.echo", lambda text, **how: printed.append(text))
    say(f"{style('a', fg='red')} \x1b[31mb \ufdd0[31m c")
    assert printed == ["\x1b[31ma\x1b[0m \\x1b[31mb \\ufdd0[31m c"]


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PyTorch checkpoint with hostile names wherever bridge prints one: of its files, and in their contents."""
    import bridge

    root = tmp_path_factory.mktemp("forged")
    bridge.convert(SAMPLE, root / "a", to="torch-merged", lora_alpha=8)
    bridge.convert(SAMPLE, root / "adapter", to="peft-adapter", lora_alpha=8)
    out = root / f"b{FORGED.replace('/', '')}"
    (root / "a").rename(out)
    stats = out / "assets" / "my_robot"
    stats.rename(stats.with_name("r\nfixed        all\x1b[2J"))
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = FORGED
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "SRC"],
        ["inspect", "ADAPTER"],
        ["verify", "SRC"],
        ["verify", "SRC", "SRC"],
        ["diff", "SRC", "SRC"],
        ["convert", "--to", "orbax", "--no-check", "--dry-run", "SRC", "OUT"],
        ["convert", "--to", "orbax", "--no-check", "SRC", "OUT"],
        ["convert", "--to", "peft-adapter", "SRC", "OUT"],
        ["convert", "--to", FORGED, "SRC", "OUT"],
        ["convert", "--from", FORGED, "--to", "orbax", "SRC", "OUT"],
        ["convert", "--to", "torch-merged", "--base", "SRC", "--layout", FORGED, "ADAPTER", "OUT"],
        ["routes", FORGED],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_no_name_reaches_the_terminal_raw(forged: Path, tmp_path: Path, arguments: list[str]) -> None:
    names = {"SRC": forged, "ADAPTER": forged.parent / "adapter", "OUT": tmp_path / "o\nwrote    all\x1b[2J"}
    ran = run_here([str(names.get(each, each)) for each in arguments])
    said = ran.out + ran.err
    assert said.strip() and said.replace("\n", "").isprintable(), repr(said)
    assert not any(
        line.startswith(("wrote        /etc", "fixed", "wrote    all")) for line in said.splitlines()
    )
    assert "internal error" not in said
