"""zstd frames: exactly one complete frame is accepted; anything shorter, longer or larger is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.formats.orbax import zstd


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
    with pytest.raises(ValueError, match="ends within its zstd frame"):
        follow(frame[: data.draw(st.integers(0, len(frame) - 1))], len(content), pieces)
    with pytest.raises(ValueError, match="has data after its zstd frame"):
        follow(frame + b"\0", len(content), pieces)
    with pytest.raises(ValueError, match="has data after its zstd frame"):
        follow(frame + frame, len(content), pieces)
    if size and content:
        with pytest.raises(ValueError, match=r"is truncated by 7 bytes"):
            follow(frame, len(content) + 7, pieces)
        with pytest.raises(ValueError, match="has more bytes than its shape"):
            follow(frame, len(content) - 1, pieces)


@pytest.mark.parametrize("level", [1, 19, 22])
@pytest.mark.parametrize("size", [1, 4, 1000, 10_000_000])
def test_the_bound_on_what_a_frame_decodes_to_holds(level: int, size: int) -> None:
    """Nothing is refused for its length that zstd can make, at its best."""
    import zstandard

    frame = zstandard.ZstdCompressor(level=level, write_content_size=False).compress(bytes(size))
    assert len(frame) * zstd.RATIO >= size
