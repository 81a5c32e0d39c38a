"""PEFT adapters: ``adapter_config.json`` beside ``adapter_model.safetensors``.

The tensors are an ordinary safetensors file; the config is kept as a JSON object, which
:mod:`bridge.peft.config` interprets. Pickled adapters (``adapter_model.bin``) are never loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from bridge.arrays import Spec
from bridge.errors import Problem, SourceRefused
from bridge.formats.contract import Format
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import take_stamps
from bridge.formats.safetensors.header import pickle_problem
from bridge.formats.safetensors.torch import FILE as WHOLE
from bridge.formats.safetensors.torch import TorchSink, TorchSource, lay_out, source_of
from bridge.graph import Form, State
from bridge.strict_json import parse_object

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLE = "adapter_model.bin"
MAX_CONFIG = 1 << 20


def claims(location: Location) -> bool:
    """Whether the path is a directory with the config or the weights of an adapter."""
    names = set(location.names())
    # a config beside a whole model tells the scale of the LoRA in it
    return bool({FILE, PICKLE} & names) or (CONFIG in names and WHOLE not in names)


def open_peft(location: Location) -> TorchSource:
    """Open the directory of an adapter; ``metadata["adapter_config.json"]`` is its config.

    Raises:
        SourceRefused: a file is missing or damaged, or the weights are pickled.
    """
    names = location.names()
    if location.local is None:
        raise SourceRefused(
            Problem(f"{location}: adapters can be read from local disk only", "download it first")
        )
    if FILE not in names and PICKLE in names:
        raise SourceRefused(pickle_problem(str(location / PICKLE)))
    for name in (FILE, CONFIG):
        if name not in names:
            raise SourceRefused(Problem(f"{location}: {name} is missing", "copy the adapter again"))
    stamps = take_stamps([location.local / CONFIG])
    text = (location / CONFIG).read_bytes(MAX_CONFIG) or b""
    try:
        config = parse_object(text)
    except ValueError as error:
        raise SourceRefused(
            Problem(f"{location / CONFIG} is damaged: {error}", "copy the adapter again")
        ) from error
    source = source_of(location, location, [location.local / FILE], None)
    metadata = {**source.metadata, CONFIG: config}
    return replace(source, metadata=metadata, format="peft", stamps={**source.stamps, **stamps})


def create(
    directory: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], zeros: Collection[str]
) -> TorchSink:
    """Lay out ``adapter_model.safetensors`` in a directory; the config is written separately."""
    return lay_out(directory / FILE, specs, metadata, zeros)


FORMAT = Format(
    name="peft",
    states=(State(name="peft-adapter", contents="lora", format="peft", form=Form.ADAPTER),),
    claims=claims,
    open=open_peft,
    create=create,
)
