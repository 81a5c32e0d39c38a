"""Faults 1 to 32, without 16: sources that are damaged, unfinished, not what they say they are, or hostile.

Each row damages the source of a conversion that would succeed and replace an old output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import tarfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import BFLOAT16
from tests.faults import ocdbt
from tests.faults.damage import (
    BIAS,
    KERNEL,
    POINTER,
    Provoke,
    bare,
    both,
    chunk,
    copy_array,
    describe,
    description,
    flip,
    frame,
    hostile_index,
    layout,
    leaf,
    list_array,
    listed,
    metadata,
    metadata_text,
    model_file,
    number,
    pickled,
    put,
    ran,
    root_at,
    root_node,
    shards,
    shorten,
    store,
    stored,
    tree,
    unzstd,
    values_at,
    zarr3,
    zstd,
)  # fmt: skip
from tests.faults.table import Expect, Fault, Ran, Scene, run_here
from tests.kit import checkpoints
from tests.kit.headers import BAD

Q = "PaliGemma/llm/layers/attn/q_einsum"
EMBEDDING = "PaliGemma/llm/embedder/input_embedding"
LOSSES = r"(\d+ bytes are too many for \d+|cannot be decoded|is truncated by \d+ bytes|has (more bytes|data after))"
WROTE = r"(?m)^wrote "


def row(number: int, title: str, provoke: Provoke, says: str, code: int = 1, also: Any = None) -> Fault:
    expect = Expect(says, code) if also is None else Expect(says, code, also)
    return Fault(number, title, provoke, expect)


def files(scene: Scene, change: Any) -> None:
    for file in scene.params.rglob("*"):
        if file.is_file():
            change(file)


# 1 to 5: files of the store.


def node_bomb(scene: Scene) -> None:
    """A node that decodes to a thousand times the room an index has."""
    scene.patch.setattr("bridge.formats.orbax.ocdbt.MAX_INDEX", 1 << 16)
    node = root_node(scene)
    node.write_bytes(ocdbt.wrap(ocdbt.NODE, bytes(1 << 26), compress=True).ljust(node.stat().st_size, b"\0"))


def manifest_bomb(scene: Scene) -> None:
    scene.patch.setattr("bridge.formats.orbax.ocdbt.MAX_INDEX", 1 << 16)
    bomb = ocdbt.wrap(ocdbt.MANIFEST, bytes(1 << 26), compress=True)
    (scene.params / "manifest.ocdbt").write_bytes(bomb)


def own_child(result: dict[str, Any]) -> None:
    if "entries" in result:
        reference = "btreenode::d/x:0:9"
        result["entries"] = [{"key": b"x", "location": reference, "subtree_common_prefix": b"x"}]


def repeated_keys(result: dict[str, Any]) -> None:
    if "entries" in result:
        result["entries"] = [entry for entry in result["entries"] for _ in range(2)]


def huge_metadata(scene: Scene) -> None:
    """As large as one likes, and takes no room: a hole."""
    os.truncate(scene.params / "_METADATA", 65 << 20)


def pipe(find: Any) -> Provoke:
    def provoke(scene: Scene) -> None:
        path = find(scene)
        path.unlink()
        os.mkfifo(path)

    return provoke


STORE = [
    row(1, "to half", shorten(lambda size: size // 2), r"has \d+ bytes, but the index points to byte \d+"),
    row(1, "by a byte", shorten(lambda size: size - 1), r"has \d+ bytes, but the index points to byte \d+"),
    row(1, "to nothing", shorten(lambda size: 0), r"has 0 bytes, but the index points to byte \d+"),
    row(1, "a chunk in a file of its own",
        both(layout("zarr"), lambda s: os.truncate(s.params / stored(KERNEL) / "0.0", 20)), LOSSES),
    row(2, "of OCDBT", lambda s: s.data_file().unlink(), r"d/\w+ is missing, but the index points to it"),
    row(2, "of zarr", both(layout("zarr"), lambda s: (s.params / stored(KERNEL) / "0.0").unlink()),
        r"kernel/value lacks 1 of 1 chunks"),
    row(3, "empty", lambda s: os.truncate(s.params / "manifest.ocdbt", 0),
        r"manifest\.ocdbt: the index cannot be read"),
    row(3, "cut", lambda s: os.truncate(s.params / "manifest.ocdbt", 40), r"manifest\.ocdbt: the index cannot be read"),
    row(3, "deleted", lambda s: (s.params / "manifest.ocdbt").unlink(),
        r"manifest\.ocdbt is missing: the save did not finish"),
    row(3, "a bomb", manifest_bomb, r"manifest\.ocdbt decodes to more than 65536 bytes"),
    row(3, "a pipe", pipe(lambda s: s.params / "manifest.ocdbt"), r"manifest\.ocdbt is not a regular file"),
    row(4, "deleted", lambda s: shutil.rmtree(s.params / "d"),
        r"manifest\.ocdbt: the index cannot be read: .*No such file"),
    row(4, "a bit of it", flip(root_node, 60), r"manifest\.ocdbt: the index cannot be read: .*"),
    row(4, "a bit of the manifest", flip(lambda s: s.params / "manifest.ocdbt", 60),
        r"manifest\.ocdbt: the index cannot be read"),
    row(4, "a bomb", node_bomb, r"the index cannot be read: d/\w+ decodes to more than \d+ bytes"),
    row(4, "its own child", hostile_index(own_child),
        r"the index cannot be read: .*(height|leaf but has children|not a tree)"),
    row(4, "keys twice", hostile_index(repeated_keys), r"the keys of node .* are not in order"),
    row(4, "a pipe", pipe(root_node), r"d/\w+ is not a regular file"),
    row(5, "missing", lambda s: (s.params / "_METADATA").unlink(), r"_METADATA is missing: the save did not finish"),
    row(5, "empty", metadata_text(b""), r"_METADATA is damaged: .*not JSON"),
    row(5, "cut", lambda s: os.truncate(s.params / "_METADATA", 300), r"_METADATA is damaged: .*not JSON"),
    row(5, "not UTF-8", metadata_text(b'{"tree_metadata": "\xff\xfe"}'), r"_METADATA is damaged: .*not JSON"),
    row(5, "with a byte order mark", metadata_text(b'\xef\xbb\xbf{"tree_metadata": {}}'),
        r"_METADATA is damaged: .*BOM"),
    row(5, "a list", metadata_text(b"[]"), r"_METADATA is damaged: .*not a JSON object"),
    row(5, "without a tree", metadata_text(b"{}"), r"_METADATA is damaged: KeyError\('tree_metadata'\)"),
    row(5, "a tree of numbers", metadata_text(b'{"tree_metadata": {"a": 3}}'), r"_METADATA is damaged"),
    row(5, "keys that are no names", metadata(lambda d: d["tree_metadata"].update(listed("params", ["w"]))),
        r"_METADATA is damaged: .*a key is \['w'\]"),
    row(5, "deep", metadata_text(b"[" * 100_000), r"_METADATA is damaged: .*nested too deeply"),
    row(5, "deep enough to be read", metadata_text(b'{"a":' * 500 + b"1" + b"}" * 500),
        r"_METADATA is damaged: .*nested too deeply"),
    row(5, "a key twice", metadata_text(b'{"tree_metadata": {}, "tree_metadata": {}}'),
        r"_METADATA is damaged: .*duplicate key tree_metadata"),
    row(5, "ten million values", metadata_text(b"[" + b"0," * 10_000_000 + b"0]"),
        r"_METADATA is damaged: .*values, more than the limit"),
    row(5, "65 MB", huge_metadata, r"_METADATA exceeds the 64 MB limit"),
    row(5, "a pipe", pipe(lambda s: s.params / "_METADATA"), r"_METADATA is not a regular file"),
    row(5, "a directory", lambda s: ((s.params / "_METADATA").unlink(), (s.params / "_METADATA").mkdir()),
        r"_METADATA is missing"),
    row(6, "listed and not stored", list_array("params", "ghost", "value"),
        r"_METADATA lists params/ghost/value, which is missing from the store"),
    row(6, "stored and not listed", copy_array("params.ghost.value"),
        r"the store contains params\.ghost\.value, which _METADATA does not list"),
    row(6, "described twice", lambda s: put(s, f"{stored(BIAS)}/zarr.json", b"{}"),
        r"params\.action_in_proj\.bias\.value has both \.zarray and zarr\.json"),
    row(6, "a chunk too many", lambda s: put(s, f"{stored(BIAS)}/7", b"x"),
        r"bias/value has 1 chunk outside its grid \(the first: .*/7\)"),
    row(6, "a smaller shape", describe(shape=[31, 3], chunks=[31, 3]), LOSSES),
    row(7, "of OCDBT", chunk(lambda _: None), r"kernel/value lacks 1 of 1 chunks"),
    row(7, "of many", both(layout("ocdbt", chunks="grid"), lambda s: put(s, f"{stored(KERNEL)}/1.0", None)),
        r"kernel/value lacks 1 of 4 chunks"),
    row(7, "all of millions", describe(shape=[4_000_000, 17], chunks=[1, 17]),
        r"kernel/value lacks \d+ of 4000000 chunks"),
]  # fmt: skip


# 8 to 10: bytes of the data.


def low_bit(scene: Scene) -> None:
    """The lowest bit of a number, in a store without compression: no reader can tell."""
    layout("ocdbt", compress=False)(scene)
    chunk(lambda data: bytes((data[0] ^ 1,)) + data[1:], KERNEL)(scene)


def carried_over(scene: Scene, ran: Ran) -> None:
    """The flipped bit is in the output, whose record holds; a bit flipped there later is found."""
    from safetensors.numpy import load_file

    clean = checkpoints.pi0_tree(lora={})[KERNEL].T
    name = next(n for n in load_file(scene.dst / "model.safetensors") if n.endswith("action_in_proj.weight"))
    assert run_here(["verify", str(scene.dst)]).code == 0
    assert np.count_nonzero(load_file(scene.dst / "model.safetensors")[name] != clean) == 1
    flip(lambda s: s.dst / "model.safetensors", -1)(scene)
    verdict = run_here(["verify", str(scene.dst)])
    assert (
        verdict.code == 1 and "checksum mismatch: changed since bridge wrote it" in verdict.err + verdict.out
    )


def burst(byte: int) -> Provoke:
    """64 KB of one byte over the data, or over all there is."""

    def provoke(scene: Scene) -> None:
        file = scene.data_file()
        size = min(64 << 10, file.stat().st_size)
        file.write_bytes(bytes((byte,)) * size + file.read_bytes()[size:])

    return provoke


#: of a 1 GiB frame: all zeros, in blocks that repeat one byte
BOMB = frame(0, b"\x58", *[(n == 8191, 1, 128 << 10, b"\0") for n in range(8192)])

DATA = [
    row(8, "a low bit: not told, and carried over; the record guards the output",
        both(lambda s: s.options.extend(["--dtype", "float32"]), low_bit), WROTE, 0, carried_over),
    row(8, "a bit of an exponent", number(KERNEL, np.inf), r"action_in_proj/kernel contains NaN or infinite values"),
    row(8, "a bit of a compressed chunk", chunk(lambda data: data[:4] + bytes((data[4] ^ 8,)) + data[5:]),
        r"kernel/value cannot be decoded"),
    row(9, "of zeros", burst(0), r"cannot be decoded: not a zstd frame"),
    row(9, "of ones", burst(255), r"cannot be decoded: not a zstd frame"),
    row(9, "inside a chunk", chunk(lambda data: data[:40] + bytes(64) + data[104:]), LOSSES),
    row(9, "of ones, without compression", both(layout("ocdbt", compress=False), burst(255)),
        r"contains NaN or infinite values"),
    row(10, "cut", chunk(lambda data: data[:-5]),
        r"Dense_0/kernel/value (is truncated by \d+ bytes|cannot be decoded)"),
    row(10, "cut in the last block's checksum", chunk(lambda data: zstd(unzstd(data), write_checksum=True)[:-2]),
        r"(ends within its zstd frame|cannot be decoded|is truncated by \d+ bytes)"),
    row(10, "empty", chunk(lambda _: b""), r"0 bytes of zstd do not decode to \d+"),
    row(10, "nonsense", chunk(lambda data: b"\xff" * len(data)), r"not a zstd frame"),
    row(10, "too little", chunk(lambda data: zstd(unzstd(data)[:-4])), r"is truncated by 4 bytes"),
    row(10, "too little, size not told", chunk(lambda data: zstd(unzstd(data)[:-4], write_content_size=False)),
        r"is truncated by 4 bytes"),
    row(10, "too much", chunk(lambda data: zstd(unzstd(data) + b"1234")),
        r"has more bytes than its shape: \d+, expected \d+"),
    row(10, "too much, size not told", chunk(lambda data: zstd(unzstd(data) + b"1234", write_content_size=False)),
        r"has (more bytes than its shape|data after its zstd frame)"),
    row(10, "bytes after the frame", chunk(lambda data: data + b"junk"),
        r"has (more bytes than its shape|data after its zstd frame)"),
    row(10, "two frames", chunk(lambda data: zstd(unzstd(data)[:40]) + zstd(unzstd(data)[40:])),
        r"is truncated by \d+ bytes"),
    row(10, "two frames, sizes not told",
        chunk(lambda data: zstd(unzstd(data)[:40], write_content_size=False) + zstd(unzstd(data)[40:])), LOSSES),
    row(10, "a frame to be skipped", chunk(lambda data: b"\x50\x2a\x4d\x18\4\0\0\0abcd" + data),
        r"not a zstd frame"),
    row(10, "a frame to be skipped, behind", chunk(lambda data: data + b"\x50\x2a\x4d\x18\4\0\0\0abcd"),
        r"has data after its zstd frame"),
    row(10, "a bomb that says so", chunk(lambda _: zstd(bytes(1 << 26))),
        r"has more bytes than its shape: 67108864, expected \d+"),
    row(10, "a bomb of 1 GiB", chunk(lambda _: BOMB), r"32774 bytes are too many for 4440 decoded"),
    row(10, "a claim of 2**63 bytes",
        chunk(lambda data: frame(0xE0, (1 << 63).to_bytes(8, "little"), (True, 0, 0, b""))),
        r"has more bytes than its shape: 9223372036854775808"),
    row(10, "a window of 2 GiB", chunk(lambda data: frame(0, b"\xa8", (True, 0, len(unzstd(data)), unzstd(data)))),
        r"cannot be decoded: .*memory"),
    row(10, "a dictionary", chunk(lambda data: frame(3, b"\x58\1\0\0\0", (True, 0, 4, b"abcd"))),
        r"needs a dictionary"),
    row(10, "a reserved bit", chunk(lambda data: frame(8, b"\x58", (True, 0, 4, b"abcd"))),
        r"its zstd frame has a reserved bit set"),
    row(10, "a reserved block", chunk(lambda data: frame(0, b"\x58", (True, 3, 4, b"abcd"))),
        r"(a block of a reserved type|cannot be decoded)"),
    row(10, "in a grid", both(layout("ocdbt", chunks="grid"),
        lambda s: put(s, f"{stored(KERNEL)}/0.0", zstd(bytes(1 << 26)))), r"has more bytes than its shape"),
    row(10, "in zarr 3", both(zarr3(lambda d: None),
        lambda s: (s.params / stored(KERNEL) / "c/0/0").write_bytes(zstd(bytes(1 << 26)))),
        r"kernel/value cannot be read"),
    row(10, "without compression, too short", both(layout("ocdbt", compress=False), chunk(lambda data: data[:-4])),
        r"is truncated by 4 bytes"),
    row(10, "without compression, too long",
        both(layout("ocdbt", compress=False), chunk(lambda data: data + b"1234")), r"has more bytes than its shape"),
]  # fmt: skip


# 11: descriptions.


def zarray(title: str, says: str, **changes: Any) -> Fault:
    damaged = rf"the metadata of params/action_in_proj/kernel/value is damaged: .*{says}"
    return row(11, title, describe(**changes), damaged)


def zarr_json(title: str, says: str, change: Any) -> Fault:
    damaged = rf"the metadata of params/action_in_proj/kernel/value is damaged: .*{says}"
    return row(11, f"zarr.json: {title}", zarr3(change), damaged)


DESCRIPTIONS = [
    zarray("a huge shape", r"exceeds the limit of 1 TiB", shape=[1 << 40, 1 << 40]),
    zarray("a shape of 2**63", r"shape is \[9223372036854775808, 17\]", shape=[1 << 63, 17]),
    zarray("a shape below 2**63", r"exceeds the limit of 1 TiB", shape=[(1 << 63) - 1, 17]),
    zarray("a huge axis beside an empty one", r"exceeds the limit of 1 TiB", shape=[1 << 62, 0], chunks=[1, 1]),
    zarray("a negative shape", r"shape is \[-31, 17\]", shape=[-31, 17]),
    zarray("a fractional shape", r"shape is \[31\.0, 17\]", shape=[31.0, 17]),
    zarray("a boolean shape", r"shape is \[True, 17\]", shape=[True, 17]),
    zarray("no shape", r"shape is None", shape=None),
    zarray("huge chunks", r"a chunk is larger than the array", chunks=[1 << 40, 17]),
    zarray("chunks of 0", r"chunks are \[0, 17\]", chunks=[0, 17]),
    zarray("a billion chunks", r"\d+ chunks", shape=[1 << 30, 17], chunks=[1, 1]),
    zarray("chunks of other length", r"differ in length", chunks=[31]),
    zarray("33 axes", r"33 axes", shape=[1] * 33, chunks=[1] * 33),
    zarray("order F", r"order is 'F'", order="F"),
    zarray("filters", r"filters is \[\{'id': 'delta'\}\]", filters=[{"id": "delta"}]),
    zarray("a compressor that is none", r"compressor is 'zstd'", compressor="zstd"),
    zarray("an unknown compressor", r"compressor is \{'id': 'lzma'\}", compressor={"id": "lzma"}),
    zarray("a compressor whose bombs are not bounded", r"compressor is \{'id': 'gzip'",
        compressor={"id": "gzip", "level": 1}),
    zarray("objects", r"dtype is '\|O'", dtype="|O"),
    row(11, "complex numbers", describe(dtype="<c8"),
        r"kernel/value is stored as <c8 \(complex numbers of 8 bytes\), which bridge does not convert"),
    zarray("big-endian", r"dtype is '>f4'", dtype=">f4"),
    row(11, "4 bits", describe(dtype="int4"), r"kernel/value is stored as int4 \(integers of 4 bits\), which bridge"),
    row(11, "floats of 8 bits", describe(dtype="float8_e4m3fn"), r"stored as float8_e4m3fn \(floats of 8 bits\)"),
    row(11, "zarr.json: floats of 8 bits", zarr3(lambda d: d.update(data_type="float8_e5m2")),
        r"stored as float8_e5m2 \(floats of 8 bits\)"),
    zarray("a record", r"dtype is 'f4,f4'", dtype="f4,f4"),
    zarray("numpy's little language", r"dtype is '\(9999999,9999999\)f4'", dtype="(9999999,9999999)f4"),
    zarray("a list of fields", r"dtype is \[\['a', '<f4'\]\]", dtype=[["a", "<f4"]]),
    zarray("a fill value", r"fill_value is 7", fill_value=7),
    zarray("a fill value that is no number", r"fill_value is 'NaN'", fill_value="NaN"),
    zarray("a separator", r"dimension_separator is '\.\./'", dimension_separator="../"),
    zarray("of zarr 3", r"zarr_format is 3", zarr_format=3),
    row(11, "float64 over float32", describe(dtype="<f8"), r"kernel/value has dtype float64"),
    row(11, "a shape that a few bytes cannot fill", describe(shape=[1 << 20, 1 << 10], chunks=[1 << 20, 1 << 10]),
        r"\d+ bytes of zstd do not decode to 4294967296"),
    row(11, "not JSON", description(b"{nonsense"), r"kernel/value is damaged: not JSON"),
    row(11, "a list", description(b"[]"), r"kernel/value is damaged: not a JSON object"),
    row(11, "deep", description(b"[" * 100_000), r"kernel/value is damaged: nested too deeply"),
    row(11, "a key twice", description(b'{"shape": [1], "shape": [2]}'),
        r"kernel/value is damaged: duplicate key shape"),
    row(11, "2 MB", description(b" " * (2 << 20)), r"kernel/value is damaged: it has 2097152 bytes"),
    zarr_json("a group", r"not the metadata of a zarr 3 array", lambda d: d.update(node_type="group")),
    zarr_json("a codec whose bombs are not bounded", r"a codec is 'gzip'",
        lambda d: d["codecs"].append({"name": "gzip"})),
    zarr_json("codecs without end", r"(codecs are|a codec is)",
        lambda d: d.update(codecs=[{"name": "sharding_indexed", "configuration": {}}])),
    zarr_json("a chunk grid that is none", r"no chunk_grid", lambda d: d.update(chunk_grid=[])),
    zarr_json("a fill value", r"fill_value is 7", lambda d: d.update(fill_value=7)),
    row(11, "zarr.json: a smaller shape", zarr3(lambda d: d.update(shape=[30, 17])),
        r"shape \[30, 17\] in chunks of \[31, 17\]: a chunk is larger"),
]  # fmt: skip


# 12: paths and special files.


def replaced(make: Any) -> Provoke:
    """The file with the most data becomes something else."""

    def provoke(scene: Scene) -> None:
        file = scene.data_file()
        file.unlink()
        make(file)

    return provoke


def socket_at(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def linked_asset(scene: Scene) -> None:
    secret = scene.tmp / "secret"
    secret.write_text("{}")
    (scene.step / "assets" / "my_robot" / "more.json").symlink_to(secret)


def replaced_by_a_link(scene: Scene) -> None:
    file = scene.data_file()
    file.symlink_to(file.rename(scene.tmp / "moved"))


def as_the_hub_caches(scene: Scene) -> None:
    """A snapshot whose files are links to blobs named by their content, two levels up."""
    blobs = scene.tmp / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = scene.tmp / "models--x" / "snapshots" / "abc"
    shutil.move(scene.step, snapshot)
    for count, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = blobs / f"{count:064x}"
        shutil.move(file, blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    scene.src = snapshot


def numbered_links(scene: Scene) -> None:
    """Links that make a tree of steps without end; one look at each is all it takes."""
    shutil.rmtree(scene.step)
    for name in ("1", "2", "3"):
        (scene.tmp / "run" / name).symlink_to(".")
    scene.src = scene.tmp / "run"


PATHS = [
    row(12, "up", values_at("../../secret"), r"the index points to an unsafe path: '\.\./\.\./secret'"),
    row(12, "to /", values_at("/etc/passwd"), r"unsafe path: '/etc/passwd'"),
    row(12, "up, encoded", values_at("%2e%2e/x"), r"unsafe path: '\.\./x'"),
    row(12, "up, later", values_at("d/../../x"), r"unsafe path: 'd/\.\./\.\./x'"),
    row(12, "with a NUL", values_at("d/%00x"), r"unsafe path: 'd/.*x'"),
    row(12, "to a directory", values_at("d"), r"/d is missing, but the index points to it"),
    row(12, "a node up", root_at("btreenode::../../x:0:9"), r"unsafe path: '\.\./\.\./x'"),
    row(12, "a node at /", root_at("btreenode:%2f:etc/passwd:0:9"), r"unsafe path: '/etc/passwd'"),
    row(12, "a node of 2**62 bytes", root_at(f"btreenode::manifest.ocdbt:0:{1 << 62}"),
        r"manifest\.ocdbt has 4611686018427387904 bytes"),
    row(12, "a reference of no form", root_at("btreenode::x:-1:9"), r"unknown reference"),
    row(12, "_METADATA: a slash", list_array("params", "../../x", "value"), r"ambiguous tree path"),
    row(12, "_METADATA: a terminal's escape", list_array("params", "a\x1b[2J", "value"),
        r"unsafe tree path 'params/a\\x1b\[2J/value'"),
    row(12, "_METADATA: half a character", list_array("params", "\ud800", "value"), r"unsafe tree path"),
    row(12, "_METADATA: a name of 1 MB", list_array("params", "a" * (1 << 20), "value"), r"unsafe tree path"),
    row(12, "data: a pipe", replaced(os.mkfifo), r"d/\w+ is not a regular file"),
    row(12, "data: a socket", replaced(socket_at), r"d/\w+ is not a regular file"),
    row(12, "data: a link to a device", replaced(lambda f: f.symlink_to("/dev/zero")),
        r"is a symlink to something other than a regular file"),
    row(12, "data: a link to a directory", replaced(lambda f: f.symlink_to("/tmp")), r"is a symlink to a directory"),
    row(12, "data: a link to itself", replaced(lambda f: f.symlink_to(f.name)), r"is a broken symlink"),
    row(12, "data: a link to nothing", replaced(lambda f: f.symlink_to("nowhere")), r"is a broken symlink"),
    row(12, "assets: a link out of the checkpoint", linked_asset,
        r"more\.json is a symlink to \S+/secret, outside the checkpoint"),
    row(12, "data: a link out of the checkpoint", replaced_by_a_link, r"d/\w+ is a symlink to \S+/moved, outside"),
    row(12, "assets: a pipe", lambda s: os.mkfifo(s.step / "assets" / "x"), r"assets/x is not a regular file"),
    row(12, "links as a cache makes them are followed", as_the_hub_caches, WROTE, 0),
    row(12, "a run of links to itself", numbered_links, r"is not a checkpoint"),
]  # fmt: skip


# 13 to 15: unfinished, elsewhere, half fetched. filesystem.py has 16, sources that change.


def unfinished_beside(scene: Scene) -> None:
    (scene.tmp / "run" / "8.orbax-checkpoint-tmp-17" / "params").mkdir(parents=True)
    (scene.tmp / "run" / "9" / "params" / "ocdbt.process_0").mkdir(parents=True)
    scene.src = scene.tmp / "run"


def unfinished_name(scene: Scene) -> None:
    scene.src = scene.step.rename(scene.step.with_name("7.orbax-checkpoint-tmp-1700000000"))


def killed_save(scene: Scene) -> None:
    shutil.rmtree(scene.params / "d")
    (scene.params / "manifest.ocdbt").unlink()
    (scene.params / "_METADATA").unlink()


def at(*parts: str) -> Provoke:
    return lambda scene: setattr(scene, "src", scene.step.joinpath(*parts))


FORMS = [
    row(13, "by its name", unfinished_name, r"is an unfinished save"),
    row(13, "another step is finished", unfinished_beside,
        r"using step 7, the latest complete step of .*\(incomplete: 9, 8\.orbax-checkpoint-tmp-17\)", 0),
    row(13, "killed before the manifest", killed_save, r"_METADATA is missing: the save did not finish"),
    row(13, "no step is finished", both(killed_save, lambda s: setattr(s, "src", s.tmp / "run")),
        r"has no complete step \(7\)"),
    row(14, "a directory of steps", lambda s: setattr(s, "src", s.tmp / "run"),
        r"using step 7, the latest complete step", 0),
    row(14, "params itself", at("params"), WROTE, 0),
    row(14, "too deep", at("params", "d"), r"params/d"),
    row(14, "a process's part", at("params", "ocdbt.process_0"), r"_METADATA is missing|index"),
    row(14, "the assets", at("assets"), r"assets"),
    row(14, "train_state alone", lambda s: shutil.move(s.params, s.step / "train_state"),
        r"contains train_state but no params/"),
    row(14, "nothing", at("nothing"), r"does not exist"),
    row(14, "zarr", layout("zarr"), WROTE, 0),
    row(14, "zarr 3", layout("zarr3"), WROTE, 0),
    row(14, "eight processes", layout("ocdbt", processes=8), WROTE, 0),
    row(15, "a manifest that is a pointer", lambda s: (s.params / "manifest.ocdbt").write_bytes(POINTER),
        r"manifest\.ocdbt is a git-lfs pointer, not data"),
    row(15, "data that is a pointer", lambda s: s.data_file().write_bytes(POINTER),
        r"is a git-lfs pointer, not data"),
    row(15, "all of it pointers", lambda s: files(s, lambda f: f.write_bytes(POINTER)),
        r"more files are git-lfs pointers, not data"),
    row(15, "a PyTorch pointer", model_file(POINTER), r"model\.safetensors is a git-lfs pointer"),
    row(15, "a part left by gsutil", lambda s: s.data_file().rename(s.data_file().with_suffix(".gstmp")),
        r"\.gstmp is an interrupted download"),
    row(15, "a part left by the hub", lambda s: (s.params / "x.incomplete").write_bytes(b""),
        r"x\.incomplete is an interrupted download"),
]  # fmt: skip


# 17 to 27: leaves.


def mixed_suffixes(made: checkpoints.Tree) -> None:
    made[f"{BIAS}/value"] = made.pop(BIAS)


def differing_twin(scene: Scene) -> None:
    """The token embedding, stored under both the names it has, and not the same."""
    from safetensors.numpy import load_file, save_file

    file = scene.from_torch()
    tensors = load_file(file)
    twin = next(name for name in tensors if name.endswith("paligemma.lm_head.weight"))
    alias = twin.replace("lm_head.weight", "model.language_model.embed_tokens.weight")
    save_file({**tensors, alias: tensors[twin] + 1}, file)


def alias_that_replaces(scene: Scene) -> None:
    """A header that names a tensor as the alias of another: what is stored must win."""
    from safetensors.numpy import load_file, save_file

    file = scene.from_torch()
    tensors = load_file(file)
    save_file(tensors, file, {"action_in_proj.weight": "state_proj.weight"})


def no_array(scene: Scene) -> None:
    for key in [key.decode() for key in store(scene).list().result()]:
        put(scene, key, None)
    metadata(lambda d: d.update(tree_metadata={}))(scene)


def many_leaves(scene: Scene) -> None:
    """20,000 small arrays, all of them in the index."""
    import tensorstore as ts

    shutil.rmtree(scene.params)
    scene.params.mkdir()
    base = {"driver": "file", "path": f"{scene.params}/"}
    spec = {"driver": "ocdbt", "base": base, "config": checkpoints.CONFIG}
    transaction = ts.Transaction()
    made = ts.KvStore.open(spec).result().with_transaction(transaction)
    described = json.dumps(
        {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "<f4", "order": "C", "compressor": None,
        "filters": None, "fill_value": None}
    ).encode()  # fmt: skip
    for n in range(20_000):
        made[f"params.w{n}/.zarray"] = described
        made[f"params.w{n}/0"] = b"\0\0\0\0"
    transaction.commit_sync()
    tree = {str(n): entry for n in range(20_000) for entry in listed("params", f"w{n}").values()}
    text = {"tree_metadata": tree, "store_array_data_equal_to_fill_value": True}
    (scene.params / "_METADATA").write_text(json.dumps(text))


def unsafe_layer(scene: Scene) -> None:
    """A layer number that would make a billion names of weights that are missing."""
    from safetensors.numpy import load_file, save_file

    file = scene.from_torch()
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.3." in n and n.endswith("q_proj.weight"))
    save_file({**tensors, name.replace("layers.3.", "layers.999999999."): tensors[name]}, file)


def million_layers(made: checkpoints.Tree) -> None:
    """Every leaf says that there are a million layers; each of them is a few numbers."""
    for name, array in made.items():
        if "llm/layers" in name:
            made[name] = np.broadcast_to(
                array.reshape(-1)[0], (1 << 17, *(1 for _ in array.shape[1:]))
            ).copy()


@cache
def adapter_template() -> Path:
    """The adapter of a LoRA run with its base, made once."""
    import atexit
    from tempfile import mkdtemp

    import bridge

    made = Path(mkdtemp(prefix="bridge-faults-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    run = checkpoints.save(checkpoints.pi0_tree(), made / "run", quick=True)
    bridge.convert(run, made / "adapter", to="peft-adapter", lora_alpha=4.0, with_base=True)
    return made / "adapter"


def broken_adapter(change: Any) -> Provoke:
    """That adapter, damaged, to be merged into its base."""

    def provoke(scene: Scene) -> None:
        scene.src = scene.tmp / "adapter"
        shutil.copytree(adapter_template(), scene.src)
        change(scene.src)
        scene.options += ["--base", str(scene.src / "base")]

    return provoke


def configured(**changes: Any) -> Provoke:
    def change(directory: Path) -> None:
        file = directory / "adapter_config.json"
        text = changes.get("text")
        described = {**json.loads(file.read_text()), **changes}
        file.write_bytes(text if text is not None else json.dumps(described).encode())

    return broken_adapter(change)


def of_another_base(directory: Path) -> None:
    """The base is of another width."""
    shutil.rmtree(directory / "base")
    made = checkpoints.save(
        checkpoints.pi0_tree(lora={}, expert_width=19), directory.parent / "other", quick=True
    )
    import bridge

    bridge.convert(made, directory / "base", to="torch-merged")


LEAVES = [
    row(17, "a leaf", tree(lambda t: t.pop(BIAS)), r"leaf action_in_proj/bias of pi0 is missing"),
    row(17, "its layers", tree(lambda t: t.update({f"{Q}/w": t[f"{Q}/w"][:3]})), r"paligemma\.layer is 3, but 4 in"),
    row(18, "a leaf", tree(lambda t: t.update({"extra/kernel": np.zeros(3, np.float32)})),
        r"leaf extra/kernel is not part of pi0"),
    row(18, "a leaf that differs in case", tree(lambda t: t.update({"Action_In_Proj/bias": t[BIAS]})),
        r"leaf Action_In_Proj/bias is not part of pi0"),
    row(18, "a leaf that differs in its Unicode form",
        tree(lambda t: t.update({"e\u0301/w": t[BIAS], "\u00e9/w": t[BIAS]})), r"is not part of pi0"),
    row(19, "an axis too few", leaf(f"{Q}/w", lambda w: w[0]), r"q_einsum/w has 3 axes \[7, 13, 11\]; expected 4"),
    row(19, "another size", leaf("PaliGemma/llm/final_norm/scale", lambda w: w[:12]),
        r"paligemma\.width is 12, but 13 in"),
    row(19, "another size of everything", leaf("action_time_mlp_in/kernel", lambda w: w[:33]),
        r"action_time is 33; expected 2 x expert\.width, which is 17"),
    row(19, "a layer numbered 999999999", unsafe_layer, r"has a layer 999999999 but only 5 in all"),
    row(19, "131072 layers", tree(million_layers), r"would be 131072 weights, more than 100000"),
    row(20, "int32", leaf(BIAS, lambda w: w.astype(np.int32)), r"bias/value has dtype int32"),
    row(20, "float64", leaf(BIAS, lambda w: w.astype(np.float64)), r"bias/value has dtype float64"),
    row(20, "float8", lambda s: model_file(safetensors_of(s, "F8_E4M3"))(s), r"has dtype float8_e4m3fn"),
    row(21, "bfloat16 beside float32", leaf(KERNEL, lambda w: w.astype(BFLOAT16)), WROTE, 0),
    row(21, "int8 among them", leaf(KERNEL, lambda w: w.astype(np.int8)), r"kernel/value has dtype int8"),
    row(22, "NaN", number(KERNEL, np.nan), r"action_in_proj/kernel contains NaN or infinite values"),
    row(22, "Inf", number(EMBEDDING, -np.inf), r"input_embedding contains NaN or infinite values"),
    row(23, "float16", both(number(KERNEL, 70000.0), lambda s: s.options.extend(["--dtype", "float16"])),
        r"action_in_proj/kernel overflows float16"),
    row(23, "bfloat16", both(number(KERNEL, float(np.finfo(np.float32).max)),
        lambda s: s.options.extend(["--dtype", "bfloat16"])),
        r"action_in_proj/kernel overflows bfloat16"),
    row(24, "on one leaf", tree(mixed_suffixes, value_suffix=False), r"1 leaves end in 'value' and \d+ do not"),
    row(25, "a dot in a key", list_array("params", "a.b", "value"),
        r"ambiguous tree path 'params/a\.b/value'"),
    row(25, "a number and its word",
        metadata(lambda d: d["tree_metadata"].update({**listed("params", 3), **listed("params", "3")})),
        r"ambiguous tree path 'params/3'"),
    row(25, "with and without params",
        both(lambda s: copy_array("action_in_proj.bias.value")(s), list_array("action_in_proj", "bias", "value")),
        r"are the same leaf in openpi"),
    row(25, "an empty key", list_array("params", "", "value"), r"ambiguous tree path"),
    row(25, "no key at all", metadata(lambda d: d["tree_metadata"].update(listed())), r"ambiguous tree path"),
    row(26, "a without b", tree(lambda t: t.pop(f"{Q}/lora_b"), lora=True),
        r"q_einsum/lora_a is there, but its counterpart \S+/lora_b is missing"),
    row(26, "b without a", tree(lambda t: t.pop(f"{Q}/lora_a"), lora=True),
        r"q_einsum/lora_b is there, but its counterpart \S+/lora_a is missing"),
    row(26, "ranks differ", leaf(f"{Q}/lora_b", lambda b: b[:, :, :4], lora=True), r"paligemma\.rank is 4, but 5 in"),
    row(26, "rank 0", tree(lambda t: t.update({n: rank_0(n, a) for n,
        a in t.items() if "lora_" in n and "_1" not in n}), lora=True),
        r"lora_a/value has shape \[.*0\], which has no elements"),
    row(26, "no target", tree(lambda t: t.pop(f"{Q}/w"), lora=True), r"leaf \S+q_einsum/w of pi0 is missing"),
    row(26, "unknown alpha", both(tree(lambda t: None, lora=True), lambda s: [s.options.pop() for _ in range(2)]),
        r"paligemma has LoRA of rank 5 with unknown alpha"),
    row(26, "axes exchanged", leaf(f"{Q}/lora_a", lambda a: a.swapaxes(-1, -2), lora=True),
        r"lora_a: paligemma\.(width|rank) is \d+, but \d+ in"),
    row(26, "an adapter for another base", broken_adapter(of_another_base),
        r"adapter does not fit \S+/base: 28 weights disagree: \S+ is \[77, 19\] in the base, \[77, 17\]"),
    row(26, "an adapter's rank", configured(r=3), r"has rank \d+ but the config gives it 3"),
    row(26, "an adapter's alpha of 10**400", configured(lora_alpha=10**400), r"lora_alpha is 1000"),
    row(26, "an adapter's alpha of NaN", configured(lora_alpha=float("nan")), r"lora_alpha is nan"),
    row(26, "an adapter's pattern without end", configured(rank_pattern={r"(\w|\w\w|\.)+\d\.\w\.": 3}),
        r"takes? longer than 2 s"),
    row(26, "an adapter's pattern that nests", configured(rank_pattern={"(" * 4000 + ")" * 4000: 3}),
        r"rank_pattern has a pattern that is not a valid regular expression"),
    row(26, "an adapter's pattern of another language", configured(alpha_pattern={"(?R)": 3.0}),
        r"alpha_pattern has a pattern that uses syntax that Python's re does not support"),
    row(26, "an adapter's config: a key twice", configured(text=b'{"r": 4, "r": 8}'),
        r"adapter_config\.json is damaged: duplicate key r"),
    row(26, "an adapter's config: deep", configured(text=b'{"r":' * 100_000),
        r"adapter_config\.json is damaged: nested too deeply"),
    row(26, "an adapter's config: 2 MB", configured(text=b" " * (2 << 20)),
        r"adapter_config\.json exceeds the 1 MB limit"),
    row(27, "tied weights that differ", differing_twin, r"embed_tokens\S+ is taken: .*lm_head\S+ differs from it",
        0, lambda s, ran: embeds(s)),
    row(27, "an alias that would replace a weight", alias_that_replaces, WROTE, 0, lambda s, ran: holds(s, KERNEL)),
    row(27, "an empty array", leaf(BIAS, lambda w: w[:0]), r"bias/value has shape \[0\], which has no elements"),
    row(27, "a scalar", leaf(BIAS, lambda w: w[0]), r"action_in_proj/bias has 0 axes"),
    row(27, "no array", no_array, r"contains no array"),
    row(27, "20,000 leaves", many_leaves, r"these \d+ names match no supported model"),
    row(27, "20,000 leaves that are not there",
        metadata(lambda d: d["tree_metadata"].update({str(n): e for n in range(20_000) for e in listed("params",
        f"w{n}").values()})), r"and 19800 more problems"),
]  # fmt: skip


def rank_0(name: str, array: np.ndarray) -> np.ndarray:
    return array[..., :0] if name.endswith("a") else array[..., :0, :]


def embeds(scene: Scene) -> None:
    """The embedding is the one that is used, not its head."""
    import bridge

    leaf = "PaliGemma/llm/embedder/input_embedding"
    with bridge.open(scene.dst) as opened:
        assert (opened.read(f"params/{leaf}") == checkpoints.pi0_tree(lora={})[leaf] + 1).all()


def holds(scene: Scene, leaf: str) -> None:
    import bridge

    with bridge.open(scene.dst) as opened:
        assert (opened.read(f"params/{leaf}") == checkpoints.pi0_tree(lora={})[leaf]).all()


# 28 to 32: PyTorch files.


def safetensors_of(scene: Scene, code: str) -> bytes:
    """The output's file, all of whose tensors are of another dtype of one to four bytes."""
    text = (scene.dst / "model.safetensors").read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    size = {"F8_E4M3": 1, "U16": 2, "F8_E8M0": 1, "F4": 0.5, "C64": 8, "BF16": 2, "U32": 4}[code]
    at = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = int(np.prod(entry["shape"]))
            entry |= {"dtype": code, "data_offsets": [at, at := at + int(count * size)]}
    made = json.dumps(header).encode()
    return len(made).to_bytes(8, "little") + made + bytes(at)


