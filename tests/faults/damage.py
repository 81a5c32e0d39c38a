"""Ways to damage a small checkpoint: the store's values, its index, its descriptions."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bridge.formats.disk.location import Location
from bridge.formats.orbax.ocdbt import index
from tests.faults.table import Scene
from tests.kit import checkpoints

Provoke = Callable[[Scene], object]

KERNEL = "action_in_proj/kernel"
BIAS = "action_in_proj/bias"
BIG = "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 123\n"


def both(*provokes: Provoke) -> Provoke:
    """One after the other."""
    return lambda scene: [provoke(scene) for provoke in provokes]


def tree(change: Callable[[checkpoints.Tree], object], *, lora: bool = False, **how: Any) -> Provoke:
    """Another source, of which some leaves are not what they should be."""

    def provoke(scene: Scene) -> None:
        made = checkpoints.pi0_tree() if lora else checkpoints.pi0_tree(lora={})
        change(made)
        if lora:
            scene.options += ["--lora-alpha", "4"]
        scene.save(made, **how)

    return provoke


def leaf(name: str, change: Callable[[np.ndarray], np.ndarray], *, lora: bool = False) -> Provoke:
    return tree(lambda made: made.update({name: change(made[name])}), lora=lora)


def number(name: str, value: float) -> Provoke:
    """One number of a leaf becomes another."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[1] = value
        return array

    return leaf(name, change)


# The store.


def store(scene: Scene) -> Any:
    import tensorstore as ts

    base = {"driver": "file", "path": f"{scene.params}/"}
    return ts.KvStore.open({"driver": "ocdbt", "base": base}).result()


def put(scene: Scene, key: str, value: bytes | None) -> None:
    store(scene).write(key, value).result()


def value(scene: Scene, key: str) -> bytes:
    return bytes(store(scene).read(key).result().value)


def stored(name: str) -> str:
    return f"params.{name.replace('/', '.')}.value"


def describe(**changes: Any) -> Provoke:
    """Change what an array says of itself."""

    def provoke(scene: Scene) -> None:
        key = f"{stored(KERNEL)}/.zarray"
        put(scene, key, json.dumps({**json.loads(value(scene, key)), **changes}).encode())

    return provoke


def description(text: bytes) -> Provoke:
    return lambda scene: put(scene, f"{stored(KERNEL)}/.zarray", text)


def chunk(change: Callable[[bytes], bytes | None], name: str = BIG) -> Provoke:
    """Change the one chunk of an array."""

    def provoke(scene: Scene) -> None:
        axes = len(json.loads(value(scene, f"{stored(name)}/.zarray"))["shape"])
        key = f"{stored(name)}/{'.'.join('0' * axes)}"
        put(scene, key, change(value(scene, key)))

    return provoke


def layout(name: str, **how: Any) -> Provoke:
    """The same leaves, stored in another way."""
    return lambda scene: scene.save(checkpoints.pi0_tree(lora={}), layout=name, **how)


def zarr3(change: Callable[[dict[str, Any]], object]) -> Provoke:
    def provoke(scene: Scene) -> None:
        layout("zarr3")(scene)
        file = scene.params / stored(KERNEL) / "zarr.json"
        described = json.loads(file.read_text())
        change(described)
        file.write_text(json.dumps(described))

    return provoke


def metadata(change: Callable[[dict[str, Any]], object]) -> Provoke:
    def provoke(scene: Scene) -> None:
        file = scene.params / "_METADATA"
        described = json.loads(file.read_text())
        change(described)
        file.write_text(json.dumps(described))

    return provoke


def metadata_text(text: bytes) -> Provoke:
    return lambda scene: (scene.params / "_METADATA").write_bytes(text)


def listed(*path: Any) -> dict[str, Any]:
    entry = {
        "key_metadata": [{"key": key, "key_type": 2} for key in path],
        "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
    }
    return {str(path): entry}


def list_array(*path: Any) -> Provoke:
    """Add an array to ``_METADATA``."""
    return metadata(lambda described: described["tree_metadata"].update(listed(*path)))


def copy_array(name: str) -> Provoke:
    """Store an array a second time under another name."""

    def provoke(scene: Scene) -> None:
        for key in [key.decode() for key in store(scene).list().result()]:
            if key.startswith(f"{stored(BIAS)}/"):
                put(scene, name + key.removeprefix(stored(BIAS)), value(scene, key))

    return provoke


