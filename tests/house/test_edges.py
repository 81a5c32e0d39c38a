"""A converter more is two edits: a row of the table, and the builder it names.

The table is added to here as such an edit would; nothing else is touched, and the edge is routed, planned and run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bridge
from bridge import Refusal
from bridge.conversion import converters as table
from bridge.conversion.request import Built, Request
from bridge.conversion.to_state_dict import build_state_dict
from bridge.errors import Problem
from bridge.graph import Form, Loss, State, mermaid
from tests.kit.digest import digest
from tests.kit.families import SCALED, Array, Leaves, save, state_of
from tests.kit.plugins import registered

PYTREE = State(name="", contents="base", format="", form=Form.PYTREE)
WEIGHTS = State(name="", contents="base", format="", form=Form.STATE_DICT)
STRIPPED = replace(WEIGHTS, stripped=True)
ADAPTER = State(name="", contents="lora", format="", form=Form.ADAPTER)

Add = Callable[[table.Edge], None]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Put a row into the table, as long as a test lasts."""

    def add(row: table.Edge) -> None:
        monkeypatch.setattr(table, "ROWS", (*table.ROWS, row))
        table.converters.cache_clear()

    with registered([SCALED.family], alone=True):
        yield add
    table.converters.cache_clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(SCALED.leaves(lora=False), tmp_path_factory.mktemp("edges") / "src", SCALED.family.tree)


def release(request: Request) -> Built:
    """The weights as a base for adapters, and a note."""
    built = build_state_dict(request)
    return replace(built, notes=(*built.notes, f"{len(built.outputs[0].steps)} leaves are released"))


ROW = table.Edge(
    name="release", source=PYTREE, target=STRIPPED, loss=Loss.EXACT, summary="a base", build=release
)


def equal(found: Leaves, expected: Leaves) -> bool:
    def same(a: Array, b: Array) -> bool:
        return a.dtype == b.dtype and np.array_equal(a, b)

    return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)


def test_without_the_row_there_is_no_route(add: Add, source: Path) -> None:
    with pytest.raises(Refusal, match=r"no route from orbax\[base\] to torch-base"):
        bridge.plan(source, None, to="torch-base")


def test_it_is_routed_planned_and_run(add: Add, source: Path, tmp_path: Path) -> None:
    add(ROW)
    plan = bridge.plan(source, tmp_path / "out", to="torch-base")
    assert [edge.name for edge in plan.route] == ["release"]
    text = str(plan)
    assert "route        orbax[base] -> release -> torch-base[base]" in text
    assert "loss         exact: every value is kept bit for bit" in text
    assert f"note         {len(SCALED.leaves(lora=False))} leaves are released" in text
    plan.run()
    bridge.convert(source, tmp_path / "torch", to="torch-merged", dtype="keep")
    assert equal(state_of(tmp_path / "out"), state_of(tmp_path / "torch"))
    record = json.loads((tmp_path / "out" / "bridge.json").read_text())
    assert record["route"] == ["release"] and record["loss"] == "exact"
    assert bridge.verify(source, tmp_path / "out").holds
    plan = bridge.plan(source, tmp_path / "again", to="torch-base", workers=1)
    plan.run()
    assert digest(tmp_path / "again") == digest(tmp_path / "out")


def test_it_is_in_the_graph_and_changes_no_other_route(add: Add, source: Path) -> None:
    before = {(edge.name, str(edge.source), str(edge.target)) for edge in table.converters()}
    targets = table.targets()
    add(ROW)
    after = {(edge.name, str(edge.source), str(edge.target)) for edge in table.converters()}
    assert after - before == {("release", "orbax[base]", "torch-base[base]")} and before < after
    assert table.targets() == targets
    assert 'orbax_base -- "release: exact" --> torch_base_base' in mermaid(table.converters())
    assert [edge.name for edge in bridge.plan(source, None, to="torch-merged").route] == ["export"]


def test_options_find_the_new_edge(add: Add, source: Path, tmp_path: Path) -> None:
    """They declare what they fit by states, and ask no edge."""
    add(ROW)
    bridge.convert(source, tmp_path / "narrow", to="torch-base", dtype="bfloat16", layout="inner")
    found = state_of(tmp_path / "narrow")
    assert {array.dtype.name for array in found.values()} == {"bfloat16", "float32"}
    with pytest.raises(Refusal, match="--value-suffix has no effect"):
        bridge.plan(source, None, to="torch-base", value_suffix=True)


def test_an_edge_that_needs_a_base(add: Add, source: Path, tmp_path: Path) -> None:
    """Without one the refusal says what to add; with one its builder has it."""
    seen: list[Request] = []

    def extract(request: Request) -> Built:
        seen.append(request)
        raise Refusal(Problem("nothing to extract", "give another base"))

    add(
        table.Edge(
            name="extract",
            source=WEIGHTS,
            target=ADAPTER,
            loss=Loss.ROUNDED,
            summary="a difference, by SVD",
            build=extract,
            needs=frozenset({"base"}),
        )
    )
    bridge.convert(source, tmp_path / "torch", to="torch-merged")
    with pytest.raises(Refusal) as caught:
        bridge.plan(tmp_path / "torch", None, to="peft-adapter")
    (problem,) = caught.value.problems
    assert problem.cause == "no route from torch-merged[base] to peft-adapter without a base"
    assert problem.fix == "add --base PATH"
    with pytest.raises(Refusal, match="nothing to extract"):
        bridge.plan(tmp_path / "torch", None, to="peft-adapter", base=source)
    (request,) = seen
    assert request.reference is not None and str(request.reference.source.location) == str(source)
    assert request.target.form is Form.ADAPTER
