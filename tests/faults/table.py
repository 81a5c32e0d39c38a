"""The faults that bridge must survive, as rows of a table: what provokes one, and what the user sees.

A row starts from a conversion that would succeed and replace an old output, spoils it, and runs
the command. Whatever happens, the source and the old output must be untouched, nothing may be
left over, and the process must end: :func:`check` asserts that for every row.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tests.kit import checkpoints
from tests.kit.digest import snapshot

ROOT = Path(__file__).resolve().parents[2]
BRIDGE = Path(sys.executable).with_name("bridge")
FAULTS: Mapping[int, str] = {
    1: "data file truncated",
    2: "data file deleted",
    3: "root manifest empty or deleted",
    4: "index node deleted or flipped",
    5: "_METADATA missing, truncated, or of another shape",
    6: "_METADATA and store disagree",
    7: "chunk missing inside an array",
    8: "bit flip in the data",
    9: "burst of damage in the data",
    10: "zstd stream too short, too long, or a bomb",
    11: "hostile .zarray",
    12: "hostile paths in the index",
    13: "save not finished",
    14: "wrong level, or another way to store",
    15: "pointers and leftovers of a download",
    16: "source written or pruned while it is read",
    17: "missing key",
    18: "extra key",
    19: "wrong shape",
    20: "wrong dtype",
    21: "mixed dtypes",
    22: "NaN or Inf",
    23: "finite values that overflow a cast",
    24: "value suffix on some keys only",
    25: "keys that collide after renaming",
    26: "LoRA factors that do not fit",
    27: "tied weights, empty and scalar arrays, empty and huge trees",
    28: "damaged safetensors header",
    29: "header bomb",
    30: "hostile index.json",
    31: "malicious pickle",
    32: "sub-byte and confusable dtypes",
    33: "disk full",
    34: "I/O error",
    35: "killed at any system call",
    36: "SIGINT, SIGTERM, SIGHUP",
    37: "power loss",
    38: "output exists",
    39: "output and source are one, or inside each other",
    40: "symlink loops, source files that are symlinks",
    41: "output that cannot be written to",
    42: "two runs at once",
    43: "temporary directory on another device",
    44: "hard names",
    45: "case-insensitive file system",
    46: "limits on file size, descriptors, memory",
    47: "short writes, interrupted calls, huge writes",
    48: "umask, setgid directory",
    49: "two runs, the same bytes",
    50: "slow or remote file system",
}
#: seconds after which a process has not ended
PATIENCE = 60.0


@dataclass(frozen=True)
class Ran:
    """How the command ended and what it said."""

    code: int
    out: str
    err: str


@dataclass
class Scene:
    """A conversion that would succeed, until a row spoils it.

    ``tmp/run/7`` is a small pi0 step, ``tmp/made/out`` an older output of it (other dtype), and
    the command would replace that. A row may change everything here, paths included.
    """

    tmp: Path
    patch: pytest.MonkeyPatch
    options: list[str] = field(default_factory=lambda: ["--to", "torch-merged", "--overwrite"])
    prefix: list[str] = field(default_factory=list)
    """Commands that start the command: ``["prlimit", "--nofile=32"]``."""
    limits: str = ""
    """Python that is run in the process before it becomes the command: ``os.umask(0o077)``. Not a function for
    ``subprocess`` to call: a fork of a process that has threads may hang."""
    environment: dict[str, str] = field(default_factory=dict)
    process: bool = False
    """Run as a process of its own. Rows that set prefix, limits or environment need not say so."""
    during: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    """What holds while the command runs, such as a mount. Entered before the command, left after."""

    def __post_init__(self) -> None:
        self.step = self.src = self.tmp / "run" / "7"
        self.dst = self.tmp / "made" / "out"
        shutil.copytree(template() / "run", self.tmp / "run")
        shutil.copytree(template() / "made", self.tmp / "made")

    @property
    def params(self) -> Path:
        return self.step / "params"

    def data_file(self) -> Path:
        """The file that holds the most of the source's data."""
        return max((self.params / "ocdbt.process_0").glob("d/*"), key=lambda file: file.stat().st_size)

    def save(self, tree: checkpoints.Tree, **how: Any) -> None:
        """Another source in the place of the first."""
        shutil.rmtree(self.step)
        checkpoints.save(tree, self.step, **{"quick": True, **how})

    def from_torch(self) -> Path:
        """Convert back from a PyTorch checkpoint instead; returns its ``model.safetensors``."""
        shutil.rmtree(self.tmp / "run")
        shutil.copytree(template() / "made" / "out", self.step)
        self.dst = self.tmp / "made" / "orbax"
        self.options = ["--to", "orbax"]
        return self.step / "model.safetensors"

    def new(self) -> None:
        """No output is there yet."""
        shutil.rmtree(self.dst)
        self.options.remove("--overwrite")

    def arguments(self) -> list[str]:
        return ["convert", *self.options, "--", os.fspath(self.src), os.fspath(self.dst)]

    def run(self) -> Ran:
        if self.process or self.prefix or self.limits or self.environment:
            return self._run_process()
        return run_here(self.arguments())

    def _run_process(self) -> Ran:
        become = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        begin = ["-c", f"import os, resource, sys; {self.limits}; {become}"] if self.limits else []
        process = subprocess.run(
            [*self.prefix, sys.executable, *begin, BRIDGE, *self.arguments()],
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=PATIENCE,
            env={**os.environ, **self.environment},
            cwd=self.tmp,
        )
        return Ran(process.returncode, process.stdout, process.stderr)


