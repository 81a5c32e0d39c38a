"""What is fuzzed: for each reader, valid inputs to begin with, and a run that must end well.

A run takes any bytes and must return, or raise a :class:`bridge.errors.Refusal` with a cause; it
gets a scratch directory of its own that it may use again. Nothing here needs a fuzzer: hypothesis
and atheris both drive these, and tests replay what was found.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bridge.arrays import Spec, box, raw
from bridge.errors import Refusal, refuse_if
from bridge.formats.contract import Timings
from bridge.formats.disk.location import Location
from bridge.formats.orbax import chunks, stream
from bridge.formats.orbax.ocdbt import Extent
from bridge.formats.orbax.source import OrbaxSource, open_orbax
from bridge.formats.orbax.zarr import ZarrArray, parse_v2, parse_v3
from bridge.formats.safetensors.peft import CONFIG, open_peft
from bridge.formats.safetensors.torch import FILE, TorchSource, open_torch
from bridge.peft.config import read_config
from bridge.publish.record import RECORD, check_record, check_whole
from tests.faults import ocdbt
from tests.kit import checkpoints

#: elements that a run may decode: bounds the memory of a run
MOST = 1 << 22


@dataclass(frozen=True)
class Target:
    """One reader under fuzzing."""

    run: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = field(default=())
    """Pieces of the format, for the fuzzer's dictionary."""


def refused(target: Target, data: bytes, scratch: Path) -> Refusal | None:
    """Run a target; its refusal, where it refuses, with the words it must have."""
    try:
        target.run(data, scratch)
    except Refusal as refusal:
        assert refusal.problems
        for problem in refusal.problems:
            for text in (problem.cause, problem.fix):
                assert text and text.isprintable() and len(text) <= 1000, text
                text.encode()
        return refusal
    return None


def _read_all(source: OrbaxSource | TorchSource) -> None:
    for name, spec in source.specs.items():
        if spec.size > MOST:
            continue
        array = source.read(name)
        assert array.shape == spec.shape and array.dtype == spec.dtype
        again = np.empty_like(array)
        for at, values in source.slabs(name):
            again[box(at, values.shape)] = values
        assert bytes(raw(again)) == bytes(raw(array))


# safetensors.


def _safetensors(data: bytes, scratch: Path) -> None:
    """First byte 0: a whole file. Else a header, given its length and as many bytes as it names."""
    text = data[1:]
    if data[:1] not in (b"", b"\0"):
        text = struct.pack("<Q", len(text)) + text + bytes(data[0])
    (scratch / FILE).write_bytes(text)
    _read_all(open_torch(Location.parse(scratch)))


def _safetensors_seeds() -> list[bytes]:
    def entry(begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}

    headers = [
        {"a": entry(0, 8), "b": entry(8, 16)},
        {"__metadata__": {"format": "pt"}, "layers.0.w": entry(0, 16)},
        {"e": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [0, 0]}, "s": entry(0, 16)},
        {"s": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}},
    ]
    texts = [json.dumps(header).encode() for header in headers]
    return [b"\x10" + text for text in texts] + [
        b"\0" + struct.pack("<Q", len(text)) + text + bytes(16) for text in texts
    ]


def _index(data: bytes, scratch: Path) -> None:
    from safetensors.numpy import save_file

    one = scratch / "one.safetensors"
    if not one.exists():
        save_file({"a": np.ones(3, np.float32)}, one)
        save_file({"b": np.ones(3, np.float32)}, scratch / "two.safetensors")
    (scratch / "model.safetensors.index.json").write_bytes(data)
    source = open_torch(Location.parse(scratch))
    assert all(path.parent == scratch for path, _ in source.files.values())
    _read_all(source)


def _index_seeds() -> list[bytes]:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    return [
        json.dumps(described).encode()
        for described in (
            {"metadata": {"total_size": 24}, "weight_map": weight_map},
            {"weight_map": {"a": "one.safetensors"}},
            {"metadata": None, "weight_map": {"a": "../one.safetensors", "b": "\ud800"}},
        )
    ]


# Orbax.


def _v2(**changes: Any) -> bytes:
    described = {
        "zarr_format": 2, "shape": [4, 3], "chunks": [2, 3], "dtype": "<f4", "order": "C",
        "compressor": None, "filters": None, "fill_value": None, "dimension_separator": ".",
    }  # fmt: skip
    return json.dumps({**described, **changes}).encode()


