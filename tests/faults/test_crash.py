"""A conversion that dies, or whose disk fails, at any system call that writes.

The destination is the old output whole, or the new one whole, every time; the source is
untouched; and the next run succeeds and leaves nothing of the one before. By default a sample of
the calls is taken; BRIDGE_EXHAUSTIVE=1 takes them all (half an hour).
"""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from bridge.formats.disk.location import Location
from bridge.publish.record import check_record, check_whole
from tests.faults.crash import (
    BROKEN,
    BROKEN_FOR_GOOD,
    CALLS,
    DONE,
    KILL,
    KILLED,
    NO_SPACE,
    REFUSED,
    Server,
    targets,
)
from tests.kit import checkpoints
from tests.kit.digest import snapshot

pytestmark = pytest.mark.slow

EXHAUSTIVE = bool(os.environ.get("BRIDGE_EXHAUSTIVE"))
OUTPUTS: dict[str, dict[str, Any]] = {
    "safetensors": {"src": "base", "to": "torch-merged"},
    "adapter": {"src": "lora", "to": "peft-adapter", "lora_alpha": 4.0},
    "orbax": {"src": "base", "to": "orbax"},
}
#: what can run out of space
SPENDS = {"openat", "write", "writev", "pwrite64", "fallocate", "ftruncate", "fsync", "fdatasync",
          "mkdir", "rename", "renameat2", "link"}  # fmt: skip
#: what only tidies up: the output is in its place by then, or is not to be
TIDIES = {"unlink", "unlinkat", "rmdir"}
#: what may fail without harm: the line that says who holds the lock, making what is there already
FORGIVEN = re.compile(r"flock|mkdir|pwrite64\(\d+, \"\d+ ")


@dataclass(frozen=True)
class Place:
    """Sources, an older output of each kind, and what a conversion gives."""

    root: Path
    server: Server

    def request(self, output: str, dst: Path, *, overwrite: bool, old: bool = False) -> dict[str, Any]:
        options = OUTPUTS[output]
        dtype = "bfloat16" if old else "keep"
        return {**options, "src": str(self.root / options["src"]), "dst": str(dst), "dtype": dtype,
                "overwrite": overwrite}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: apt-get install strace")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    # in memory, where syncing costs nothing: what counts are the calls
    shared = Path("/dev/shm")
    root = Path(mkdtemp(dir=shared)) if os.access(shared, os.W_OK) else tmp_path_factory.mktemp("crash")
    small = {"layers": 2, "image_layers": 1}
    checkpoints.save(checkpoints.pi0_tree(lora={}, **small), root / "base", quick=True)
    checkpoints.save(checkpoints.pi0_tree(**small), root / "lora", quick=True)
    server = Server(root)
    place = Place(root, server)
    for output in OUTPUTS:
        for name, old in (("old", True), ("new", False)):
            request = place.request(output, root / output / name, overwrite=False, old=old)
            assert server.convert(request) == DONE
    yield place
    server.close()
    shutil.rmtree(root)