@dataclass(frozen=True)
class Expect:
    """What the user sees."""

    says: str
    """Regular expression, of lines, found in what goes to stderr, or to stdout where it is done (code 0)."""
    code: int = 1
    also: Callable[[Scene, Ran], object] = lambda scene, ran: None
    """Asserts what is particular to the row."""


@dataclass(frozen=True)
class Fault:
    """A row: one way to provoke a fault of the list above.

    One that cannot be provoked has neither ``provoke`` nor ``expect``, and says why.
    """

    number: int
    title: str
    provoke: Callable[[Scene], object] | None = None
    expect: Expect | None = None
    why_not: str = ""
    """Why it cannot be provoked here, and which test covers it instead."""

    def __post_init__(self) -> None:
        assert (self.provoke is None) == (self.expect is None) == bool(self.why_not), self.title

    @property
    def name(self) -> str:
        return f"{self.number:02} {FAULTS[self.number]}: {self.title}"


def provoked(faults: list[Fault]) -> list[Any]:
    """The rows that can be provoked, for ``pytest.mark.parametrize("fault", ...)``."""
    return [pytest.param(fault, id=fault.name) for fault in faults if fault.provoke is not None]


def check(fault: Fault, scene: Scene) -> None:
    """Provoke a fault and hold what happens against the row."""
    assert fault.provoke is not None and fault.expect is not None
    fault.provoke(scene)
    threads = set(threading.enumerate())
    before = snapshot(scene.tmp)
    with scene.during():
        ran = scene.run()
        after = snapshot(scene.tmp)
    expect = fault.expect
    assert ran.code == expect.code, f"exit {ran.code}\n{ran.out}\n{ran.err}"
    said = ran.out if expect.code == 0 else ran.err
    assert re.search(expect.says, said, re.MULTILINE), said
    assert "Traceback" not in ran.err and " object at 0x" not in ran.err, ran.err
    assert "internal error in bridge" not in ran.err, ran.err
    if expect.code == 0:
        # the new output is in place, the source is as it was
        inside = os.path.relpath(scene.dst, scene.tmp)
        for each in (before, after):
            for path in [path for path in each if path == inside or path.startswith(f"{inside}/")]:
                del each[path]
    elif expect.code == 1:
        errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        fixes = [line for line in ran.err.splitlines() if line.startswith("  fix: ")]
        assert errors and len(errors) == len(fixes), ran.err
        assert all(len(line) < 1000 for line in errors), ran.err
    check_lines(ran)
    if expect.code == 0:
        check_published(scene.dst, scene.tmp)
    assert after == before, "the source, the old output, or what lies beside them has changed"
    assert set(threading.enumerate()) <= threads, "threads outlive the command"
    expect.also(scene, ran)


def check_lines(ran: Ran) -> None:
    """Whatever is said is said in lines: a problem in two, and nothing of a name starts a third."""
    lines = ran.err.splitlines()
    assert ran.err.replace("\n", "").isprintable(), repr(ran.err)
    if ran.code == 1:
        assert all(line.startswith(("error: ", "  fix: ", "  note: ")) for line in lines), ran.err
        first = [line for line in lines if not line.startswith("  note: ")]
        assert [line[:7] for line in first] == ["error: ", "  fix: "] * (len(first) // 2), ran.err


def check_published(output: Path, home: Path) -> None:
    """What is published tells nothing of the machine that it was made on."""
    told = [os.fsencode(word) for word in (str(home), f"{Path.home()}/")]
    for file in output.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        assert not [word for word in told if word in data], file


def run_here(arguments: list[str]) -> Ran:
    """Run the command in this process."""
    from bridge.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    return Ran(code, out.getvalue(), err.getvalue())


@cache
def template() -> Path:
    """A step and an output of it, made once a process and copied for every row."""
    import atexit

    import bridge

    made = Path(mkdtemp(prefix="bridge-faults-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    checkpoints.save(checkpoints.pi0_tree(lora={}), made / "run" / "7", quick=True)
    bridge.convert(made / "run" / "7", made / "made" / "out", to="torch-merged", dtype="float32")
    return made
