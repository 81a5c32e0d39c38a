"""OCDBT files taken apart and put together again: what an attacker can write with a valid checksum."""

from __future__ import annotations

import struct
from functools import cache

MANIFEST, NODE = 0x0CDB3A2A, 0x0CDB20DE


def unwrap(file: bytes) -> bytes:
    """The content of a manifest or a node, decompressed."""
    import zstandard

    content = file[14:-4]
    return zstandard.ZstdDecompressor().decompressobj().decompress(content) if file[13] == 1 else content


def wrap(magic: int, content: bytes, *, compress: bool = False) -> bytes:
    """A manifest or a node that holds ``content``, with the length and the checksum it must have."""
    import zstandard

    if compress:
        content = zstandard.ZstdCompressor(level=1).compress(content)
    head = struct.pack(">I", magic) + struct.pack("<Q", len(content) + 18) + bytes((0, int(compress)))
    return head + content + struct.pack("<I", crc32c(head + content))


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum, reflected."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)
