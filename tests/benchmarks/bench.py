"""bridge against what no converter can be faster than, and against the way that needs no tool.

    make bench                                     full size: 37 GB of disk, half an hour
    make bench BENCH_ARGS="--layers 6 --rounds 1"  a look, in minutes

Every round measures every route, each beside its own floor, so that a disk or machine that slows
down slows both. A route's floor is the larger of two: reading the bytes it needs and writing the
bytes it makes, plainly; and decoding (to Orbax: encoding) them, spread over all cores. Sources
are dropped from the page cache before each measurement, unless ``--warm``; what is written is
synced, then removed, before the next begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks import floor, looking, ranges, tables, watched
from tests.benchmarks.full_size import parameters
from tests.benchmarks.routes import MADE, ROUTES, Route

DISK = 11
"""Bytes a parameter: the checkpoint, one float32 output of it, and another being written."""


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with _folder(arguments.dir, arguments.keep) as folder:
            _check_space(folder, arguments.layers)
            found = Bench(folder, warm=arguments.warm, rounds=arguments.rounds).run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif arguments.markdown:
        print(tables.markdown(found))
    else:
        tables.show(found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [route.name for route in ROUTES]
    parser.add_argument("--routes", type=lambda text: text.split(","), default=names, metavar="NAME,…",
                        help=f"of {', '.join(names)}; 'none' for none")  # fmt: skip
    parser.add_argument("--layers", type=int, default=18, help="depth of the checkpoint (18 is full size)")
    parser.add_argument("--naive-layers", type=int, metavar="N",
                        help="depth for the naive way, a third by default; 0 leaves it out")  # fmt: skip
    parser.add_argument("--naive-full", type=float, metavar="GB",
                        help="also try the naive way at full depth, and stop it at this much memory")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken")
    parser.add_argument("--warm", action="store_true", help="leave the sources in the page cache")
    parser.add_argument("--dir", type=Path, help="where to work; else below TMPDIR")
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoints made in --dir, and use them again"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print a table for a README")
    arguments = parser.parse_args()
    if arguments.routes == ["none"]:
        arguments.routes = []
    if unknown := set(arguments.routes) - set(names):
        parser.error(f"unknown routes: {', '.join(sorted(unknown))}")
    if arguments.keep and arguments.dir is None:
        parser.error("--keep needs --dir")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.naive_layers is None:
        arguments.naive_layers = max(arguments.layers // 3, 1)
    return arguments


@contextlib.contextmanager
def _folder(chosen: Path | None, keep: bool) -> Iterator[Path]:
    """The folder that everything is made in, gone at the end whatever happens."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
    if keep:
        assert chosen is not None
        yield chosen.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="bridge-bench-", dir=chosen) as made:
        yield Path(made)


def _check_space(folder: Path, layers: int) -> None:
    needed, free = parameters(layers) * DISK, shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(
            f"{folder} has {free / 1e9:.0f} GB free, and {needed / 1e9:.0f} are needed: name another with --dir"
        )


