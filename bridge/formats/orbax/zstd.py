"""zstd frames, held to what Orbax writes: one whole frame, of one size, and nothing after it.

Decoders are lenient: they stop at the end of a frame and do not look at what follows it, or take
several frames for one. RFC 8878 describes the format.
"""

from __future__ import annotations

from typing import Any

#: what any decoder accepts by default, and every encoder below level 23 stays within
MAX_WINDOW = 1 << 27
#: the shortest block, of 4 bytes, decodes to at most 128 KiB (RFC 8878, 3.1.1.2.3 and 4)
RATIO = (128 << 10) // 4

_MAGIC = b"\x28\xb5\x2f\xfd"
_ID_BYTES = (0, 1, 2, 4)


class Frame:
    """Follows the bytes of a frame on their way to the decoder.

    What it raises is the end of a sentence about the chunk.

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
        """Take the next bytes of the frame. Raises ValueError when they cannot be."""
        at = 0
        while at < len(data):
            if self._pass:
                taken = min(self._pass, len(data) - at)
                self._pass -= taken
            elif self._done:
                raise ValueError("holds more bytes than its zstd frame")
            else:
                taken = min(self._need - len(self._head), len(data) - at)
                self._head += data[at : at + taken]
                if len(self._head) == self._need:
                    self._step()
            at += taken

    def finish(self) -> None:
        """There are no more bytes. Raises ValueError when the frame is not whole."""
        if not self._done or self._pass:
            raise ValueError("ends before its zstd frame does")

    def _descriptor(self) -> None:
        if self._head[:4] != _MAGIC:
            raise ValueError("cannot be decoded: it is no zstd frame")
        descriptor = self._head[4]
        single = bool(descriptor & 0x20)
        self._checksum = bool(descriptor & 0x04)
        if descriptor & 0x08:
            raise ValueError("cannot be decoded: a reserved bit of its zstd frame is set")
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
                raise ValueError(f"holds more bytes than its shape: {claimed}, not {self._expected}")
            if claimed < self._expected:
                raise ValueError(f"ends {self._expected - claimed} bytes too soon")
        self._next(3, self._block)

    def _block(self) -> None:
        header = int.from_bytes(self._head, "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == 3:
            raise ValueError("cannot be decoded: its zstd frame has a block of a reserved kind")
        self._pass = 1 if kind == 1 else size
        if last:
            self._done = True
            self._pass += 4 if self._checksum else 0
        self._next(3, self._block)

    def _next(self, need: int, step: Any) -> None:
        self._head.clear()
        self._need, self._step = need, step


def reader(raw: Any, read_size: int) -> Any:
    """A stream of a frame's content, in bounded memory."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    return decompressor.stream_reader(raw, read_size=read_size, closefd=True)