def _v3(**changes: Any) -> bytes:
    described = {
        "zarr_format": 3, "node_type": "array", "shape": [4, 3], "data_type": "float32", "fill_value": 0.0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 3]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }  # fmt: skip
    return json.dumps({**described, **changes}).encode()


def _tree_metadata(*paths: tuple[Any, ...], **more: Any) -> bytes:
    entries = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        for path in paths
    }
    return json.dumps(
        {"tree_metadata": entries, "store_array_data_equal_to_fill_value": True, **more}
    ).encode()


def _zarr_store(scratch: Path, metadata: bytes, described: tuple[str, bytes], keys: tuple[str, str]) -> Path:
    (scratch / "_METADATA").write_bytes(metadata)
    array = scratch / "params.w"
    if not array.exists():
        for key in keys:
            (array / key).parent.mkdir(parents=True, exist_ok=True)
            (array / key).write_bytes(np.arange(6, dtype=np.float32).tobytes())
    (array / described[0]).write_bytes(described[1])
    return scratch


def _zarray(data: bytes, scratch: Path) -> None:
    with contextlib.suppress(ValueError):
        array = parse_v2(data)
        assert array.spec.nbytes <= 1 << 40 and all(array.chunks)
    _zarr_store(scratch, _tree_metadata(("params", "w")), (".zarray", data), ("0.0", "1.0"))
    _read_all(open_orbax(Location.parse(scratch)))


def _zarr_json(data: bytes, scratch: Path) -> None:
    with contextlib.suppress(ValueError):
        parse_v3(data)
    _zarr_store(scratch, _tree_metadata(("params", "w")), ("zarr.json", data), ("c/0/0", "c/1/0"))
    _read_all(open_orbax(Location.parse(scratch)))


def _metadata(data: bytes, scratch: Path) -> None:
    _zarr_store(scratch, data, (".zarray", _v2()), ("0.0", "1.0"))
    _read_all(open_orbax(Location.parse(scratch)))


@cache
def _store() -> dict[str, bytes]:
    """The files of an OCDBT store of several nodes, by path in ``params``."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        tree = {f"l{n}/w": np.arange(700 + n, dtype=np.float32).reshape(-1, 1) for n in range(6)}
        saved = checkpoints.save(tree, Path(place) / "7", quick=True, node_bytes=400, assets=False)
        params = saved / "params"
        return {
            str(file.relative_to(params)): file.read_bytes()
            for file in sorted(params.rglob("*"))
            if file.is_file() and not str(file.relative_to(params)).startswith("ocdbt.process_0/manifest")
        }


def _ocdbt_files() -> list[str]:
    """The manifest, the nodes of the root, and the files of data."""
    return [name for name in _store() if name != "_METADATA"]


def _ocdbt(data: bytes, scratch: Path) -> None:
    """First byte: which file. Second: 0 its bytes as they are; 1 or 2 its content, wrapped again."""
    params = scratch / "params"
    if not params.exists():
        for name, content in _store().items():
            (params / name).parent.mkdir(parents=True, exist_ok=True)
            (params / name).write_bytes(content)
    names = _ocdbt_files()
    name = names[data[0] % len(names)] if data else names[0]
    kind, content = data[1:2], data[2:]
    if kind in (b"\1", b"\2"):
        magic = ocdbt.MANIFEST if name.endswith("manifest.ocdbt") else ocdbt.NODE
        content = ocdbt.wrap(magic, content, compress=kind == b"\2")
    file = params / name
    file.write_bytes(content)
    try:
        _read_all(open_orbax(Location.parse(scratch)))
    finally:
        file.write_bytes(_store()[name])


def _ocdbt_seeds() -> list[bytes]:
    seeds = []
    for number, name in enumerate(_ocdbt_files()):
        content = _store()[name]
        seeds.append(bytes((number, 0)) + content)
        if content[:3] == b"\x0c\xdb\x20" or content[:3] == b"\x0c\xdb\x3a":
            inner = ocdbt.unwrap(content)
            seeds += [bytes((number, 1)) + inner, bytes((number, 2)) + inner]
    return seeds


class _Bytes:
    """Numbers and words out of bytes, as long as there are any."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def pick(self, *values: Any) -> Any:
        return values[self.byte() % len(values)]

    def word(self) -> bytes:
        size = self.byte() % 9
        found = self._data[self._at : self._at + size]
        self._at += size
        return found

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def _dump(data: bytes, scratch: Path) -> None:
    """What ``ts.ocdbt.dump`` may give, made up."""
    import tensorstore as ts

    from bridge.formats.orbax.ocdbt import check_files, index

    node_file = "d/node"
    if not (scratch / "d").exists():
        (scratch / "d").mkdir()
        (scratch / node_file).write_bytes(ocdbt.wrap(ocdbt.NODE, b"x" * 40))
        (scratch / "manifest.ocdbt").write_bytes(ocdbt.wrap(ocdbt.MANIFEST, b"x"))
    given = _Bytes(data)

    def reference(kind: str) -> str:
        file = given.pick(node_file, "../x", "/etc/passwd", "%2e%2e/x", "d/%00", "d", "d/./node", "")
        offset, length = (given.pick("0", "1", "58", "-1", "9" * 30, "", "\u0661") for _ in range(2))
        kind = given.pick(kind, kind, kind, "value", "btreenode", "")
        return f"{kind}:{given.pick('', '', '%2f', 'd/')}:{file}:{offset}:{length}" + given.pick("", "", ":")

    def entry() -> dict[str, Any]:
        found: dict[str, Any] = {}
        if given.byte() % 8:
            found["key"] = given.pick(given.word(), given.word().decode("latin-1"), "é")
        what = given.byte() % 5
        if what == 0:
            found["inline_value"] = given.pick(given.word(), "x", b"", None, 3)
        elif what == 1:
            found["indirect_value"] = given.pick(reference("value"), reference("value"), None)
        elif what < 4:
            found["location"] = reference("btreenode")
            found["subtree_common_prefix"] = given.pick(b"", given.word(), "p", 7)
        return found

    def dump(store: Any, node: str | None = None) -> Any:
        if node is None:
            version = {
                "root": given.pick({"location": reference("btreenode")}, {}, {"location": None}, None),
                "root_height": given.pick(0, 1, 2, 200, -1, None, "0", 1 << 70),
            }
            result: Any = given.pick({"versions": [version]}, {"versions": [version, version]}, {}, [], None)
        else:
            result = {
                "entries": [entry() for _ in range(given.byte() % 5)],
                "height": given.pick(0, 1, 2, 199, None),
            }
        return SimpleNamespace(result=lambda: result)

    real = ts.ocdbt.dump
    ts.ocdbt.dump = dump
    try:
        location = Location.parse(scratch)
        found = index(location)
        assert all(isinstance(key, str) for key in found)
        check_files(location, found)
    finally:
        ts.ocdbt.dump = real