def chosen(found: list[tuple[str, int]], fault: str, *, few: bool) -> list[tuple[str, int]]:
    """The calls to fail: all of them, or of each kind a few spread over the run, first and last among them."""
    able = [(call, number) for call, number in found if fault != NO_SPACE or call in SPENDS]
    if EXHAUSTIVE:
        return able if fault != BROKEN_FOR_GOOD else able[::8]
    picked = []
    for call in {call: None for call, _ in able}:
        numbers = [number for of, number in able if of == call]
        first, middle, last = numbers[0], numbers[len(numbers) // 2], numbers[-1]
        some = {KILL: (first, middle, last), BROKEN: (first, last), BROKEN_FOR_GOOD: (first,)}.get(
            fault, (last,)
        )
        if few:
            some = {KILL: (first, last), BROKEN: (middle,)}.get(fault, ())
        picked += [(call, each) for each in some]
    return list(dict.fromkeys(picked))


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_old_whole_or_new_whole(place: Place, output: str, overwrite: bool, record_property: Any) -> None:
    if EXHAUSTIVE:
        faulthandler.cancel_dump_traceback_later()  # it is slow, and does not hang
    dst = place.root / "made" / "out"
    request = place.request(output, dst, overwrite=overwrite)
    old = snapshot(place.root / output / "old") if overwrite else None
    new = snapshot(place.root / output / "new")
    sources = {name: snapshot(place.root / name) for name in ("base", "lora")}

    def begin() -> None:
        shutil.rmtree(dst.parent, ignore_errors=True)
        if overwrite:
            shutil.copytree(place.root / output / "old", dst)

    def is_begun() -> bool:
        """Whether all is as it was before the first conversion."""
        return leftovers(dst) == [] and (snapshot(dst) if dst.exists() else None) == old

    begin()
    found = targets(place.server.calls(request))
    assert {"write", "fsync", "mkdir", "renameat2", "openat"} <= {call for call, _ in found}
    outcomes: Counter[str] = Counter()
    for fault in (KILL, NO_SPACE, BROKEN, BROKEN_FOR_GOOD):
        for call, number in chosen(found, fault, few=not overwrite or output == "adapter"):
            if not is_begun():
                begin()
            case = f"{fault} at {call} number {number}"
            status = place.server.inject(request, call, number, fault)
            assert status in ((DONE, KILLED) if fault == KILL else (DONE, REFUSED)), (
                f"{case}: {status}\n{place.server.errors.read_text()}"
            )
            outcome = hold(dst, old, new, status, case)
            assert {name: snapshot(place.root / name) for name in sources} == sources, case
            if status == DONE and fault != KILL and call not in TIDIES:
                lines = place.server.log.read_text().splitlines()
                failed = [line for line in lines if "INJECTED" in line]
                assert all(FORGIVEN.search(line) for line in failed), f"{case}: {failed}"
            if status == REFUSED and fault != BROKEN_FOR_GOOD:
                assert outcome == "old" and leftovers(dst) == [], case
            if not is_begun():  # else the next run is the one that was asked for its calls
                again = {**request, "overwrite": overwrite or dst.exists()}
                assert place.server.convert(again) == DONE, case
                assert snapshot(dst) == new and leftovers(dst) == [], case
            outcomes[f"{fault}: {outcome}"] += 1
    record_property("outcomes", dict(outcomes))
    print(f"{output}, {'overwrite' if overwrite else 'new'}: {dict(outcomes)}")
    assert outcomes[f"{KILL}: old"] and outcomes[f"{KILL}: new"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_all_is_on_disk_before_it_is_relied_on(place: Place, output: str, overwrite: bool) -> None:
    """What a loss of power could lose: every file and directory is synced after its last change and before
    the rename, the directory above after it, and only then is anything of the old output removed."""
    dst = place.root / "made" / "out"
    shutil.rmtree(dst.parent, ignore_errors=True)
    if overwrite:
        shutil.copytree(place.root / output / "old", dst)
    request = place.request(output, dst, overwrite=overwrite)
    calls = ",".join(f"?{call}" for call in CALLS)
    assert place.server.convert(request, "-y", "-e", f"trace={calls}") == DONE
    dirty: set[Path] = set()
    renamed, removed, inside = False, 0, f"{dst.parent}/.out.bridge-"
    for line in place.server.log.read_text().splitlines():
        call, arguments = re.fullmatch(r"\d+ +(?:(\w+)\((.*)|.*)", line).groups()  # type: ignore[union-attr]
        if call is None or "ENOENT" in line or "EEXIST" in line or "EISDIR" in line:
            continue
        opened = re.match(r"\d+<([^>]+)>", arguments)
        names = [Path(name) for name in re.findall(r'"([^"]+)"', arguments)]
        if call in ("fsync", "fdatasync"):
            assert opened and " = 0" in line
            dirty.discard(Path(opened[1]))
        elif (call == "openat" and "O_CREAT" in arguments) or call in ("mkdir", "mkdirat"):
            dirty |= {names[0], names[0].parent}
        elif call in ("write", "pwrite64", "pwritev", "writev", "ftruncate", "fallocate"):
            assert opened
            dirty.add(Path(opened[1]))
        elif call in ("rename", "renameat2") and names[1] == dst:
            assert [path for path in dirty if str(path).startswith(inside) and path.name[-4:] != "lock"] == []
            assert not any(path == dst.parent.parent for path in dirty), "the entry of a new directory"
            dirty.add(dst.parent)
            renamed = True
        elif call in TIDIES and not str(names[-1]).endswith("lock"):
            assert renamed and dst.parent not in dirty, line
            removed += 1
    assert renamed and dst.parent not in dirty
    assert bool(removed) == overwrite


def hold(dst: Path, old: Any, new: Any, status: int, case: str) -> str:
    """Which of the two outputs lies there, whole; fails for anything else."""
    state = snapshot(dst) if dst.exists() else None
    if state == new:
        from bridge.checkpoint.open import open_source

        location = Location.parse(dst)
        assert check_whole(location) == [], case
        files, problems = check_record(open_source(location))
        assert files and not problems, case
        return "new"
    assert state == old, f"{case}: neither old nor new"
    assert status != DONE, f"{case}: done, and not written"
    return "old"


def leftovers(dst: Path) -> list[str]:
    """What lies beside the output, and whether its directory was left over."""
    if not dst.exists():
        return [str(dst.parent)] if dst.parent.exists() else []
    return [path.name for path in dst.parent.iterdir() if path != dst]
