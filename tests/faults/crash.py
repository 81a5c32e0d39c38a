"""Conversions in processes that a system call kills or fails, as ``strace -e inject`` makes it.

Run as a script this is a server: it imports what a conversion needs once, and forks a process for
every conversion asked for, which waits until strace holds it. Nothing here needs jax or torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

#: every call that changes something on disk, or decides whether it stays there; strace leaves out, by the
#: question mark, those that an architecture lacks
CALLS = (
    "openat", "write", "pwrite64", "pwritev", "pwritev2", "writev", "sendfile", "copy_file_range",
    "fallocate", "ftruncate", "truncate", "fsync", "fdatasync", "sync_file_range", "syncfs", "flock",
    "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat",
    "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir",
)  # fmt: skip
KILL, NO_SPACE, BROKEN, BROKEN_FOR_GOOD = "signal=KILL", "error=ENOSPC", "error=EIO", "error=EIO+"
DONE, REFUSED, BUG, KILLED = 0, 1, 3, -9


class Inline(Executor):
    """Runs each step at once: system calls come in the same order every time."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except BaseException as error:
            future.set_exception(error)
        return future


class Server:
    """Forks conversions: of a request (options of ``bridge.plan``), traced by strace or not."""

    def __init__(self, scratch: Path) -> None:
        self.log = scratch / "strace.log"
        self.errors = scratch / "errors.log"
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    def close(self) -> None:
        self._process.communicate()

    def convert(self, request: dict[str, Any], *strace: str) -> int:
        """Exit status of a conversion under strace with these options, or without it."""
        pid = int(self._ask(request))
        if not strace:
            return int(self._ask("go"))
        command = ["strace", "-f", "-o", str(self.log), *strace, "-p", str(pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        assert "attached" in attached, attached + tracer.stderr.read()
        status = int(self._ask("go"))
        tracer.communicate(timeout=60)
        return status

    def inject(self, request: dict[str, Any], call: str, number: int, fault: str) -> int:
        """Exit status of a conversion in which a system call fails, or does not return, the nth time."""
        what, when = fault.removesuffix("+"), f"{number}+" if fault.endswith("+") else number
        return self.convert(request, "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={when}")

    def calls(self, request: dict[str, Any]) -> dict[str, list[str]]:
        """System call -> its calls in order, in the thread that has most of those worth failing."""
        status = self.convert(request, "-e", "trace=" + ",".join(f"?{call}" for call in CALLS))
        assert status == DONE, status
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        for line in self.log.read_text().splitlines():
            if match := re.match(r"(\d+) +(\w+)\((.*)", line):
                found[match[2], match[1]].append(match[3])
        names = {name for name, _ in found}
        return {
            name: max(
                (lines for (of, _), lines in found.items() if of == name),
                key=lambda lines: sum(_is_target(name, line) for line in lines),
            )
            for name in names
        }

    def _ask(self, request: object) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._process.stdout.readline()


def targets(calls: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Every call to fail, with its number; of those that open files only the ones that make one."""
    return [
        (name, number)
        for name, lines in sorted(calls.items())
        for number, line in enumerate(lines, 1)
        if _is_target(name, line)
    ]


def _is_target(name: str, line: str) -> bool:
    return name != "openat" or "O_CREAT" in line


def _serve() -> None:
    import tensorstore  # noqa: F401  imported before the fork, used after it
    import zstandard  # noqa: F401

    import bridge.conversion.run
    import bridge.conversion.to_adapter
    import bridge.formats.disk.syscalls
    from bridge.formats.contract import formats
    from bridge.rules.family import families

    # PEFT's loading takes seconds and writes nothing
    vars(bridge.conversion.to_adapter)["PEFT"] = None
    # write-behind is for large parts, and these are small
    bridge.formats.disk.syscalls.MIN_RANGE_BYTES = 1
    families(), formats()
    for name in dir(bridge):
        getattr(bridge, name)  # each is imported when it is first asked for
    for line in sys.stdin:
        wait, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(wait, 1)
            signal.alarm(60)  # what hangs is killed, and told by its status
            os._exit(_convert(json.loads(line)))
        os.close(wait)
        print(pid, flush=True)
        sys.stdin.readline()
        os.close(go)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, flush=True)


def _convert(request: dict[str, Any]) -> int:
    import bridge

    try:
        bridge.plan(request.pop("src"), request.pop("dst"), **request).run(executor=Inline())
    except bridge.Refusal:
        return REFUSED
    except BaseException:
        traceback.print_exc()
        return BUG
    return DONE


if __name__ == "__main__":
    _serve()
