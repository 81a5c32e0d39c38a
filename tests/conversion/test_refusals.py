"""Everything that must be refused: why, in one line, what to do about it, and nothing changed on disk."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bridge
from bridge.arrays import BFLOAT16
from bridge.errors import Refusal, SourceRefused
from bridge.formats.disk.location import Location
from bridge.formats.orbax.ocdbt import index
from bridge.publish.record import RECORD
from tests.kit import checkpoints
from tests.kit.checkpoints import Tree
from tests.kit.digest import snapshot

ATTN = "PaliGemma/llm/layers/attn"
Q = f"{ATTN}/q_einsum"
LINEAR = "PaliGemma/llm/layers/mlp/linear"
EMBEDDING = "PaliGemma/llm/embedder/input_embedding"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 123\n"
)
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass
class Scene:
    """A conversion that would succeed, until a row of the table spoils it."""

    tmp: Path
    patch: pytest.MonkeyPatch
    tree: Tree = field(default_factory=checkpoints.pi0_tree)
    saved: dict[str, Any] = field(default_factory=lambda: {"quick": True})
    options: dict[str, Any] = field(default_factory=lambda: {"to": "torch-merged", "lora_alpha": 4.0})

    def __post_init__(self) -> None:
        self.step = self.src = self.tmp / "run" / "100"
        self.dst = self.tmp / "made" / "out"

    @property
    def params(self) -> Path:
        return self.step / "params"

    def data_file(self) -> Path:
        """The file that holds the most data."""
        return max((self.params / "ocdbt.process_0").glob("d/*"), key=lambda file: file.stat().st_size)

    def kvstore(self) -> Any:
        import tensorstore as ts

        return ts.KvStore.open(
            {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self.params}/"}}
        ).result()

    def value(self, key: str) -> bytes:
        return bytes(self.kvstore().read(key).result().value)

    def put(self, key: str, value: bytes | None) -> None:
        self.kvstore().write(key, value).result()

    def describe(self, leaf: str, **changes: Any) -> None:
        """Change what an array says of itself."""
        key = f"params.{leaf.replace('/', '.')}.value/.zarray"
        self.put(key, json.dumps({**json.loads(self.value(key)), **changes}).encode())

    def chunk(self, leaf: str, change: Callable[[bytes], bytes | None]) -> None:
        """Change the one chunk of an array."""
        name = f"params.{leaf.replace('/', '.')}.value"
        axes = len(json.loads(self.value(f"{name}/.zarray"))["shape"])
        key = f"{name}/{'.'.join('0' * axes)}"
        self.put(key, change(self.value(key)))

    def metadata(self, change: Callable[[dict[str, Any]], None]) -> None:
        file = self.params / "_METADATA"
        described = json.loads(file.read_text())
        change(described)
        file.write_text(json.dumps(described))

    def list_array(self, *path: str) -> None:
        """Add an array to _METADATA."""
        entry = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        self.metadata(lambda described: described["tree_metadata"].update({str(path): entry}))

    def copy_array(self, leaf: str, name: str) -> None:
        """Store an array a second time under another name."""
        old = f"params.{leaf.replace('/', '.')}.value"
        for key in [key.decode() for key in self.kvstore().list().result()]:
            if key.startswith(f"{old}/"):
                self.put(name + key.removeprefix(old), self.value(key))


Spoil = Callable[[Scene], object]


@dataclass(frozen=True)
class Row:
    """One bad input."""

    says: str
    """Regular expression, found in one of the causes."""
    spoil: Spoil = lambda scene: None
    """Called before the checkpoint is saved: changes its tree, the options, where it is written."""
    damage: Spoil = lambda scene: None
    """Called after the checkpoint is saved."""


def edit(leaf: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    def spoil(scene: Scene) -> None:
        scene.tree[leaf] = change(scene.tree[leaf])

    return spoil


def put(leaf: str, value: float, **options: Any) -> Spoil:
    """Set one number of a leaf: of layer 2 where it has layers, else of its third row."""

    def spoil(scene: Scene) -> None:
        array = scene.tree[leaf]
        array[(min(2, len(array) - 1), *(0 for _ in array.shape[1:]))] = value
        scene.options |= options

    return spoil


def drop(*leaves: str) -> Spoil:
    return lambda scene: [scene.tree.pop(leaf) for leaf in leaves]


def options(**changes: Any) -> Spoil:
    return lambda scene: scene.options.update(changes)


def tree(**made: Any) -> Spoil:
    """Another tree, and options beside it (``alpha``)."""

    def spoil(scene: Scene) -> None:
        scene.options["lora_alpha"] = made.pop("alpha", None)
        scene.options["rslora"] = made.pop("rslora", False)
        scene.tree = checkpoints.pi0_tree(**made)

    return spoil


def mixed_suffixes(scene: Scene) -> None:
    scene.saved["value_suffix"] = False
    scene.tree["action_in_proj/bias/value"] = scene.tree.pop("action_in_proj/bias")


LEAVES = {
    "missing leaf": Row(r"leaf action_in_proj/bias of pi0 is missing", drop("action_in_proj/bias")),
    "extra leaf": Row(
        r"leaf extra/kernel is not part of pi0",
        lambda scene: scene.tree.update({"extra/kernel": np.zeros(3, np.float32)}),
    ),
    "extra leaf beside params": Row(
        r"leaf opt/bias is not part of pi0",
        damage=lambda s: (s.copy_array("action_in_proj/bias", "opt.bias.value"), s.list_array("opt", "bias", "value")),
    ),
    "leaf beside params under a name that is also inside": Row(
        r"action_in_proj/bias",
        damage=lambda s: (
            s.copy_array("action_in_proj/bias", "action_in_proj.bias.value"),
            s.list_array("action_in_proj", "bias", "value"),
        ),
    ),
    "another model": Row(
        r"these 2 names match no supported model",
        lambda scene: setattr(scene, "tree", {"x/w": np.ones(2, np.float32), "y": np.ones(2, np.float32)}),
    ),
    "a without b": Row(rf"{Q}/lora_a is there, but its counterpart {Q}/lora_b is missing", drop(f"{Q}/lora_b")),
    "b without a": Row(
        rf"{LINEAR}_lora_b is there, but its counterpart {LINEAR}_lora_a is missing", drop(f"{LINEAR}_lora_a")
    ),
    "one leaf without factors": Row(
        rf"{Q}/w has no LoRA factors, but {ATTN}/\w+/w has", drop(f"{Q}/lora_a", f"{Q}/lora_b")
    ),
    "one feed-forward leaf without factors": Row(
        rf"{LINEAR} has no LoRA factors", drop(f"{LINEAR}_lora_a", f"{LINEAR}_lora_b")
    ),
    "ranks of a and b differ": Row(
        rf"{Q}/lora_b: paligemma\.rank is 4, but 5 in", edit(f"{Q}/lora_b", lambda b: b[:, :, :4])
    ),
    "every factor has too few axes": Row(
        r"lora_a has \d axes",
        lambda scene: scene.tree.update({leaf: a[0] for leaf, a in scene.tree.items() if "lora" in leaf}),
    ),
    "sizes of two rules differ": Row(
        r"PaliGemma/llm/final_norm/scale: paligemma\.width is 12, but 13 in",
        edit("PaliGemma/llm/final_norm/scale", lambda w: w[:12]),
    ),
    "layers of the experts differ": Row(
        r"mlp_1/linear: paligemma\.layer is 3, but 4 in",
        edit("PaliGemma/llm/layers/mlp_1/linear", lambda w: w[:3]),
    ),
    "a multiple is off": Row(
        r"projections\.action_time is 33; expected 2 x expert\.width, which is 17",
        edit("action_time_mlp_in/kernel", lambda w: w[:33]),
    ),
    "too few k|v": Row(r"paligemma\.kv is \d", edit(f"{ATTN}/kv_einsum/w", lambda w: w[:, :1])),
    "too few axes": Row(
        rf"{Q}/w has 3 axes \[7, 13, 11\]; expected 4 \(layer head width dim\)", edit(f"{Q}/w", lambda w: w[0])
    ),
    "too many axes": Row(r"action_in_proj/bias has 2 axes \[1, 17\]", edit("action_in_proj/bias", lambda w: w[None])),
    "mixed value suffixes": Row(
        r"1 leaves end in 'value' and 69 do not \(first: \S+\)", mixed_suffixes
    ),
    "int32": Row(r"action_in_proj/bias/value has dtype int32", edit("action_in_proj/bias", lambda w: w.astype("i4"))),
    "float64": Row(r"linear/value has dtype float64", edit(LINEAR, lambda w: w.astype("f8"))),
}  # fmt: skip


def no_finished_step(scene: Scene) -> None:
    (scene.params / "_METADATA").unlink()
    (scene.tmp / "run" / "200.orbax-checkpoint-tmp-17" / "params").mkdir(parents=True)
    scene.src = scene.tmp / "run"


def train_state_only(scene: Scene) -> None:
    shutil.move(scene.params, scene.step / "train_state")


def at(*parts: str) -> Spoil:
    return lambda scene: setattr(scene, "src", scene.tmp.joinpath(*parts))


def unfinished_name(scene: Scene) -> None:
    scene.src = scene.step.rename(scene.step.with_name("100.orbax-checkpoint-tmp-1700000000"))


def plain(name: str) -> Spoil:
    return lambda scene: scene.saved.update(layout=name)


PLACES = {
    "does not exist": Row(r"run/101 does not exist", damage=at("run", "101")),
    "empty directory": Row(
        r"empty is not a checkpoint bridge recognizes \(empty directory\)",
        damage=lambda s: (s.tmp.joinpath("empty").mkdir(), at("empty")(s)),
    ),
    "a file": Row(r"norm_stats\.json", damage=at("run", "100", "assets", "my_robot", "norm_stats.json")),
    "inside params/d": Row(r"params/d\b", damage=at("run", "100", "params", "d")),
    "inside a process": Row(
        r"ocdbt\.process_0: manifest|_METADATA is missing",
        damage=at("run", "100", "params", "ocdbt.process_0"),
    ),
    "assets": Row(r"100/assets\b", damage=at("run", "100", "assets")),
    "train_state only": Row(r"contains train_state but no params/", damage=train_state_only),
    "no finished step": Row(
        r"has no complete step \(100, 200\.orbax-checkpoint-tmp-17\)", damage=no_finished_step
    ),
    "unfinished by its name": Row(r"is an unfinished save", damage=unfinished_name),
    "no _METADATA": Row(r"_METADATA is missing", damage=lambda s: (s.params / "_METADATA").unlink()),
    "no manifest": Row(
        r"manifest\.ocdbt is missing: the save did not finish",
        damage=lambda s: (s.params / "manifest.ocdbt").unlink(),
    ),
    "no such format": Row(r"no format is named nonsense", options(from_="nonsense")),
    "unreadable scheme": Row(
        r"ftp:// cannot be read", damage=lambda s: setattr(s, "src", "ftp://host/checkpoint")
    ),
    "params named and not there": Row(r"does not exist", damage=at("run", "101", "params")),
}


def escape(scene: Scene, file: str) -> None:
    """An index whose values lie elsewhere, as TensorStore would tell it."""
    import tensorstore as ts

    dump = ts.ocdbt.dump

    def hostile(*args: Any) -> Any:
        result = dump(*args).result()
        for entry in result.get("entries", []) if isinstance(result, dict) else []:
            if "indirect_value" in entry:
                offset, length = entry["indirect_value"].split(":")[-2:]
                entry["indirect_value"] = f"value::{file}:{offset}:{length}"
        return SimpleNamespace(result=lambda: result)

    scene.patch.setattr(ts.ocdbt, "dump", hostile)


def endless(scene: Scene) -> None:
    """An index with a node that is its own child."""
    import tensorstore as ts

    dump = ts.ocdbt.dump

    calls = iter(range(10_000))

    def hostile(store: Any, node: Any = None) -> Any:
        assert next(calls, None) is not None, "still walking"
        if node is None:
            return dump(store)
        loop = {"entries": [{"key": b"x", "location": node, "subtree_common_prefix": b"x"}]}
        return SimpleNamespace(result=lambda: loop)

    scene.patch.setattr(ts.ocdbt, "dump", hostile)


def shorten(keep: Callable[[int], int]) -> Spoil:
    """Cut the file that holds the most data; what lies behind the last value is not read by anyone."""

    def damage(scene: Scene) -> None:
        file = scene.data_file()
        extents = index(Location.parse(scene.params)).values()
        ends = [e.offset + e.length for e in extents if e.file.endswith(file.name)]
        os.truncate(file, keep(max(ends)))

    return damage


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress(data)


def unzstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def delete_a_file_of_a_chunk(scene: Scene) -> None:
    (scene.params / "params.action_in_proj.kernel.value" / "0.0").unlink()


def cut_a_file_of_a_chunk(scene: Scene) -> None:
    os.truncate(scene.params / "params.action_in_proj.kernel.value" / "0.0", 20)


def zarray(says: str, **changes: Any) -> Row:
    return Row(
        rf"the metadata of params/action_in_proj/kernel/value is damaged: .*{says}",
        damage=lambda s: s.describe("action_in_proj/kernel", **changes),
    )


def described(says: str, text: bytes) -> Row:
    return Row(
        rf"_METADATA is damaged: .*{says}", damage=lambda s: (s.params / "_METADATA").write_bytes(text)
    )


BIG = "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"

DAMAGE = {
    "lfs manifest": Row(
        r"manifest\.ocdbt is a git-lfs pointer, not data",
        damage=lambda s: (s.params / "manifest.ocdbt").write_bytes(POINTER),
    ),
    "lfs data": Row(
        r"ocdbt\.process_0/d/\w+ is a git-lfs pointer, not data",
        damage=lambda s: s.data_file().write_bytes(POINTER),
    ),
    "lfs everywhere": Row(
        r"more files are git-lfs pointers",
        damage=lambda s: [f.write_bytes(POINTER) for f in s.params.rglob("*") if f.is_file()],
    ),
    "data file cut": Row(r"process_0/d/\w+ has \d+ bytes, but the index points to byte",
                         damage=shorten(lambda size: size // 2)),
    "data file cut by a byte": Row(r"has \d+ bytes, but the index points to byte \d+",
                                   damage=shorten(lambda size: size - 1)),
    "data file cut to nothing": Row(r"has 0 bytes, but the index points to", damage=shorten(lambda size: 0)),
    "data file deleted": Row(r"is missing, but the index points to it",
                             damage=lambda s: s.data_file().unlink()),
    "manifest cut": Row(
        r"manifest\.ocdbt: the index cannot be read", damage=lambda s: os.truncate(s.params / "manifest.ocdbt", 40)
    ),
    "manifest empty": Row(
        r"manifest\.ocdbt: the index cannot be read", damage=lambda s: os.truncate(s.params / "manifest.ocdbt", 0)
    ),
    "root nodes deleted": Row(
        r"manifest\.ocdbt: the index cannot be read", damage=lambda s: shutil.rmtree(s.params / "d")
    ),
    "root nodes flipped": Row(
        r"manifest\.ocdbt: the index cannot be read",
        damage=lambda s: [
            f.write_bytes(bytes(b ^ 0x55 for b in f.read_bytes())) for f in (s.params / "d").iterdir()
        ],
    ),
    "listed and not stored": Row(
        r"_METADATA lists params/ghost/value, which is missing from the store",
        damage=lambda s: s.list_array("params", "ghost", "value"),
    ),
    "stored and not listed": Row(
        r"the store contains params\.ghost\.value, which _METADATA does not list",
        damage=lambda s: s.copy_array("action_in_proj/bias", "params.ghost.value"),
    ),
    "chunk missing": Row(r"params/action_in_proj/kernel/value lacks 1 of 1 chunks",
                         damage=lambda s: s.chunk("action_in_proj/kernel", lambda _: None)),
    "one of many chunks missing": Row(
        r"action_in_proj/kernel/value lacks 1 of 4 chunks",
        lambda s: s.saved.update(chunks="grid"),
        lambda s: s.put("params.action_in_proj.kernel.value/1.0", None),
    ),
    "chunk file missing": Row(
        r"action_in_proj/kernel/value lacks 1 of 1 chunks", plain("zarr"), delete_a_file_of_a_chunk
    ),
    "chunk file cut": Row(r"action_in_proj/kernel/value (is truncated by \d+ bytes|cannot be decoded)",
                          plain("zarr"), cut_a_file_of_a_chunk),
    "zstd cut": Row(r"action_in_proj/kernel/value (is truncated by \d+ bytes|cannot be decoded)",
                    damage=lambda s: s.chunk("action_in_proj/kernel", lambda data: data[:-5])),
    "zstd empty": Row(r"action_in_proj/kernel/value cannot be read: 0 bytes of zstd do not decode to \d+",
                      damage=lambda s: s.chunk("action_in_proj/kernel", lambda _: b"")),
    "zstd nonsense": Row(r"cannot be decoded", damage=lambda s: s.chunk(BIG, lambda data: b"\xff" * len(data))),
    "zstd cut, streamed": Row(r"Dense_0/kernel/value (is truncated by \d+ bytes|cannot be decoded)",
                              damage=lambda s: s.chunk(BIG, lambda data: data[: len(data) // 2])),
    "zstd holds too little": Row(r"Dense_0/kernel/value is truncated by 4 bytes",
                                 damage=lambda s: s.chunk(BIG, lambda data: zstd(unzstd(data)[:-4]))),
    "zstd holds too much": Row(r"Dense_0/kernel/value has more bytes than its shape",
                               damage=lambda s: s.chunk(BIG, lambda data: zstd(unzstd(data) + b"1234"))),
    "bytes after the zstd frame": Row(r"Dense_0/kernel/value",
                                      damage=lambda s: s.chunk(BIG, lambda data: data + b"junk")),
    "zstd bomb": Row(r"Dense_0/kernel/value has more bytes than its shape",
                     damage=lambda s: s.chunk(BIG, lambda _: zstd(bytes(1 << 26)))),
    "plain chunk too short": Row(
        r"Dense_0/kernel/value is truncated by 4 bytes",
        lambda s: s.saved.update(compress=False),
        lambda s: s.chunk(BIG, lambda data: data[:-4]),
    ),
    "plain chunk too long": Row(
        r"Dense_0/kernel/value has more bytes than its shape",
        lambda s: s.saved.update(compress=False),
        lambda s: s.chunk(BIG, lambda data: data + b"1234"),
    ),
    "index leads up": Row(r"unsafe path: '\.\./\.\./secret'",
                          damage=lambda s: escape(s, "../../secret")),
    "index leads to /": Row(r"unsafe path: '/etc/passwd'", damage=lambda s: escape(s, "/etc/passwd")),
    "index leads up, encoded": Row(r"unsafe path: '\.\./x'", damage=lambda s: escape(s, "%2e%2e/x")),
    "index without end": Row(r"manifest\.ocdbt: the index cannot be read", damage=endless),
    "zarray huge": zarray(r"shape \[1099511627776, 17\].* exceeds the limit", shape=[1 << 40, 17]),
    "zarray huge product": zarray(r"exceeds the limit of 1 TiB", shape=[1 << 31, 1 << 31]),
    "zarray huge chunks": zarray(r"larger", chunks=[1 << 40, 17]),
    "zarray negative": zarray(r"shape is \[-31, 17\]", shape=[-31, 17]),
    "zarray fractional": zarray(r"shape is", shape=[31.0, 17]),
    "zarray boolean": zarray(r"shape is", shape=[True, 17]),
    "zarray no shape": zarray(r"shape is None", shape=None),
    "zarray chunks 0": zarray(r"chunks are \[0, 17\]", chunks=[0, 17]),
    "zarray tiny chunks": zarray(r"\d+ chunks", shape=[1 << 30, 17], chunks=[1, 1]),
    "zarray chunks of other length": zarray(r"differ in length", chunks=[31]),
    "zarray 33 axes": zarray(r"33 axes", shape=[1] * 33, chunks=[1] * 33),
    "zarray dtype object": zarray(r"dtype is '\|O'", dtype="|O"),
    "zarray dtype complex": Row(
        r"params/action_in_proj/kernel/value is stored as <c8 \(complex numbers of 8 bytes\)",
        damage=lambda s: s.describe("action_in_proj/kernel", dtype="<c8"),
    ),
    "zarray dtype big-endian": zarray(r"dtype is '>f4'", dtype=">f4"),
    "zarray dtype struct": zarray(r"dtype is", dtype="f4,f4"),
    "zarray dtype subarray": zarray(r"dtype is", dtype="(2,3)f4"),
    "zarray dtype nonsense": zarray(r"dtype is", dtype="}{"),
    "zarray dtype list": zarray(r"dtype is", dtype=[["a", "<f4"]]),
    "zarray separator": zarray(r"dimension_separator is '\.\./'", dimension_separator="../"),
    "zarray not JSON": Row(
        r"the metadata of params/action_in_proj/kernel/value is damaged: not JSON",
        damage=lambda s: s.put("params.action_in_proj.kernel.value/.zarray", b"{nonsense"),
    ),
    "zarray a list": Row(
        r"is damaged: not a JSON object",
        damage=lambda s: s.put("params.action_in_proj.kernel.value/.zarray", b"[]"),
    ),
    "zarray deep": Row(
        r"is damaged: nested too deeply",
        damage=lambda s: s.put("params.action_in_proj.kernel.value/.zarray", b"[" * 100_000),
    ),
    "_METADATA empty": described("", b""),
    "_METADATA cut": described("", b'{"tree_metadata": {"('),
    "_METADATA not UTF-8": described("", b'{"tree_metadata": "\xff\xfe"}'),
    "_METADATA a list": described("", b"[]"),
    "_METADATA without a tree": described("tree_metadata", b"{}"),
    "_METADATA tree is a number": described("", b'{"tree_metadata": 3}'),
    "_METADATA entries are numbers": described("", b'{"tree_metadata": {"a": 3}}'),
    "_METADATA deep": described("", b"[" * 100_000),
    "_METADATA lists a path with a dot": Row(
        r"ambiguous tree path 'params/a\.b/value'",
        damage=lambda s: s.list_array("params", "a.b", "value"),
    ),
    "_METADATA lists a path with a slash": Row(
        r"ambiguous tree path", damage=lambda s: s.list_array("params", "../../x", "value")
    ),
    "_METADATA lists an empty key": Row(
        r"ambiguous tree path", damage=lambda s: s.list_array("params", "", "value")
    ),
}  # fmt: skip


def existing(make: Callable[[Path], object]) -> Spoil:
    def spoil(scene: Scene) -> None:
        scene.dst.parent.mkdir()
        make(scene.dst)

    return spoil


def file_as_parent(scene: Scene) -> None:
    scene.dst = scene.tmp / "file" / "out"
    scene.dst.parent.write_text("x")


def dst(*parts: str, **more: Any) -> Spoil:
    def spoil(scene: Scene) -> None:
        scene.dst = scene.tmp.joinpath(*parts)
        scene.options |= more

    return spoil


def through_a_symlink(scene: Scene) -> None:
    (scene.tmp / "link").symlink_to(scene.step)
    scene.dst = scene.tmp / "link" / "out"


def full_disk(scene: Scene) -> None:
    scene.patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=1000, used=900, free=100))


OUTPUTS = {
    "a file": Row(r"made/out exists$", damage=existing(lambda path: path.write_text("mine"))),
    "an empty directory": Row(r"made/out exists$", damage=existing(lambda path: path.mkdir())),
    "a full directory": Row(
        r"made/out exists$", damage=existing(lambda path: (path.mkdir(), (path / "mine").write_text("x")))
    ),
    "a symlink": Row(r"made/out exists$", damage=existing(lambda path: path.symlink_to(path.parent))),
    "a dangling symlink": Row(r"made/out exists$", damage=existing(lambda path: path.symlink_to("nowhere"))),
    "a pipe": Row(r"made/out exists$", damage=existing(os.mkfifo)),
    "inside the source": Row(r"run/100/out is inside the source", damage=dst("run", "100", "out")),
    "inside params": Row(r"is inside the source", damage=dst("run", "100", "params", "out")),
    "inside the source by a symlink": Row(r"link/out is inside the source", damage=through_a_symlink),
    "the source itself": Row(r"run/100 is inside the source", damage=dst("run", "100")),
    "around the source": Row(r"the source .*run/100 is inside .*run", damage=dst("run")),
    "around the source, to overwrite": Row(r"the source .* is inside", damage=dst("run", overwrite=True)),
    "the source itself, to overwrite": Row(r"is inside the source", damage=dst("run", "100", overwrite=True)),
    "below a file": Row(r"file is not a directory", damage=file_as_parent),
    "too long a name": Row(r"aaa", damage=dst("made", "a" * 300)),
    "no space": Row(r"needs [\d.]+ kB, but only 100 B are free", damage=full_disk),
    "not bridge's, to overwrite": Row(
        r"made/out exists and was not written by bridge",
        options(overwrite=True),
        existing(lambda path: (path.mkdir(), (path / "mine").write_text("x"))),
    ),
    "a file, to overwrite": Row(
        r"made/out exists and is a file$", options(overwrite=True), existing(lambda path: path.write_text("x"))
    ),
    "a symlink, to overwrite": Row(
        r"made/out exists and is a symlink to real$",
        options(overwrite=True),
        existing(lambda path: (path.with_name("real").mkdir(), path.symlink_to("real"))),
    ),
}  # fmt: skip

VALUES = {
    "NaN in a layer": Row(rf"{Q}/w contains NaN or infinite values \(layer 2\)", put(f"{Q}/w", np.nan)),
    "NaN, not cast": Row(rf"{Q}/w contains NaN or infinite values \(layer 2\)",
                         put(f"{Q}/w", np.nan, to="torch-base")),
    "Inf in a leaf without layers": Row(r"action_in_proj/kernel contains NaN or infinite values$",
                                        put("action_in_proj/kernel", np.inf)),
    "-Inf in the embedding": Row(r"input_embedding contains NaN or infinite values$", put(EMBEDDING, -np.inf)),
    "NaN in k and v": Row(rf"{ATTN}/kv_einsum/w contains NaN or infinite values \(layer 2\)",
                          put(f"{ATTN}/kv_einsum/w", np.nan)),
    "NaN in lora_a": Row(rf"{Q}/lora_a contains NaN or infinite values \(layer 2\)",
                         put(f"{Q}/lora_a", np.nan)),
    "Inf in lora_b": Row(rf"{LINEAR}_lora_b contains NaN or infinite values \(layer 2\)",
                         put(f"{LINEAR}_lora_b", np.inf)),
    "NaN in bfloat16": Row(r"action_in_proj/bias contains NaN or infinite values",
                           edit("action_in_proj/bias", lambda w: np.full_like(w, np.nan, BFLOAT16))),
    "too large for float16": Row(rf"{Q}/w overflows float16 \(layer 2\)",
                                 put(f"{Q}/w", 70000.0, dtype="float16")),
    "too large for float16, no layers": Row(r"action_in_proj/kernel overflows float16$",
                                            put("action_in_proj/kernel", -70000.0, dtype="float16")),
    "too large for bfloat16": Row(r"action_in_proj/kernel overflows bfloat16$",
                                  put("action_in_proj/kernel", FLOAT32_MAX, dtype="bfloat16")),
    "too large for bfloat16, folded": Row(rf"{Q}/w overflows bfloat16 \(layer 2\)",
                                          put(f"{Q}/w", FLOAT32_MAX, dtype="bfloat16")),
    "too large a product": Row(
        rf"{Q}/w overflows float32 \(layer 2\)",
        lambda s: (put(f"{Q}/lora_a", 1e30)(s), put(f"{Q}/lora_b", 1e30)(s)),
    ),
    "too large a product, to float16": Row(
        rf"{Q}/w overflows float16 \(layer 2\)",
        lambda s: (put(f"{Q}/lora_a", 3e4)(s), put(f"{Q}/lora_b", 3e4, dtype="float16")(s)),
    ),
}  # fmt: skip

PG, EX = {"paligemma": 5}, {"paligemma": 5, "expert": 3}

OPTIONS = {
    "unknown alpha": Row(
        r"paligemma has LoRA of rank 5 with unknown alpha .*stock rank: 16", tree(lora=EX, alpha=None)
    ),
    "unknown alpha of one": Row(
        r"expert has LoRA of rank 3 with unknown alpha .*stock rank: 32",
        tree(lora=EX, alpha={"paligemma": 5.0}),
    ),
    "alpha for an expert without LoRA": Row(
        r"--lora-alpha names expert, but scaled LoRA factors are in paligemma",
        tree(lora=PG, alpha={**PG, "expert": 3.0}),
    ),
    "alpha for no expert": Row(
        r"--lora-alpha names nobody, but scaled LoRA factors are in paligemma and expert",
        tree(lora=EX, alpha={**EX, "nobody": 3.0}),
    ),
    "alpha without LoRA": Row(
        r"--lora-alpha is given, but there are no scaled LoRA", tree(lora={}, alpha=5.0)
    ),
    "alpha by name without LoRA": Row(
        r"--lora-alpha names expert, but scaled LoRA factors are in no part",
        tree(lora={}, alpha={"expert": 5.0}),
    ),
    "rslora without LoRA": Row(
        r"--rslora is given, but there are no scaled LoRA", tree(lora={}, rslora=True)
    ),
    **{
        f"alpha {alpha}": Row(rf"alpha.* {alpha}", options(lora_alpha=alpha))
        for alpha in (float("nan"), float("inf"), 0.0, -4.0)
    },
    "unknown layout": Row(r"pi0 has no layout nonsense", options(layout="nonsense")),
    "a layout of another model": Row(
        r"pi05 has no layout transformers",
        lambda s: (tree(model="pi05", lora={})(s), s.options.update(layout="transformers")),
    ),
    "unknown dtype": Row(r"--dtype is float8", options(dtype="float8")),
    "a dtype that is no weight's": Row(r"--dtype is int32", options(dtype="int32")),
    "unknown target": Row(r"no route from orbax\[base\+lora\] to nonsense", options(to="nonsense")),
}

ROWS = {
    f"{table}: {name}": row
    for table, rows in (
        ("leaves", LEAVES),
        ("places", PLACES),
        ("damage", DAMAGE),
        ("outputs", OUTPUTS),
        ("values", VALUES),
        ("options", OPTIONS),
    )
    for name, row in rows.items()
}


def check_words(refusal: Refusal) -> None:
    """One line of cause, then one of what to do, and no leftovers of an exception's repr."""
    assert refusal.problems
    for problem in refusal.problems:
        assert problem.cause and "\n" not in problem.cause and len(problem.cause) < 700, problem.cause
        assert problem.fix and "\n" not in problem.fix
        assert "Traceback" not in problem.cause and " object at 0x" not in problem.cause
    assert len(set(refusal.problems)) == len(refusal.problems), "said twice"


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ROWS)
def test_refused(scene: Scene, name: str, recwarn: pytest.WarningsRecorder) -> None:
    row = ROWS[name]
    row.spoil(scene)
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    row.damage(scene)
    before = snapshot(scene.tmp)
    with pytest.raises(Refusal) as refused:
        bridge.convert(scene.src, scene.dst, **scene.options)
    check_words(refused.value)
    causes = [problem.cause for problem in refused.value.problems]
    assert any(re.search(row.says, cause) for cause in causes), causes
    # nothing made, nothing left over, nothing touched
    assert snapshot(scene.tmp) == before
    assert [str(w.message) for w in recwarn if issubclass(w.category, RuntimeWarning)] == []


