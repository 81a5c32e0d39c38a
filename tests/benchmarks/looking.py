"""How long it takes to look at a checkpoint without reading it, and whether tensors are read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import ranges, watched

LOOKS = {
    "bridge inspect": ("inspect",),
    "bridge convert --dry-run": ("convert", "--dry-run", "--to", "torch-merged"),
}

#: 12 pread64(5</a/file>, "..."..., 4096, 128) = 4096, and read, which has no offset
_CALL = re.compile(r"\b(pread64|read|mmap)\((.*)\) = (\w+)")
_FILE = re.compile(r"\d+<(/[^>]*)>")


def look(checkpoint: Path, rounds: int, forget: Callable[[Iterable[Path]], None]) -> dict[str, Any]:
    """Seconds of each command, and the bytes of tensors it reads (None where strace is missing)."""
    made: dict[str, Any] = {}
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for name, (verb, *options) in LOOKS.items():
        destination = [str(checkpoint.parent / "none")] if verb == "convert" else []
        command = watched.bridge(verb, *options, str(checkpoint), *destination)
        seconds = []
        for _ in range(rounds):
            forget(files)
            seconds.append(watched.watch(command).seconds)
        made[name] = {"seconds": seconds, "tensor_bytes": _tensor_bytes(command, checkpoint)}
    return made


def _tensor_bytes(command: list[str], checkpoint: Path) -> int | None:
    """Bytes of tensors that a command reads, as the kernel sees it."""
    if shutil.which("strace") is None:
        return None
    lie = [one for tensors in ranges.tensors(checkpoint).values() for one in tensors]
    with tempfile.NamedTemporaryFile() as log:
        traced = [
            "strace",
            "-f",
            "-y",
            "-s",
            "0",
            "-o",
            log.name,
            "-e",
            "trace=read,pread64,preadv,mmap",
            *command,
        ]
        environment = os.environ | {"PYTHONPATH": str(watched.ROOT)}
        subprocess.run(traced, check=True, capture_output=True, cwd=watched.ROOT, env=environment)
        return sum(_of_tensors(line, lie) for line in Path(log.name).read_text().splitlines())


def _of_tensors(line: str, lie: list[ranges.Range]) -> int:
    call, file = _CALL.search(line), _FILE.search(line)
    if call is None or file is None:
        return 0
    path, arguments = Path(file[1]), call[2].rsplit(", ", 2)
    if call[1] == "pread64":
        start = int(arguments[-1], 0)
        return ranges.overlap(path, start, start + max(int(call[3], 0), 0), lie)
    mapped = call[1] == "mmap"
    # where it reads is not told: all of it counts, if any tensor lies in the file
    length = int(line.split(", ")[1], 0) if mapped else max(int(call[3], 0), 0)
    return length if any(one.path == path for one in lie) else 0


def same(naive: Path, ours: Path) -> None:
    """Raise unless two outputs hold the same tensors, by name and shape, and by value in a few rows."""
    import bridge

    with bridge.open(naive) as a, bridge.open(ours) as b:
        if a.specs != b.specs:
            raise AssertionError(f"not the same tensors: {sorted(a.specs.keys() ^ b.specs.keys())}")
        for name in a.specs:
            np.testing.assert_allclose(
                a.read(name, slice(0, 2)), b.read(name, slice(0, 2)), rtol=1e-5, atol=1e-6, err_msg=name
            )