class Bench:
    """The measurements, in one folder."""

    def __init__(self, folder: Path, *, warm: bool, rounds: int) -> None:
        self._folder, self._warm, self._rounds = folder, warm, rounds
        self._most_cached = 0.0

    def run(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Measure, and give everything measured as JSON has it."""
        chosen = [route for route in ROUTES if route.name in arguments.routes]
        naive_layers = arguments.naive_layers
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        full = self._made(arguments.layers)
        stopped = None
        try:
            looks = looking.look(full / MADE, self._rounds, self._forget)
            for number in range(self._rounds):
                for position, route in enumerate(chosen):
                    _say(f"round {number + 1} of {self._rounds}: {route.title}")
                    found[route.name].append(self._measure(route, full))
                    _remove(full, keep={MADE, *_still_needed(chosen[position + 1 :])})
                _remove(full, keep={MADE})
            if arguments.naive_full:
                _say(f"the naive way at {arguments.layers} layers, stopped at {arguments.naive_full:g} GB")
                stopped = self._naive(full, int(arguments.naive_full * 1e9))
            if naive_layers:
                part = self._made(naive_layers)
                for number in range(self._rounds):
                    _say(f"round {number + 1} of {self._rounds}: the naive way at {naive_layers} layers")
                    found["naive"].append(self._naive(part))
                    found["naive-bridge"].append(self._bridge_beside_naive(part))
                    _remove(part, keep={MADE})
        finally:
            for folder in self._folder.glob("layers-*"):
                _remove(folder, keep={MADE})
        return {
            "machine": tables.machine(self._folder),
            "layers": arguments.layers,
            "parameters": parameters(arguments.layers),
            "rounds": self._rounds,
            "sources": "warm" if self._warm else "cold",
            "most_cached": self._most_cached,
            "looks": looks,
            "routes": {route.name: {"title": route.title, "rounds": found[route.name]} for route in chosen},
            "naive": {
                "layers": naive_layers,
                "rounds": found["naive"],
                "bridge": found["naive-bridge"],
                "full": stopped,
            },
        }

    def _made(self, layers: int) -> Path:
        """A folder with the checkpoint of this depth, made if it is not there."""
        folder = self._folder / f"layers-{layers}"
        # Orbax's own mark of a finished step, which is written last
        if not (folder / MADE / "_CHECKPOINT_METADATA").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _say(f"making a checkpoint of {layers} layers, {parameters(layers) / 1e9:.2f} billion parameters")
            watched.watch(watched.driven("make", directory=str(folder / MADE), layers=layers))
        return folder

    def _measure(self, route: Route, folder: Path) -> dict[str, float]:
        self._provide(route.needs, folder)
        reads = route.reads(folder)
        sources = [
            path for name in route.needs for path in sorted((folder / name).rglob("*")) if path.is_file()
        ]
        self._forget(sources)
        ran = watched.watch(route.command(folder))
        took = {
            "process": ran.seconds,
            "bridge": float(ran.said["seconds"]),
            "private": ran.private,
            "resident": ran.resident,
            "others": ran.others,
            "bytes_read": ranges.size(reads),
            "bytes_written": 0,
        }
        self._forget(sources)
        took["read"] = floor.read(reads)
        took["decode"] = floor.decode(reads)
        took["write"] = took["encode"] = 0.0
        made = folder / route.name
        if made.is_dir():
            written = [path for path in made.rglob("*") if path.is_file()]
            took["bytes_written"] = sum(_on_disk(path) for path in written)
            took["write"] = floor.write(folder / "plain", took["bytes_written"])
            if route.encodes:
                took["encode"] = floor.encode(one for lies in ranges.tensors(made).values() for one in lies)
        took["floor"] = floor_of(took, os.cpu_count() or 1)
        _say("    " + ", ".join(f"{name} {value:.6g}" for name, value in took.items()))
        return took

    def _provide(self, names: Iterable[str], folder: Path) -> None:
        """Make the checkpoints that a route needs and no route of this round has left."""
        for name in names:
            if not (folder / name).is_dir():
                route = next(route for route in ROUTES if route.name == name)
                self._provide(route.needs, folder)
                _say(f"making {name}, not measured")
                watched.watch(route.command(folder))

    def _forget(self, paths: Iterable[Path]) -> None:
        paths = list(paths)
        if self._warm:
            for path in paths:
                floor.read([ranges.Range(path, 0, path.stat().st_size, False)])
            return
        floor.forget(paths)
        self._most_cached = max(self._most_cached, floor.cached(paths))

    def _naive(self, folder: Path, most: int | None = None) -> dict[str, Any]:
        self._forget(path for path in (folder / MADE).rglob("*") if path.is_file())
        command = watched.driven("naive", src=str(folder / MADE), dst=str(folder / "naive"))
        ran = watched.watch(command, most)
        return _taken(ran)

    def _bridge_beside_naive(self, folder: Path) -> dict[str, Any]:
        """The same conversion by bridge, and a check that both have made the same."""
        self._forget(path for path in (folder / MADE).rglob("*") if path.is_file())
        route = next(route for route in ROUTES if route.name == "float32")
        ran = watched.watch(route.command(folder))
        looking.same(folder / "naive", folder / route.name)
        return _taken(ran)


def floor_of(took: dict[str, float], cores: int) -> float:
    """Seconds that no converter can be faster than on this machine."""
    coding = took["encode"] or took["decode"]
    return max(took["read"] + took["write"], coding / cores)


def _taken(ran: watched.Watched) -> dict[str, Any]:
    return {
        "process": ran.seconds,
        "bridge": ran.said.get("seconds"),
        "private": ran.private,
        "resident": ran.resident,
        "others": ran.others,
        "stopped": ran.stopped,
    }


def _on_disk(path: Path) -> int:
    """Bytes of a file that were written: holes are not."""
    status = path.stat()
    return min(status.st_size, status.st_blocks * 512)


def _still_needed(routes: Iterable[Route]) -> set[str]:
    found: set[str] = set()
    for route in routes:
        found |= set(route.needs)
    return found


def _remove(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # what the disk still has to do must not be charged to the next
    os.sync()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