def test_the_scene_converts_when_nothing_spoils_it(scene: Scene) -> None:
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    before = snapshot(scene.tmp / "run")
    bridge.convert(scene.src, scene.dst, **scene.options)
    assert snapshot(scene.tmp / "run") == before
    assert (scene.dst / "model.safetensors").is_file() and (scene.dst / RECORD).is_file()
    assert [path.name for path in scene.dst.parent.iterdir()] == ["out"]


def test_a_long_name_is_a_name(scene: Scene) -> None:
    """Of at most 255 bytes; the private directory beside it has a name of its own."""
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    bridge.convert(scene.src, scene.tmp / ("a" * 255), **scene.options)
    assert (scene.tmp / ("a" * 255) / RECORD).is_file()


def test_all_faults_are_said_at_once(scene: Scene) -> None:
    del scene.tree["action_in_proj/bias"], scene.tree[f"{Q}/lora_b"]
    scene.tree["extra"] = np.zeros(2, np.float32)
    scene.tree["state_proj/bias"] = scene.tree["state_proj/bias"].astype(np.int32)
    scene.tree["PaliGemma/llm/final_norm/scale"] = scene.tree["PaliGemma/llm/final_norm/scale"][:5]
    scene.options |= {"layout": "nonsense", "dtype": "float8", "lora_alpha": {"expert": 3.0}}
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    scene.dst.mkdir(parents=True)
    with pytest.raises(Refusal) as refused:
        bridge.convert(scene.src, scene.dst, **scene.options)
    check_words(refused.value)
    for part in (
        "leaf action_in_proj/bias",
        "its counterpart",
        "leaf extra is not part of pi0",
        "int32",
        "paligemma.width is 5",
        "no layout nonsense",
        "--dtype is float8",
        "paligemma has LoRA of rank 5 with unknown alpha",
        "exists",
    ):
        assert sum(part in problem.cause for problem in refused.value.problems) == 1, part
    assert str(refused.value).count("  fix: ") == len(refused.value.problems)