# Chunks.

_ARRAYS = (
    ZarrArray(Spec((7, 5), np.dtype(np.float32)), (7, 5), "zarr", "zstd", ".", ""),
    ZarrArray(Spec((5, 3), np.dtype(np.float16)), (7, 3), "zarr", "zstd", ".", ""),
    ZarrArray(Spec((50_000, 11), np.dtype(np.float32)), (50_000, 11), "zarr", "zstd", ".", ""),
    ZarrArray(Spec((7, 5), np.dtype(np.float32)), (7, 5), "zarr", "raw", ".", ""),
)


def _chunk(data: bytes, scratch: Path) -> None:
    """First byte: which array. The rest is its one chunk."""
    array = _ARRAYS[data[0] % len(_ARRAYS)] if data else _ARRAYS[0]
    extent = Extent(len(data[1:]), inline=data[1:])
    read: np.ndarray | None = None
    try:
        read = chunks.read(array, lambda number: (None, extent), range(array.spec.shape[0]), "w")
    except Refusal:
        with contextlib.suppress(Refusal):
            list(stream.slabs(array, [(None, extent)], "w", Timings()))
            raise AssertionError("streamed, and not read whole") from None
        raise
    again = np.empty_like(read)
    for at, values in stream.slabs(array, [(None, extent)], "w", Timings()):
        again[box(at, values.shape)] = values
    assert bytes(raw(again)) == bytes(raw(read))


def _chunk_seeds() -> list[bytes]:
    import zstandard

    seeds = []
    for number, array in enumerate(_ARRAYS):
        content = np.resize(np.arange(97, dtype=array.spec.dtype), array.chunks).tobytes()
        if array.plain == "raw":
            seeds.append(bytes((number,)) + content)
            continue
        for level, checksum, size in ((1, False, True), (3, True, False), (19, True, True)):
            made = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size)
            frame = made.compress(content)
            seeds.append(bytes((number,)) + frame)
        seeds += [
            bytes((number,)) + frame + frame,
            bytes((number,)) + b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame,
            bytes((number,)) + zstandard.ZstdCompressor().compress(bytes(len(content))),
        ]
    return seeds


