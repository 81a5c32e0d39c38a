"""Strict checks of zstd streams: one complete frame of the expected size, with nothing after it.

Decoders are lenient: they stop at the end of a frame and ignore the rest, or decode several frames
as one. The format is RFC 8878.
"""

from __future__ import annotations

from typing import Any

#: the default limit of decoders; no encoder below level 23 exceeds it
MAX_WINDOW = 1 << 27
#: bytes of a block at most, encoded or decoded (RFC 8878, 3.1.1.2.3 and 4)
BLOCK = 128 << 10
#: the shortest block has 4 bytes
RATIO = BLOCK // 4

_MAGIC = b"\x28\xb5\x2f\xfd"
_ID_BYTES = (0, 1, 2, 4)


class Frame:
    """A check of a frame's structure, fed with its bytes on their way to the decoder.

    The messages of its errors are predicates, to follow the name of a chunk.

    Args:
        expected: bytes that the frame must decode to.
    """

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._head = bytearray()
        self._need = 5
        self._pass = 0
        self._step = self._descriptor
        self._checksum = False
        self._done = False

    def feed(self, data: bytes | memoryview) -> None:
        """Check the next bytes of the frame. Raises ValueError if they are invalid."""
        at = 0
        while at < len(data):
            if self._pass:
                taken = min(self._pass, len(data) - at)
                self._pass -= taken
            elif self._done:
                raise ValueError("has data after its zstd frame")
            else:
                taken = min(self._need - len(self._head), len(data) - at)
                self._head += data[at : at + taken]
                if len(self._head) == self._need:
                    self._step()
            at += taken

    def finish(self) -> None:
        """End the input. Raises ValueError if the frame is incomplete."""
        if not self._done or self._pass:
            raise ValueError("ends within its zstd frame")

    def _descriptor(self) -> None:
        if self._head[:4] != _MAGIC:
            raise ValueError("cannot be decoded: not a zstd frame")
        descriptor = self._head[4]
        single = bool(descriptor & 0x20)
        self._checksum = bool(descriptor & 0x04)
        if descriptor & 0x08:
            raise ValueError("cannot be decoded: its zstd frame has a reserved bit set")
        self._id = _ID_BYTES[descriptor & 3]
        self._size = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
        self._need = 5 + (0 if single else 1) + self._id + self._size
        if self._need == 5:
            self._header()
        else:
            self._step = self._header

    def _header(self) -> None:
        at = self._need - self._size - self._id
        if any(self._head[at : at + self._id]):
            raise ValueError("cannot be decoded: its zstd frame needs a dictionary")
        if self._size:
            claimed = int.from_bytes(self._head[-self._size :], "little") + (256 if self._size == 2 else 0)
            if claimed > self._expected:
                raise ValueError(f"has more bytes than its shape: {claimed}, expected {self._expected}")
            if claimed < self._expected:
                raise ValueError(f"is truncated by {self._expected - claimed} bytes")
        self._next(3, self._block)

    def _block(self) -> None:
        header = int.from_bytes(self._head, "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == 3:
            raise ValueError("cannot be decoded: its zstd frame has a block of a reserved type")
        self._pass = 1 if kind == 1 else size
        if last:
            self._done = True
            self._pass += 4 if self._checksum else 0
        self._next(3, self._block)

    def _next(self, need: int, step: Any) -> None:
        self._head.clear()
        self._need, self._step = need, step


def reader(raw: Any, read_size: int) -> Any:
    """The decoded content of a frame, as a stream in bounded memory."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    return decompressor.stream_reader(raw, read_size=read_size, closefd=True)