def test_faulty_values_of_all_leaves_are_said_at_once(scene: Scene) -> None:
    for leaf in (f"{Q}/w", LINEAR, "action_in_proj/kernel"):
        put(leaf, np.nan)(scene)
    scene.tree[LINEAR][0, 0, 0] = np.inf
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    with pytest.raises(Refusal) as refused:
        bridge.convert(scene.src, scene.dst, **scene.options)
    causes = [problem.cause for problem in refused.value.problems]
    assert len(causes) == 3
    assert sum(f"{LINEAR} " in cause and "(layer 0, 2)" in cause for cause in causes) == 1


def test_faults_outrank_a_missing_route(scene: Scene) -> None:
    """Without its lora_b's a checkpoint looks as if it had no LoRA: the lost twins must be what is said."""
    for leaf in [leaf for leaf in scene.tree if "lora_b" in leaf]:
        del scene.tree[leaf]
    scene.options["to"] = "torch-base"
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    with pytest.raises(Refusal, match="its counterpart"):
        bridge.convert(scene.src, scene.dst, **scene.options)


def test_missing_layers_are_grouped(tmp_path: Path) -> None:
    """A PyTorch checkpoint that lost layers, as one line."""
    from safetensors.numpy import load_file, save_file

    checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    bridge.convert(tmp_path / "7", tmp_path / "out", to="torch-merged", dtype="float32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    lost = [name for name in tensors if "gemma_expert" in name and "mlp.up_proj" in name]
    for name in lost[1:3]:
        del tensors[name]
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    problems = bridge.describe(tmp_path / "out").problems
    assert len(problems) == 1 and "layers.{1..2}.mlp.up_proj.weight is missing" in problems[0]


# --overwrite.


def written(scene: Scene) -> dict[str, tuple[Any, ...]]:
    """An output of bridge in place, and what it looks like."""
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    bridge.convert(scene.src, scene.dst, **scene.options)
    return snapshot(scene.dst)


def test_an_output_of_bridge_is_replaced(scene: Scene) -> None:
    old = written(scene)
    bridge.convert(scene.src, scene.dst, **scene.options | {"dtype": "bfloat16", "overwrite": True})
    new = snapshot(scene.dst)
    assert new.keys() == old.keys() and new["model.safetensors"] != old["model.safetensors"]
    assert [path.name for path in scene.dst.parent.iterdir()] == ["out"]


def test_an_empty_directory_is_replaced(scene: Scene) -> None:
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    scene.dst.mkdir(parents=True)
    bridge.convert(scene.src, scene.dst, **scene.options, overwrite=True)
    assert (scene.dst / RECORD).is_file()


def test_a_failure_while_overwriting_leaves_the_old_output_whole(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = written(scene)
    shutil.rmtree(scene.step)
    put(f"{Q}/w", np.nan)(scene)
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    with pytest.raises(Refusal, match=r"q_einsum/w contains NaN or infinite values"):
        bridge.convert(scene.src, scene.dst, **scene.options, overwrite=True)
    assert snapshot(scene.dst) == old
    assert [path.name for path in scene.dst.parent.iterdir()] == ["out"]


def test_a_source_that_vanishes_after_planning(scene: Scene) -> None:
    checkpoints.save(scene.tree, scene.step, **scene.saved)
    plan = bridge.plan(scene.src, scene.dst, **scene.options)
    shutil.rmtree(scene.params)
    before = snapshot(scene.tmp)
    with pytest.raises(SourceRefused) as refused:
        plan.run()
    check_words(refused.value)
    assert snapshot(scene.tmp) == before
