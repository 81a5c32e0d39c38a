"""JSON from foreign hands, and zstd frames: what is taken, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import MAX_LINE, MAX_PROBLEMS, Problem, Refusal
from bridge.formats.orbax import zstd
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
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "c stands in it twice"),
        (b'{"a\\n": 1, "a\\u000a": 2}', r"a\\n stands in it twice"),
        (b"[" + b"9" * 5000 + b"]", "not JSON"),
        (b"[" + b"," * 5_000_000, "longer than any such file: 5000001 values"),
    ],
)
def test_what_is_not_modest_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_an_object_is_asked_for() -> None:
    assert parse_object(b'{"a": []}') == {"a": []}
    with pytest.raises(ValueError, match="not a JSON object"):
        parse_object(b"[]")
    with pytest.raises(ValueError, match="longer"):
        parse_object(b'{"a": [1, 2, 3]}', 3)


def test_values_are_shown_in_little_room() -> None:
    assert shown(["x"]) == "['x']" and len(shown("x" * 10**6)) < 300


def test_problems_are_one_printable_line() -> None:
    problem = Problem("a\nb\x1b[2J\ud800" + "x" * 10_000, "y\u202e")
    assert problem.cause.startswith("a\\nb\\x1b[2J\\ud800xxx") and len(problem.cause) <= MAX_LINE + 1
    assert problem.fix == "y\\u202e"
    refusal = Refusal(*(Problem(str(n), "mend it") for n in range(1000)))
    assert len(refusal.problems) == MAX_PROBLEMS + 1
    assert refusal.problems[-1].cause == f"and {1000 - MAX_PROBLEMS} more faults"


# Frames.


def follow(data: bytes, expected: int, pieces: list[int]) -> None:
    frame = zstd.Frame(expected)
    for size in pieces:
        frame.feed(data[:size])
        data = data[size:]
    frame.feed(data)
    frame.finish()


@settings(deadline=None)
@given(
    st.binary(max_size=600).map(lambda content: content * 300) | st.binary(max_size=3),
    st.sampled_from([-5, 1, 3, 19]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 40), max_size=12),
    st.data(),
)
def test_one_whole_frame_is_followed(
    content: bytes, level: int, checksum: bool, size: bool, pieces: list[int], data: st.DataObject
) -> None:
    """In any pieces; cut anywhere, or with anything behind it, it is not one."""
    import zstandard

    made = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size)
    frame = made.compress(content)
    follow(frame, len(content), pieces)
    with pytest.raises(ValueError, match="ends before its zstd frame does"):
        follow(frame[: data.draw(st.integers(0, len(frame) - 1))], len(content), pieces)
    with pytest.raises(ValueError, match="holds more bytes than its zstd frame"):
        follow(frame + b"\0", len(content), pieces)
    with pytest.raises(ValueError, match="holds more bytes than its zstd frame"):
        follow(frame + frame, len(content), pieces)
    if size and content:
        with pytest.raises(ValueError, match=r"ends 7 bytes too soon"):
            follow(frame, len(content) + 7, pieces)
        with pytest.raises(ValueError, match="holds more bytes than its shape"):
            follow(frame, len(content) - 1, pieces)


@pytest.mark.parametrize("level", [1, 19, 22])
@pytest.mark.parametrize("size", [1, 4, 1000, 10_000_000])
def test_the_bound_on_what_a_frame_decodes_to_holds(level: int, size: int) -> None:
    """Nothing is refused for its length that zstd can make, at its best."""
    import zstandard

    frame = zstandard.ZstdCompressor(level=level, write_content_size=False).compress(bytes(size))
    assert len(frame) * zstd.RATIO >= size
