"""What is measured, each in a process of its own: ``python -m tests.benchmarks.driver VERB JSON``.

Prints one JSON object: ``seconds``, from after the imports until the work is done, and
``resident``, the highest resident memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def convert(src: str, dst: str, **options: Any) -> float:
    import bridge

    began = time.perf_counter()
    bridge.plan(src, dst, **options).run()
    return time.perf_counter() - began


def verify(src: str, dst: str) -> float:
    from bridge.proof.verify import verify

    began = time.perf_counter()
    verdict = verify(src, dst)
    if not verdict.holds:
        raise SystemExit("\n".join(problem.cause for problem in verdict.problems))
    return time.perf_counter() - began


def diff(src: str, dst: str) -> float:
    from bridge.compare.diff import diff

    began = time.perf_counter()
    diff(src, dst)
    return time.perf_counter() - began


def naive(src: str, dst: str) -> float:
    from tests.benchmarks.naive import convert

    began = time.perf_counter()
    convert(Path(src), Path(dst))
    return time.perf_counter() - began


def make(directory: str, layers: int) -> float:
    from tests.benchmarks.full_size import make

    began = time.perf_counter()
    make(Path(directory), layers)
    return time.perf_counter() - began


if __name__ == "__main__":
    verb = {"convert": convert, "verify": verify, "diff": diff, "naive": naive, "make": make}[sys.argv[1]]
    seconds = verb(**json.loads(sys.argv[2]))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "resident": resident}))
