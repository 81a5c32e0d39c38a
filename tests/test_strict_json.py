"""JSON from foreign hands: what is taken, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import MAX_LINE, MAX_PROBLEMS, Problem, Refusal
from bridge.strict_json import MAX_DEPTH, parse, parse_object, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(VALUES)
def test_what_json_writes_is_read(value: object) -> None:
    assert parse(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deeply"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "duplicate key c"),
        (b'{"a\\n": 1, "a\\u000a": 2}', r"duplicate key a\\n"),
        (b"[" + b"9" * 5000 + b"]", "not JSON"),
        (b"[" + b"," * 5_000_000, "5000001 values, more than the limit of 4000000"),
    ],
)
def test_what_is_not_modest_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_an_object_is_asked_for() -> None:
    assert parse_object(b'{"a": []}') == {"a": []}
    with pytest.raises(ValueError, match="not a JSON object"):
        parse_object(b"[]")
    with pytest.raises(ValueError, match="more than the limit of 3"):
        parse_object(b'{"a": [1, 2, 3]}', 3)


def test_values_are_shown_in_little_room() -> None:
    assert shown(["x"]) == "['x']" and len(shown("x" * 10**6)) < 300


def test_problems_are_one_printable_line() -> None:
    problem = Problem("a\nb\x1b[2J\ud800" + "x" * 10_000, "y\u202e")
    assert problem.cause.startswith("a\\nb\\x1b[2J\\ud800xxx") and len(problem.cause) <= MAX_LINE + 1
    assert problem.fix == "y\\u202e"
    refusal = Refusal(*(Problem(str(n), "mend it") for n in range(1000)))
    assert len(refusal.problems) == MAX_PROBLEMS + 1
    assert refusal.problems[-1].cause == f"and {1000 - MAX_PROBLEMS} more problems"
