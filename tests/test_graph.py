"""Routes: the least loss, then the fewest hops, and answers where there is none."""

import itertools
import re

import pytest

from bridge.conversion.converters import converters, targets
from bridge.errors import RouteRefused
from bridge.formats.contract import states
from bridge.graph import Converter, Form, Loss, State, mermaid, route

CONVERTERS = converters()
ORBAX_BASE, ORBAX_LORA = (
    next(state for state in states() if (state.name, state.contents) == ("orbax", contents))
    for contents in ("base", "base+lora")
)
TORCH_MERGED = next(state for state in states() if state.name == "torch-merged")


def state(name: str, contents: str = "all") -> State:
    return State(name=name, contents=contents, format=name, form=Form.STATE_DICT)


A, B, C, D, E = (state(name) for name in "abcde")


def edge(source: State, target: State, loss: Loss = Loss.EXACT, name: str = "", **more: object) -> Converter:
    return Converter(
        name=name or f"{source.name}{target.name}",
        source=source,
        target=target,
        loss=loss,
        summary="",
        build=lambda request: None,
        **more,  # type: ignore[arg-type]
    )


def names(edges: list[Converter], source: State, target: str, given: tuple[str, ...] = ()) -> list[str]:
    return [converter.name for converter in route(edges, source, target, given)]


def test_a_longer_route_that_loses_less_wins() -> None:
    edges = [edge(A, D, Loss.ROUNDED), edge(A, B), edge(B, C, Loss.EQUIVALENT), edge(C, D)]
    assert names(edges, A, "d") == ["ab", "bc", "cd"]


def test_the_worst_edge_counts_and_not_the_sum() -> None:
    edges = [edge(A, D, Loss.ROUNDED), *(edge(*p, Loss.EQUIVALENT) for p in ((A, B), (B, C), (C, D)))]
    assert names(edges, A, "d") == ["ab", "bc", "cd"]


def test_fewest_hops_among_equal_losses() -> None:
    edges = [edge(A, B), edge(B, D, Loss.LOSSY), edge(A, D, Loss.LOSSY)]
    assert names(edges, A, "d") == ["ad"]


def test_ties_go_to_the_first_declared() -> None:
    edges = [edge(A, B, name="one"), edge(A, B, name="two")]
    assert names(edges, A, "b") == ["one"] and names(edges[::-1], A, "b") == ["two"]


def test_a_cycle_ends() -> None:
    edges = [edge(A, B), edge(B, A), edge(B, C)]
    assert names(edges, A, "c") == ["ab", "bc"]
    assert names(edges, A, "a") == ["ab", "ba"]  # asked for by name, it is a conversion


def test_states_of_one_name_are_different_nodes() -> None:
    base, lora = state("orbax", "base"), state("orbax", "base+lora")
    edges = [edge(base, B), edge(lora, C)]
    assert names(edges, base, "b") == ["orbaxb"]
    with pytest.raises(RouteRefused, match=re.escape("no route from orbax[base+lora] to b")):
        route(edges, lora, "b")


def test_what_is_needed_is_the_answer() -> None:
    peft = state("peft-adapter", "lora")
    edges = [edge(peft, TORCH_MERGED, Loss.LOSSY, "merge", needs=frozenset({"base"}))]
    with pytest.raises(RouteRefused) as refused:
        route(edges, peft, "torch-merged")
    (problem,) = refused.value.problems
    assert problem.cause == "no route from peft-adapter[lora] to torch-merged without a base"
    assert problem.fix == "add --base PATH"
    assert names(edges, peft, "torch-merged", ("base",)) == ["merge"]


def test_a_route_without_the_need_is_taken_when_it_is_not_given() -> None:
    edges = [edge(A, B, needs=frozenset({"base"})), edge(A, C, Loss.LOSSY), edge(C, B)]
    assert names(edges, A, "b") == ["ac", "cb"]
    assert names(edges, A, "b", ("base",)) == ["ab"]


def test_a_last_edge_is_never_interior() -> None:
    edges = [edge(A, B, last=True), edge(B, C)]
    assert names(edges, A, "b") == ["ab"]
    with pytest.raises(RouteRefused) as refused:
        route(edges, A, "c")
    assert refused.value.problems[0].fix == "from a[all] bridge converts to b"


def test_a_last_edge_does_not_hide_another_way_through_its_target() -> None:
    edges = [edge(A, B, last=True), edge(A, C, Loss.LOSSY), edge(C, B), edge(B, D)]
    assert names(edges, A, "d") == ["ac", "cb", "bd"]


def test_an_edge_that_stands_alone_is_no_part_of_a_route() -> None:
    edges = [edge(A, A, alone=True), edge(A, B, alone=True), edge(B, C), edge(C, A)]
    assert names(edges, A, "a") == ["aa"] and names(edges, A, "b") == ["ab"]
    for source, target in ((A, "c"), (C, "b")):
        with pytest.raises(RouteRefused):
            route(edges, source, target)


def test_nothing_leads_out() -> None:
    with pytest.raises(RouteRefused) as refused:
        route([edge(A, B)], B, "a")
    assert refused.value.problems[0].fix == "nothing leads out of it"


def test_a_checkpoint_with_lora_has_no_plain_export() -> None:
    """openpi #958: factors that an export leaves behind unnoticed."""
    out = [converter for converter in CONVERTERS if converter.source == ORBAX_LORA]
    assert out and all(c.loss is not Loss.EXACT for c in out if "lora" not in c.target.contents)
    assert all(c.fold for c in out if c.target == TORCH_MERGED)
    # what leaves factors out is only taken when it is the thing asked for
    assert all(c.fold or c.last or "lora" in c.target.contents for c in out)
    assert [c.name for c in route(CONVERTERS, ORBAX_LORA, "torch-merged")] == ["fold"]
    assert [c.name for c in route(CONVERTERS, ORBAX_BASE, "torch-merged")] == ["export"]


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("source", [ORBAX_BASE, ORBAX_LORA])
def test_every_pair_has_a_route_or_an_answer(source: State, target: str) -> None:
    try:
        way = route(CONVERTERS, source, target)
    except RouteRefused as refused:
        assert all(problem.fix for problem in refused.problems)
    else:
        assert way[0].source == source and way[-1].target.name == target
        assert all(one.target == two.source for one, two in itertools.pairwise(way))


def test_mermaid() -> None:
    text = mermaid(
        [edge(ORBAX_LORA, A, Loss.EQUIVALENT, "join", needs=frozenset({"base"})), edge(A, ORBAX_BASE)]
    )
    assert text.splitlines() == [
        "flowchart LR",
        '    orbax_base_lora["orbax[base+lora]"]',
        '    a_all["a[all]"]',
        '    orbax_base["orbax[base]"]',
        '    orbax_base_lora -- "join + base: equivalent" --> a_all',
        '    a_all -- "aorbax: exact" --> orbax_base',
    ]


def test_mermaid_of_the_real_graph_names_every_state_once() -> None:
    lines = mermaid(CONVERTERS).splitlines()
    ids = [line.split("[")[0].strip() for line in lines if '["' in line]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"\w+", one) for one in ids)
    assert sum("-->" in line for line in lines) == len(CONVERTERS)
