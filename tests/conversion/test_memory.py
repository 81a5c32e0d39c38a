"""`plan.memory`, which people size a machine by, against what a conversion takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import bridge
from bridge.conversion.job import MEMORY, RESIDENT
from tests.kit import checkpoints

MB = 1 << 20

RUN = """
import re, sys, bridge
# not of getrusage, in which a child begins with its parent's
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10
plan = bridge.plan(sys.argv[1], sys.argv[2], to="torch-merged", dtype="float32", workers=1)
before = peak()
plan.run()
print(plan.memory, before, peak())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one large leaf that is transposed on its way, and of little else."""
    tree = checkpoints.pi0_tree(lora={}, layers=1, width=64, mlp=1 << 17, vocab=31)
    return checkpoints.save(tree, tmp_path_factory.mktemp("memory") / "1", quick=True, compress=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_what_a_plan_says_is_what_a_conversion_takes(large: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUN, large, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    said, before, used = map(int, run.stdout.split())
    assert used - before > 24 * MB, "nothing large was converted"
    assert 0.9 * used < said < 2 * used, (said, before, used)


@pytest.mark.parametrize(
    ("steps", "workers", "together"),
    [
        ((3 * MB, 9 * MB, 5 * MB), 1, 9 * MB),  # the largest alone
        ((3 * MB, 9 * MB, 5 * MB), 2, 14 * MB),
        ((3 * MB, 9 * MB, 5 * MB), 7, 17 * MB),  # never more than there are
        ((MEMORY, MEMORY, 3 * MB), 3, MEMORY),  # as many as fit
        ((MEMORY + 5 * MB, MEMORY), 2, MEMORY + 5 * MB),  # what is larger runs alone
    ],
)
def test_the_largest_steps_that_run_together_count(
    large: Path, steps: tuple[int, ...], workers: int, together: int
) -> None:
    plan = bridge.plan(large, None, to="torch-merged", workers=workers)
    made = tuple(
        dataclasses.replace(step, memory=memory) for step, memory in zip(plan.steps, steps, strict=False)
    )
    output = dataclasses.replace(plan.output, steps=made)
    assert dataclasses.replace(plan, outputs=(output,)).memory == RESIDENT + together