def shorten(keep: Callable[[int], int]) -> Provoke:
    """Cut the file that holds the most data; what lies behind the last value is read by no one."""

    def provoke(scene: Scene) -> None:
        file = scene.data_file()
        extents = index(Location.parse(scene.params)).values()
        end = max(e.offset + e.length for e in extents if e.file.endswith(file.name))
        os.truncate(file, keep(end))

    return provoke


def flip(find: Callable[[Scene], Path], at: int, bit: int = 0) -> Provoke:
    """Flip one bit of a file."""

    def provoke(scene: Scene) -> None:
        file = find(scene)
        content = bytearray(file.read_bytes())
        content[at] ^= 1 << bit
        file.write_bytes(content)

    return provoke


def root_node(scene: Scene) -> Path:
    (node,) = (scene.params / "d").iterdir()
    return node


def hostile_index(change: Callable[[dict[str, Any]], object]) -> Provoke:
    """An index as TensorStore would tell it, changed on the way: each node's entries, or the manifest."""

    def provoke(scene: Scene) -> None:
        import tensorstore as ts

        dump = ts.ocdbt.dump

        def hostile(*args: Any) -> Any:
            result = dump(*args).result()
            change(result)
            return SimpleNamespace(result=lambda: result)

        scene.patch.setattr(ts.ocdbt, "dump", hostile)

    return provoke


def values_at(file: str) -> Provoke:
    """An index whose values lie elsewhere."""

    def change(result: dict[str, Any]) -> None:
        for entry in result.get("entries", []):
            if "indirect_value" in entry:
                offset, length = entry["indirect_value"].split(":")[-2:]
                entry["indirect_value"] = f"value::{file}:{offset}:{length}"

    return hostile_index(change)


def root_at(reference: str) -> Provoke:
    def change(result: dict[str, Any]) -> None:
        if "versions" in result:
            result["versions"][-1]["root"]["location"] = reference

    return hostile_index(change)


# zstd.


def zstd(data: bytes, **options: Any) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1, **options).compress(data)


def unzstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def frame(descriptor: int, header: bytes, *blocks: tuple[bool, int, int, bytes]) -> bytes:
    """A frame by hand: blocks are (last, kind, size, body); kind 0 is raw, 1 repeats a byte."""
    made = b"\x28\xb5\x2f\xfd" + bytes((descriptor,)) + header
    for last, kind, size, body in blocks:
        made += (int(last) | kind << 1 | size << 3).to_bytes(3, "little") + body
    return made


# PyTorch sources.


def model_file(content: bytes) -> Provoke:
    """A PyTorch source whose file is this."""
    return lambda scene: scene.from_torch().write_bytes(content)


def shards(change: Callable[[Path, dict[str, Any]], object]) -> Provoke:
    """A PyTorch source in two shards; ``change`` gets the directory and the index to be written."""

    def provoke(scene: Scene) -> None:
        from safetensors.numpy import load_file, save_file

        file = scene.from_torch()
        tensors = load_file(file)
        file.unlink()
        names = sorted(tensors)
        files = {name: f"model-{1 + n % 2}.safetensors" for n, name in enumerate(names)}
        for each in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == each}, scene.step / each)
        described: dict[str, Any] = {
            "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
            "weight_map": files,
        }
        written = change(scene.step, described)
        text = written if isinstance(written, bytes) else json.dumps(described).encode()
        (scene.step / "model.safetensors.index.json").write_bytes(text)

    return provoke


class _Touch:
    """Pickled, it is a program: unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def ran(scene: Scene) -> Path:
    """The file that exists once a pickle was opened."""
    return scene.tmp.parent / f"{scene.tmp.name}-was-run"


def pickled(name: str, make: Callable[[Path, object], object], **more: bytes) -> Provoke:
    """A directory with nothing but a pickle in it (and ``more`` files), which runs a program."""

    def provoke(scene: Scene) -> None:
        scene.from_torch()
        shutil.rmtree(scene.step)
        scene.step.mkdir(parents=True)
        make(scene.step / name, _Touch(ran(scene)))
        for other, content in more.items():
            (scene.step / other.replace("__", ".")).write_bytes(content)

    return provoke


def bare(path: Path, thing: object) -> None:
    path.write_bytes(pickle.dumps({"w": thing}))
