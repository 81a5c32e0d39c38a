"""Dimensions from shapes: votes, products, and who is named as the odd one out."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoint.sizes import Dimension, solve
from bridge.rules.model import Model, Multiple, Part
from bridge.rules.rule import Rule

MODEL = Model(
    name="toy",
    parts=(Part("p", (Rule("k", "k", "a b -> b a"), Rule("m", "m", "c d -> d c"))),),
    multiples=(Multiple("p.c", 3, "p.b"),),
)
PLAIN = Model(name="plain", parts=(Part("p", (Rule("k", "k", "a b -> b a"),)),))


def test_agreement() -> None:
    sizes, problems = solve(
        [Dimension(("p.a",), 5, "x"), Dimension(("p.a",), 5, "y"), Dimension(("p.b",), 7, "x")], PLAIN
    )
    assert sizes == {"p.a": 5, "p.b": 7} and problems == []


def test_the_majority_names_the_odd_one_out() -> None:
    seen = [Dimension(("p.a",), 4, "odd"), Dimension(("p.a",), 5, "x"), Dimension(("p.a",), 5, "y")]
    sizes, problems = solve(seen, PLAIN)
    assert sizes == {"p.a": 5}
    (problem,) = problems
    assert problem.cause == "odd: p.a is 4, but 5 in x"
    assert problem.fix


def test_a_tie_goes_to_the_first_seen() -> None:
    sizes, problems = solve([Dimension(("p.a",), 4, "x"), Dimension(("p.a",), 5, "y")], PLAIN)
    assert sizes == {"p.a": 4}
    assert [problem.cause for problem in problems] == ["y: p.a is 5, but 4 in x"]


def test_every_dissenter_is_named() -> None:
    seen = [Dimension(("p.a",), n, w) for n, w in ((2, "u"), (5, "v"), (5, "w"), (3, "x"))]
    assert [problem.cause.split(":")[0] for problem in solve(seen, PLAIN)[1]] == ["u", "x"]


def test_known_sizes_outvote_arrays() -> None:
    sizes, problems = solve([Dimension(("p.a",), 5, "x"), Dimension(("p.a",), 5, "y")], PLAIN, {"p.a": 7})
    assert sizes == {"p.a": 7}
    assert [problem.cause for problem in problems] == [
        "x: p.a is 5, but 7 in the config",
        "y: p.a is 5, but 7 in the config",
    ]


def test_products_are_solved_in_any_order() -> None:
    # (a b c) needs c, which (c d) gives once d is known
    seen = [
        Dimension(("p.a", "p.b", "p.c"), 2 * 3 * 5, "one"),
        Dimension(("p.c", "p.d"), 5 * 7, "two"),
        Dimension(("p.d",), 7, "three"),
        Dimension(("p.a",), 2, "four"),
    ]
    sizes, problems = solve(seen, PLAIN)
    assert sizes == {"p.a": 2, "p.b": 3, "p.c": 5, "p.d": 7} and problems == []


def test_a_product_that_disagrees() -> None:
    seen = [Dimension(("p.a",), 2, "x"), Dimension(("p.b",), 3, "y"), Dimension(("p.a", "p.b"), 7, "z")]
    (problem,) = solve(seen, PLAIN)[1]
    assert problem.cause == "z: p.a x p.b is 7, but 6 in the other tensors"


def test_what_nothing_fixes_stays_absent() -> None:
    sizes, problems = solve([Dimension(("p.a", "p.b"), 6, "x")], PLAIN)
    assert sizes == {} and problems == []


def test_a_product_that_does_not_divide_is_not_guessed() -> None:
    sizes, _ = solve([Dimension(("p.a",), 4, "x"), Dimension(("p.a", "p.b"), 6, "y")], PLAIN)
    assert "p.b" not in sizes


def test_a_product_that_does_not_divide_is_a_problem() -> None:
    """a is 4 and a x b is 6: no size of b makes that true."""
    problems = solve([Dimension(("p.a",), 4, "x"), Dimension(("p.a", "p.b"), 6, "y")], PLAIN)[1]
    assert [problem.cause.split(":")[0] for problem in problems] == ["y"]


@pytest.mark.parametrize(("length", "faulty"), [(21, False), (20, True)])
def test_multiples(length: int, faulty: bool) -> None:
    problems = solve([Dimension(("p.b",), 7, "x"), Dimension(("p.c",), length, "y")], MODEL)[1]
    assert [problem.cause for problem in problems] == (
        ["p.c is 20; expected 3 x p.b, which is 7"] if faulty else []
    )


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_products_that_determine_all_sizes_do(numbers: list[int], random: object) -> None:
    axes = [f"p.{number}" for number in range(len(numbers))]
    truth = dict(zip(axes, numbers, strict=True))
    # a chain: the first alone, each with its neighbour
    seen = [Dimension((axes[0],), numbers[0], "first")]
    seen += [
        Dimension((one, two), math.prod((truth[one], truth[two])), one)
        for one, two in itertools.pairwise(axes)
    ]
    random.shuffle(seen)  # type: ignore[attr-defined]
    assert solve(seen, PLAIN) == (truth, [])
