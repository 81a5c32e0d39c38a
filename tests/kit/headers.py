"""safetensors files built byte by byte: a valid one, and invalid ones with the message expected for each."""

import json
import struct
from typing import Any


def packed(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


GOOD = packed({"a": entry(0, 8), "b": entry(8, 16)}, bytes(16))

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "claims"),
    "seven bytes": (GOOD[:7], "claims"),
    "huge length": (struct.pack("<Q", 1 << 63) + GOOD[8:], "claims 9223372036854775808 bytes"),
    "length beyond the file": (struct.pack("<Q", len(GOOD)) + GOOD[8:], "claims"),
    "length zero": (packed(b"", bytes(8)), "does not begin"),
    "truncated": (GOOD[:-1], "end at byte"),
    "trailing bytes": (GOOD + b"\0", "end at byte"),
    "overlap": (packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "begins at byte"),
    "same place": (packed({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "begins at byte"),
    "hole": (packed({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "begins at byte"),
    "hole at the front": (packed({"a": entry(4, 8)}, bytes(8)), "begins at byte"),
    "shape mismatch": (packed({"a": entry(0, 8, shape=[3])}, bytes(8)), "has 8 bytes"),
    "overflowing shape": (packed({"a": entry(0, 8, shape=[1 << 62, 1 << 62])}, bytes(8)), "has shape"),
    "negative dimension": (packed({"a": entry(0, 8, shape=[-2])}, bytes(8)), "has shape [-2]"),
    "two negative dimensions": (packed({"a": entry(0, 8, shape=[-1, -2])}, bytes(8)), "has shape"),
    "fractional dimension": (packed({"a": entry(0, 8, shape=[2.0])}, bytes(8)), "has shape"),
    "boolean dimension": (packed({"a": entry(0, 4, shape=[True])}, bytes(4)), "has shape"),
    "negative offset": (packed({"a": entry(-8, 0)}, bytes(8)), "at [-8, 0]"),
    "offsets the wrong way": (packed({"a": entry(8, 0)}, bytes(8)), ""),
    "three offsets": (
        packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
        "at [0, 8, 8]",
    ),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "at None"),
    "entry is a list": (packed({"a": []}), "is not an object"),
    "unknown dtype": (packed({"a": entry(0, 8, "F128")}, bytes(8)), "'F128'"),
    "dtype is a list": (packed({"a": entry(0, 8, ["F32"])}, bytes(8)), "dtype"),
    "sub-byte dtype": (packed({"a": entry(0, 8, "F4", [16])}, bytes(8)), "stored as F4"),
    "non-string metadata": (packed({"__metadata__": {"a": 1}}), "values that are not strings"),
    "metadata is a list": (packed({"__metadata__": []}), "values that are not strings"),
    "not JSON": (packed(b"{nonsense"), "not a valid safetensors file"),
    "bad UTF-8": (packed(b'{"\xff\xfe": 1}'), "not a valid safetensors file"),
    "UTF-16": (packed(json.dumps({"a": entry(0, 8)}).encode("utf-16-le"), bytes(8)), ""),
    "a list": (packed(b"[]"), "does not begin"),
    "deep JSON": (packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not a valid safetensors file"),
    "long number": (packed(b'{"a": ' + b"9" * 10_000 + b"}"), "not a valid safetensors file"),
    "duplicate tensor": (
        packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)),
        "duplicate key a",
    ),
    "duplicate key in an entry": (
        packed(b'{"a":{"dtype":"F32","dtype":"U32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "duplicate key dtype",
    ),
    "leading spaces": (packed(b"  " + json.dumps({"a": entry(0, 8)}).encode(), bytes(8)), "does not begin"),
    "path as a name": (packed({"../../x": entry(0, 8)}, bytes(8)), "unsafe tensor name"),
    "absolute path as a name": (packed({"/etc/x": entry(0, 8)}, bytes(8)), "unsafe tensor name"),
    "NUL in a name": (packed({"a\0b": entry(0, 8)}, bytes(8)), "unsafe tensor name"),
    "newline in a name": (packed({"a\nb": entry(0, 8)}, bytes(8)), "unsafe tensor name"),
    "lone surrogate in a name": (packed({"\ud800": entry(0, 8)}, bytes(8)), "unsafe tensor name"),
    "empty name": (packed({"": entry(0, 8)}, bytes(8)), "unsafe tensor name"),
    "long name": (packed({"a" * 5000: entry(0, 8)}, bytes(8)), "unsafe tensor name"),
    "many empty tensors": (packed({f"t{n}": entry(0, 0) for n in range(100_001)}), "lists 100001 tensors"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        "git-lfs pointer",
    ),
}
