"""Axis equations: what they refuse, and that they move numbers exactly as written."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.rules.equation import UNIT, Equation
from tests.kit.algebra import restore

PRIMES = (2, 3, 5, 7)


@dataclass(frozen=True)
class Case:
    """A random equation and a size for each of its axes, no two alike."""

    text: str
    sizes: dict[str, int]

    @property
    def equation(self) -> Equation:
        return Equation.parse(self.text)

    @property
    def leaf(self) -> np.ndarray:
        """Every element is another number, so that none can stand in for another."""
        shape = self.equation.leaf_shape(self.sizes)
        return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    axes = [f"a{number}" for number in range(draw(st.integers(1, 4)))]
    right = draw(st.permutations(axes))
    # at least one axis stays, the others may be placeholders
    right = right[: draw(st.integers(1, len(right)))]
    cuts = sorted(draw(st.sets(st.integers(1, len(right) - 1)))) if len(right) > 1 else []
    groups = [right[i:j] for i, j in itertools.pairwise([0, *cuts, len(right)])]
    left = list(axes)
    for _ in range(draw(st.integers(0, 2))):
        left.insert(draw(st.integers(0, len(left))), UNIT)
    shown = " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)
    sizes = dict(zip(axes, draw(st.permutations(PRIMES)), strict=False))
    return Case(f"{' '.join(left)} -> {shown}", sizes)


def expected_element(case: Case, at: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the element of a leaf at ``at`` must be: (which weight, where in it). By arithmetic alone."""
    equation = case.equation
    place = []
    for group in equation.right:
        position = 0
        for axis in group:  # the last axis of a group runs fastest
            position = position * case.sizes[axis] + at[axis]
        place.append(position)
    kept = {axis for group in equation.right for axis in group}
    return tuple(at[axis] for axis in equation.left if axis != UNIT and axis not in kept), tuple(place)


@given(cases())
def test_every_element_goes_where_the_equation_says(case: Case) -> None:
    equation, leaf = case.equation, case.leaf
    weights = {index: equation.arrange(part) for index, part in equation.slices(leaf)}
    axes = [axis for axis in equation.left if axis != UNIT]
    for position in itertools.product(*(range(case.sizes[axis]) for axis in axes)):
        at = dict(zip(axes, position, strict=True))
        index, place = expected_element(case, at)
        stored = tuple(0 if axis == UNIT else at[axis] for axis in equation.left)
        assert weights[index][place] == leaf[stored]


@given(cases())
def test_agrees_with_einsum(case: Case) -> None:
    equation, leaf = case.equation, case.leaf
    letters = {axis: chr(ord("a") + number) for number, axis in enumerate(case.sizes)}
    named = "".join(letters[axis] for axis in equation.left if axis != UNIT)
    moved = "".join(letters[axis] for axis in equation.placeholders)
    moved += "".join(letters[axis] for group in equation.right for axis in group)
    flat = np.einsum(f"{named}->{moved}", leaf.reshape([n for n in leaf.shape if n != 1]))
    shape = [case.sizes[axis] for axis in equation.placeholders] + list(equation.weight_shape(case.sizes))
    expected = flat.reshape(shape)
    for index, part in equation.slices(leaf):
        np.testing.assert_array_equal(equation.arrange(part), expected[index])


@given(cases())
def test_arrange_loses_nothing(case: Case) -> None:
    equation, leaf = case.equation, case.leaf
    again = np.full_like(leaf, -1)
    views = dict(equation.slices(again))
    assert len(views) == math.prod(case.sizes[axis] for axis in equation.placeholders)
    for index, part in equation.slices(leaf):
        weight = equation.arrange(part)
        assert weight.shape == equation.weight_shape(case.sizes)
        back = restore(equation, weight, case.sizes)
        np.testing.assert_array_equal(back, part)
        views[index][...] = back  # slices are views: writing them fills the leaf
    np.testing.assert_array_equal(again, leaf)


@given(cases())
def test_text_reads_back(case: Case) -> None:
    assert Equation.parse(str(case.equation)) == case.equation


@given(cases())
def test_of_weight_is_the_equation_of_a_slice(case: Case) -> None:
    of_weight = case.equation.of_weight
    assert of_weight.placeholders == () and UNIT not in of_weight.left
    assert of_weight.right == case.equation.right
    for _, view in case.equation.slices(case.leaf):
        assert view.shape == of_weight.leaf_shape(case.sizes)


@given(cases(), st.integers(1, 3))
def test_blocks_of_a_streaming_equation_are_whole_parts_of_weights(case: Case, step: int) -> None:
    equation, leaf = case.equation, case.leaf
    if not equation.streams:
        return
    whole = {index: equation.arrange(part) for index, part in equation.slices(leaf)}
    for first in range(0, len(leaf), step):
        for index, block in equation.slices(leaf[first : first + step]):
            part = equation.arrange(block)
            if equation.placeholders:
                np.testing.assert_array_equal(part, whole[(index[0] + first, *index[1:])])
            else:
                np.testing.assert_array_equal(part, whole[()][first : first + len(part)])


def test_a_query_projection_by_hand() -> None:
    equation = Equation.parse("layer head width dim -> (head dim) width")
    leaf = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    slices = dict(equation.slices(leaf))
    assert list(slices) == [(0,), (1,)]
    weight = equation.arrange(slices[1,])
    assert weight.shape == (21, 5)
    assert weight[2 * 7 + 4, 3] == leaf[1, 2, 3, 4]


def test_slices_are_in_the_order_of_the_leaf_and_copy_nothing() -> None:
    leaf = np.zeros((2, 3, 5))
    slices = list(Equation.parse("layer out kv -> out").slices(leaf))
    assert [index for index, _ in slices] == list(np.ndindex(2, 5))
    assert all(np.shares_memory(part, leaf) for _, part in slices)


@pytest.mark.parametrize(
    ("text", "streams"),
    [
        ("layer in out -> out in", True),
        ("vocab width -> vocab width", True),
        ("in out -> out in", False),
        ("1 token dim -> token dim", False),
        ("head in dim -> (head dim) in", False),
    ],
)
def test_streams(text: str, streams: bool) -> None:
    assert Equation.parse(text).streams is streams


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a b", "expected one '->'"),
        ("a -> b -> c", "expected one '->'"),
        ("", "expected one '->'"),
        ("a a -> a", "twice on one side"),
        ("a b -> a (b a)", "twice on one side"),
        ("a -> a b", "'b' stands on the right alone"),
        ("a b -> a ()", "an empty group"),
        ("a ->", "an empty group"),
        ("a b-c -> a", "is not a name"),
        ("a 2 -> a", "is not a name"),
        ("a -> a 1", "is not a name"),
        ("a b -> ((a b))", "group"),
        ("a b -> (a b", "group"),
        ("a b -> a) b", "group"),
        ("(a b) -> a b", "is not a name"),
    ],
)
def test_parse_refuses(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=r"axis equation") as refused:
        Equation.parse(text)
    assert cause in str(refused.value)
