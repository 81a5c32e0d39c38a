"""Runs a command, and watches how much memory it takes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY = 0.005
"""Seconds between two looks."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Watched:
    """What a process took."""

    seconds: float
    """From before it starts until it has ended."""
    private: int
    """Largest RssAnon seen: memory of its own, in bytes."""
    resident: int
    """VmHWM: with the pages of files it maps."""
    said: Mapping[str, Any]
    """The JSON object it printed."""
    others: float
    """The part of the machine's CPU time that other processes took meanwhile, 0 to 1."""
    stopped: bool = False
    """Whether it was stopped because it took more than it may."""


def watch(command: Sequence[str], most: int | None = None) -> Watched:
    """Run a command until it ends, or takes more than ``most`` bytes.

    Raises:
        RuntimeError: it failed, with what it printed.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    busy, own = _busy(), _own()
    private = resident = 0
    stopped = False
    # files, not pipes: nobody reads while it runs
    with tempfile.TemporaryFile("w+") as out_file, tempfile.TemporaryFile("w+") as error_file:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out_file, stderr=error_file)
        try:
            while process.poll() is None:
                now, high = _memory(process.pid)
                private, resident = max(private, now), max(resident, high)
                if most is not None and private > most:
                    process.kill()
                    stopped = True
                time.sleep(EVERY)
        finally:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - began
        others = max(0.0, _busy() - busy - (_own() - own)) / (seconds * (os.cpu_count() or 1))
        out, errors = (file.seek(0) or file.read() for file in (out_file, error_file))
    if process.returncode and not stopped:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors or out}")
    said = json.loads(out.splitlines()[-1]) if out.startswith("{") else {}
    return Watched(seconds, private, max(resident, said.get("resident", 0)), said, others, stopped)


def driven(verb: str, **arguments: Any) -> list[str]:
    """The command that carries out a verb of the driver."""
    return [sys.executable, "-m", "tests.benchmarks.driver", verb, json.dumps(arguments)]


def bridge(*arguments: str) -> list[str]:
    """The command line of bridge."""
    return [sys.executable, "-c", "from bridge.cli.main import main; main()", *arguments]


def _busy() -> float:
    """CPU seconds that the whole machine has been busy."""
    user, nice, system, _, _, interrupts, soft, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    ticks = sum(map(int, (user, nice, system, interrupts, soft)))
    return ticks / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    return sum(os.times()[:4])


def _memory(pid: int) -> tuple[int, int]:
    found = {}
    # it may end while it is looked at
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmHWM"):
                found[name] = int(value.split()[0]) * 1024
    return found.get("RssAnon", 0), found.get("VmHWM", 0)