def headed(header: bytes, data: int = 0) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data)


def empty_tensors(count: int) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return headed(("{" + ",".join(f'"t{n}":{entry}' for n in range(count)) + "}").encode())


def in_little_memory(content: bytes) -> Provoke:
    """In a process of its own, which may take 1 GB of addresses in all."""

    def provoke(scene: Scene) -> None:
        model_file(content)(scene)
        scene.limits = "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))"
        scene.environment = {"OPENBLAS_NUM_THREADS": "1"}

    return provoke


def hole(scene: Scene) -> None:
    """A file that takes no room, all of it one header."""
    file = scene.from_torch()
    file.write_bytes((33 << 20).to_bytes(8, "little") + b"{")
    os.truncate(file, (33 << 20) + 8)


FILES = [
    *(row(28, title, model_file(content), re.escape(cause) or r"not a valid safetensors file") for title,
        (content, cause) in BAD.items()),
    row(28, "a shape of 2**62 beside 0",
        model_file(headed(b'{"a":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]}}')),
        r"a has shape \[4611686018427387904, 0\]"),
    row(28, "a pipe", lambda s: (s.from_torch().unlink(), os.mkfifo(s.step / "model.safetensors")),
        r"model\.safetensors: is not a regular file"),
    row(28, "a link to a device",
        lambda s: (s.from_torch().unlink(), (s.step / "model.safetensors").symlink_to("/dev/zero")),
        r"model\.safetensors is a symlink to /dev/zero, outside"),
    row(28, "a directory", lambda s: (s.from_torch().unlink(), (s.step / "model.safetensors").mkdir()),
        r"model\.safetensors: Is a directory"),
    row(28, "config.json: nonsense", lambda s: (s.from_torch(), (s.step / "config.json").write_text("{"))[0],
        r"config\.json is damaged: not JSON"),
    row(28, "config.json: other types",
        lambda s: (s.from_torch(), (s.step / "config.json").write_text('{"type": [], "vlm_config": 3}'))[0], WROTE, 0),
    row(28, "config.json: 2 MB", lambda s: (s.from_torch(), os.truncate(s.step / "config.json", 2 << 20))[0],
        r"config\.json exceeds the 1 MB limit"),
    row(29, "100 MB", model_file(headed(b"{" + b" " * 100_000_000 + b"}")), r"its header claims 100000002 bytes"),
    row(29, "500,000 empty tensors", in_little_memory(empty_tensors(500_000)),
        r"(\d+ values, more than the limit of \d+|lists 500000 tensors)"),
    row(29, "ten million values", in_little_memory(headed(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}")),
        r"\d+ values, more than the limit of \d+"),
    row(29, "200,000 levels", in_little_memory(headed(b'{"a":' + b"[" * 200_000)), r"nested too deeply"),
    row(29, "a hole", hole, r"its header claims 34603008 bytes"),
    row(30, "in order", shards(lambda d, i: None), WROTE, 0),
    row(30, "up", shards(lambda d, i: i["weight_map"].update(x="../x.safetensors")),
        r"lists an unsafe file name: '\.\./x\.safetensors'"),
    row(30, "absolute", shards(lambda d, i: i["weight_map"].update(x="/etc/passwd")),
        r"lists an unsafe file name: '/etc/passwd'"),
    row(30, "with a backslash", shards(lambda d, i: i["weight_map"].update(x="..\\x")), r"unsafe file name"),
    row(30, "the directory itself", shards(lambda d, i: i["weight_map"].update(x=".")), r"unsafe file name"),
    row(30, "a newline", shards(lambda d, i: i["weight_map"].update(x="a\nb")), r"unsafe file name"),
    row(30, "half a character", shards(lambda d, i: i["weight_map"].update(x="\ud800")), r"unsafe file name"),
    row(30, "a number", shards(lambda d, i: i["weight_map"].update(x=3)),
        r"index\.json is damaged: .*3 is not a file name"),
    row(30, "no map", shards(lambda d, i: b"{}"), r"index\.json is damaged"),
    row(30, "a map that is a list", shards(lambda d, i: b'{"weight_map": []}'), r"index\.json is damaged"),
    row(30, "not JSON", shards(lambda d, i: b"{"), r"index\.json is damaged: .*not JSON"),
    row(30, "a key twice", shards(lambda d, i: b'{"weight_map": {"a": "x", "a": "y"}}'),
        r"index\.json is damaged: .*duplicate key a"),
    row(30, "a million entries", shards(lambda d, i: million_entries()),
        r"index\.json is damaged: .*10000\d+ values, more than the limit"),
    row(30, "150,000 entries", shards(lambda d,
        i: i["weight_map"].update({f"x{n}": "model-1.safetensors" for n in range(150_000)})),
        r"index\.json is damaged: .*it lists 1501\d\d tensors"),
    row(30, "seven million entries",
        shards(lambda d, i: b'{"weight_map": {' + b'"a":"b",' * 7_000_000 + b'"a":"b"}}'),
        r"(values, more than the limit|duplicate key)"),
    row(30, "a shard missing", shards(lambda d, i: (d / "model-2.safetensors").unlink()),
        r"lists model-2\.safetensors, which is missing"),
    row(30, "a shard that is a link", shards(lambda d, i: link_away(d / "model-2.safetensors")),
        r"model-2\.safetensors is a symlink to \S+/elsewhere, outside"),
    row(30, "an index that is a link",
        both(shards(lambda d, i: None), lambda s: link_away(s.step / "model.safetensors.index.json")),
        r"index\.json is a symlink to \S+/elsewhere, outside"),
    row(30, "a shard that is a pipe",
        shards(lambda d, i: ((d / "model-2.safetensors").unlink(), os.mkfifo(d / "model-2.safetensors"))),
        r"lists model-2\.safetensors, which is missing"),
    row(30, "a tensor in two shards", shards(lambda d, i: both_hold(d)), r"which the index does not list there"),
    row(30, "a tensor not in the map", shards(lambda d, i: i["weight_map"].pop("action_in_proj.bias")),
        r"contains action_in_proj\.bias, which the index does not list there"),
    row(30, "a tensor only in the map", shards(lambda d, i: i["weight_map"].update(x="model-1.safetensors")),
        r"does not contain x, which the index lists there"),
    row(30, "another total_size, said aloud", shards(lambda d, i: i["metadata"].update(total_size=7)),
        r"index\.json has total_size 7, but its tensors have \d+ bytes", 0),
    row(30, "a total_size that is no number", shards(lambda d, i: i["metadata"].update(total_size="7")),
        r"index\.json is damaged: .*total_size is '7'"),
    row(31, "pytorch_model.bin", pickled("pytorch_model.bin", bare),
        r"pytorch_model\.bin is a pickle, which can run code"),
    row(31, "a checkpoint of PyTorch", pickled("last.ckpt", bare), r"last\.ckpt is a pickle"),
    row(31, "a file by itself", both(pickled("w.pth", bare), lambda s: setattr(s, "src", s.step / "w.pth")),
        r"w\.pth is a pickle"),
    row(31, "under another name", pickled("model.safetensors", bare), r"model\.safetensors is a pickle"),
    row(31, "as torch.save writes it, under another name", pickled("model.safetensors", lambda p, t: zipped(p, t)),
        r"model\.safetensors is a pickle"),
    row(31, "a stride of 0 over 4 TB", pickled("pytorch_model.bin", lambda p, t: strided(p)),
        r"pytorch_model\.bin is a pickle"),
    row(31, "a zip bomb", pickled("model.safetensors", lambda p, t: zip_bomb(p)), r"model\.safetensors is a pickle"),
    row(31, "in PyTorch's old tar", pickled("pytorch_model.bin", lambda p, t: tarred(p)),
        r"pytorch_model\.bin is a pickle"),
    row(31, "an adapter", pickled("adapter_model.bin", bare, adapter_config__json=b"{}"),
        r"adapter_model\.bin is a pickle"),
    row(31, "asked for by name",
        both(pickled("pytorch_model.bin", bare), lambda s: s.options.extend(["--from", "torch-merged"])),
        r"pytorch_model\.bin is a pickle"),
    row(32, "F4", lambda s: model_file(safetensors_of(s, "F4"))(s), r"is stored as F4 \(floats of 4 bits\), which"),
    row(32, "scales of 8 bits", lambda s: model_file(safetensors_of(s, "F8_E8M0"))(s), r"stored as F8_E8M0 \(powers"),
    row(32, "complex numbers", lambda s: model_file(safetensors_of(s, "C64"))(s), r"stored as C64 \(complex numbers"),
    row(32, "F8", lambda s: model_file(safetensors_of(s, "F8_E4M3"))(s), r"has dtype float8_e4m3fn"),
    row(32, "U16 for BF16", lambda s: model_file(safetensors_of(s, "U16"))(s), r"has dtype uint16"),
    row(32, "U32 for F32", lambda s: model_file(safetensors_of(s, "U32"))(s), r"has dtype uint32"),
]  # fmt: skip


def million_entries() -> bytes:
    entries = b",".join(b'"x%d": "model-1.safetensors"' % n for n in range(1_000_000))
    return b'{"weight_map": {' + entries + b"}}"


def link_away(file: Path) -> None:
    away = file.parents[2] / "elsewhere"
    shutil.move(file, away)
    file.symlink_to(away)


def both_hold(directory: Path) -> None:
    """What the first shard holds first, the second holds as well."""
    from safetensors.numpy import load_file, save_file

    one, two = (load_file(directory / f"model-{n}.safetensors") for n in (1, 2))
    name = next(iter(one))
    save_file({**two, name: one[name]}, directory / "model-2.safetensors")


def zipped(path: Path, thing: object) -> None:
    import pickle

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": thing}))
        archive.writestr("archive/version", "3\n")


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 26))


def strided(path: Path) -> None:
    import torch

    torch.save({"w": torch.zeros(1).expand(1 << 40)}, path)


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


ROWS = [*STORE, *DATA, *DESCRIPTIONS, *PATHS, *FORMS, *LEAVES, *FILES]


@contextlib.contextmanager
def no_pickle(scene: Scene) -> Iterator[None]:
    """Whatever a row is about: nothing was unpickled."""
    yield
    assert not ran(scene).exists(), "a pickle was run"