# Adapters, records and configs.


def _adapter_config(data: bytes, scratch: Path) -> None:
    from safetensors.numpy import save_file

    module = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"
    if not (scratch / "adapter_model.safetensors").exists():
        name = f"base_model.model.{module}.lora_A.weight"
        save_file({name: np.ones((4, 3), np.float32)}, scratch / "adapter_model.safetensors")
    (scratch / CONFIG).write_bytes(data)
    source = open_peft(Location.parse(scratch))
    config, problems = read_config(source.metadata[CONFIG], CONFIG)
    refuse_if(problems, Refusal)
    assert config is not None
    with contextlib.suppress(TimeoutError):
        assert config.rank(module) > 0 and np.isfinite(config.scale(module))
        config.saves(module)
        config.applies(module)


def _adapter_config_seeds() -> list[bytes]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    more: tuple[dict[str, Any], ...] = (
        {},
        {"rank_pattern": {r"^model\.layers\.(0|1)\.q_proj": 2}, "alpha_pattern": {"q_proj": 1.5}},
        {"use_rslora": True, "modules_to_save": ["action_in_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": "(a|a)*b", "exclude_modules": "[", "layers_pattern": "(x+)+", "use_dora": False},
        {"rank_pattern": {r"(\w|\w\w)+\d": 2, r"(?:a{2,3}){4}[^x]": 3}},
    )
    return [json.dumps({**config, **each}).encode() for each in more]


def _record(data: bytes, scratch: Path) -> None:
    made = scratch / "out"
    if not made.exists():
        shutil.copytree(_output(), made)
    (made / RECORD).write_bytes(data)
    source = open_torch(Location.parse(made))
    problems = check_whole(Location.parse(made)) or check_record(source)[1]
    refuse_if(problems, Refusal)


@cache
def _output() -> Path:
    """A small directory with a record, kept for the whole run."""
    import atexit
    import tempfile

    from safetensors.numpy import save_file

    place = Path(tempfile.mkdtemp(prefix="bridge-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    save_file({"a": np.ones(3, np.float32), "z": np.zeros(3, np.float32)}, place / FILE)
    (place / "config.json").write_text("{}")
    return place


def _record_seeds() -> list[bytes]:
    import xxhash

    from bridge.publish.record import self_checksum

    ones = xxhash.xxh3_128(np.ones(3, np.float32).tobytes()).hexdigest()
    record: dict[str, Any] = {
        "tensors": {"a": {"checksum": ones}, "z": {"checksum": "zeros"}},
        "files": {"config.json": xxhash.xxh3_128(b"{}").hexdigest()},
        "container": [FILE],
        "outputs": [],
        "sizes": {"paligemma.width": 3},
    }
    signed = [record, {**record, "files": {"../../x": "0"}}, {**record, "outputs": ["."]}]
    return [json.dumps({**each, "record": self_checksum(each)}).encode() for each in signed]


def _config(data: bytes, scratch: Path) -> None:
    from safetensors.numpy import save_file

    from bridge.rules.family import families

    if not (scratch / FILE).exists():
        save_file({"a": np.ones(3, np.float32)}, scratch / FILE)
    (scratch / "config.json").write_bytes(data)
    config = open_torch(Location.parse(scratch)).metadata.get("config.json")
    for adapter in families():
        if adapter.known_sizes is not None and isinstance(config, dict):
            assert all(type(size) is int and size > 0 for size in adapter.known_sizes(config).values())


def _norm_stats(data: bytes, scratch: Path) -> None:
    from bridge.adapters import norm_stats

    norm_stats.read("norm_stats.json", data, ("mean", "std", "q01", "q99"))


def _policy_files(data: bytes, scratch: Path) -> None:
    """Every small file of a policy, as one text; and each alone."""
    from bridge.adapters import policy_facts
    from bridge.rules.family import families

    model = next(family.models[0] for family in families() if family.name == "openpi")
    names = [name for name in policy_facts.TABLE.files if "*" not in name]
    for files in (names, *([name] for name in names)):
        reading = policy_facts.read(model, dict.fromkeys(files, data), {})
        for fact in reading.facts:
            assert fact.text is not None and json.dumps(fact.as_json())


def _policy_seeds() -> list[bytes]:
    normalizer = {"norm_map": {"STATE": "MEAN_STD", "ACTION": "QUANTILES"}}
    step = {
        "registry_name": "normalizer_processor",
        "config": normalizer,
        "state_file": "policy_preprocessor.json",
    }
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {"a": "b"}}}
    camera = {"observation.images.top": {"type": "VISUAL", "shape": [3, 2, 2]}}
    config = {"type": "pi0", "chunk_size": 10, "input_features": camera, "image_resolution": [2, 2]}
    facts = {
        "action_horizon": 10,
        "cameras": ["top"],
        "norm_method": "quantiles",
        "dataset": {"repo_id": "a/b"},
    }
    trees = ({"steps": [step, rename]}, config, facts, {"model_type": "pi0", "chunk_size": 10})
    return [json.dumps(each).encode() for each in trees]


def _norm_stats_seeds() -> list[bytes]:
    one = {"mean": [0.5, 1], "std": [1.0, 2.0], "q01": [0, 0], "q99": [1e3, 1]}
    stats = [{"norm_stats": {"state": one, "actions": one}}, {"norm_stats": {"state": one}}]
    return [json.dumps(each).encode() for each in stats]


def _json_words(*names: str) -> tuple[bytes, ...]:
    quoted = tuple(f'"{name}"'.encode() for name in names)
    return (
        *quoted,
        b"9223372036854775808",
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'"\\ud800"',
    )


_ZARR_WORDS = (
    "shape",
    "chunks",
    "dtype",
    "fill_value",
    "compressor",
    "order",
    "filters",
    "chunk_grid",
    "codecs",
)
TARGETS: dict[str, Target] = {
    "safetensors": Target(
        _safetensors, _safetensors_seeds, _json_words("dtype", "shape", "data_offsets", "F32", "__metadata__")
    ),
    "index_json": Target(_index, _index_seeds, _json_words("weight_map", "metadata", "total_size", "../x", "a", "b")),
    "zarray": Target(
        _zarray,
        lambda: [_v2(), _v2(compressor={"id": "zstd", "level": 1}), _v2(fill_value=0, chunks=[4, 3]), _v2(shape=[])],
        _json_words(*_ZARR_WORDS, "<f4", "bfloat16", "zstd"),
    ),
    "zarr_json": Target(
        _zarr_json,
        lambda: [
            _v3(),
            _v3(codecs=[{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}]),
            _v3(
                codecs=[
                    {
                        "name": "sharding_indexed",
                        "configuration": {
                            "chunk_shape": [1, 3],
                            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                        },
                    }
                ]
            ),
        ],
        _json_words(*_ZARR_WORDS, "sharding_indexed", "transpose", "float32"),
    ),
    "metadata": Target(
        _metadata,
        lambda: [
            _tree_metadata(("params", "w")),
            _tree_metadata(("params", "w"), ("params", "v", 3)),
            _tree_metadata(("params", "w"), custom_metadata={"loss": 1.0}),
        ],
        _json_words("tree_metadata", "key_metadata", "value_metadata", "value_type", "key", "None"),
    ),
    "ocdbt": Target(_ocdbt, _ocdbt_seeds),
    "ocdbt_dump": Target(_dump, lambda: [bytes(range(64)), bytes(200), b"\1\0\1" * 40]),
    "chunk": Target(_chunk, _chunk_seeds, (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")),
    "adapter_config": Target(
        _adapter_config,
        _adapter_config_seeds,
        _json_words("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "(?R)", "(a|a)*"),
    ),
    "record": Target(_record, _record_seeds, _json_words("tensors", "files", "outputs", "container", "record")),
    "config_json": Target(
        _config,
        lambda: [b'{"type": "pi0", "paligemma_variant": "gemma_2b"}', b'{"vlm_config": {"hidden_size": 3}}'],
        _json_words("type", "vlm_config", "hidden_size", "dit_config"),
    ),
    "policy_files": Target(
        _policy_files,
        _policy_seeds,
        _json_words("steps", "registry_name", "state_file", "norm_map", "STATE", "type", "chunk_size", "shape"),
    ),
    "norm_stats": Target(_norm_stats, _norm_stats_seeds, _json_words("norm_stats", "state", "mean", "std")),
}  # fmt: skip


def corpus() -> Iterator[tuple[str, bytes]]:
    """Every valid input, by the name of its target."""
    for name, target in TARGETS.items():
        for seed in target.seeds():
            yield name, seed
