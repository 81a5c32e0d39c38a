"""What was measured, for people."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]

ROUTE_COLUMNS = (
    "route", "read", "written", "floor", "of which", "plan + run", "process", "over floor", "RssAnon", "RSS"
)  # fmt: skip
NAIVE_COLUMNS = ("way", "seconds", "times", "RssAnon", "times")
LOOK_COLUMNS = ("command", "seconds", "bytes of tensors read")


def machine(folder: Path) -> str:
    """What it ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GB; Python {platform.python_version()}"


def median(rounds: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def headline(found: Found) -> str:
    sources = found["sources"]
    if sources == "cold":
        sources += f" (at most {found['most_cached']:.1%} of them in the page cache)"
    others = [one["others"] for route in found["routes"].values() for one in route["rounds"]]
    if others:
        sources += (
            f"; other processes took {statistics.median(others):.0%} of the CPU, {max(others):.0%} at most"
        )
    return (
        f"{found['layers']} layers, {found['parameters'] / 1e9:.2f} billion parameters; medians of "
        f"{found['rounds']}; sources {sources}; {found['machine']}"
    )


def route_rows(found: Found) -> list[tuple[str, ...]]:
    return [
        _route_row(route["title"], route["rounds"]) for route in found["routes"].values() if route["rounds"]
    ]


def _route_row(title: str, rounds: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    parts = [f"{name} {median(rounds, name):.2f}" for name in ("read", "write", "decode", "encode")
             if median(rounds, name)]  # fmt: skip
    floor, bridge, process = (median(rounds, name) for name in ("floor", "bridge", "process"))
    return (
        title,
        _bytes(median(rounds, "bytes_read")),
        _bytes(median(rounds, "bytes_written")),
        f"{floor:.2f} s",
        ", ".join(parts),
        f"{bridge:.2f} s",
        f"{process:.2f} s",
        f"{bridge / floor:.2f} ({process / floor:.2f})",
        _bytes(median(rounds, "private")),
        _bytes(median(rounds, "resident")),
    )


def naive_rows(found: Found) -> list[tuple[str, ...]]:
    naive = found["naive"]
    rows: list[tuple[str, ...]] = []
    if naive["rounds"]:
        time, memory = (
            [median(naive[way], key) for way in ("rounds", "bridge")] for key in ("process", "private")
        )
        depth = f"{naive['layers']} layers"
        rows = [
            (f"naive, {depth}", f"{time[0]:.2f}", f"{time[0] / time[1]:.1f}", _bytes(memory[0]),
             f"{memory[0] / memory[1]:.1f}"),
            (f"bridge, {depth}", f"{time[1]:.2f}", "1", _bytes(memory[1]), "1"),
        ]  # fmt: skip
    if full := naive["full"]:
        ended = "stopped there" if full["stopped"] else "finished"
        rows.append((f"naive, {found['layers']} layers: {ended}", f"{full['process']:.2f}", "",
                     _bytes(full["private"]), ""))  # fmt: skip
    return rows


def look_rows(found: Found) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{statistics.median(look['seconds']):.2f}",
            "not counted: no strace" if look["tensor_bytes"] is None else str(look["tensor_bytes"]),
        )
        for name, look in found["looks"].items()
    ]


def show(found: Found) -> None:
    """Print tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    # a pipe has no width to keep to
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(headline(found))
    for columns, rows in _tables(found):
        table = Table(*columns[:1], box=None, pad_edge=False)
        for column in columns[1:]:
            table.add_column(column, justify="left" if column == "of which" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def markdown(found: Found) -> str:
    """The same for a README."""
    lines = [headline(found)]
    for columns, rows in _tables(found):
        lines += ["", _line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
    return "\n".join(lines)


def _tables(found: Found) -> list[tuple[Sequence[str], list[tuple[str, ...]]]]:
    every = (
        (ROUTE_COLUMNS, route_rows(found)),
        (NAIVE_COLUMNS, naive_rows(found)),
        (LOOK_COLUMNS, look_rows(found)),
    )
    return [(columns, rows) for columns, rows in every if rows]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
