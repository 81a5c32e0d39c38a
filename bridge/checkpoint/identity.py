"""Which base an adapter is for: a fingerprint of its weights, and how another base compares with it.

A fingerprint is a few values of one weight of every leaf: of the corner of the first layer's, so that
they lie near the beginning of a leaf, where a compressed stream is decoded from. Weights and positions
are those of the PyTorch model, and values are float32, so that a base has one fingerprint in every
format, layout and dtype. Not seen are changes outside the corners, such as those of later layers alone.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.arrays import BFLOAT16, FLOAT16, FLOAT32
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.inputs import Inputs
from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.publish.record import read_record
from bridge.rules.model import Bound
from bridge.rules.names import grouped
from bridge.strict_json import parse_object

#: of an adapter's record, and of its file's header, which is still there where the record was left behind
KEY = "base_identity"
#: entries of a fingerprint in a record, where it was not written by bridge
MAX_WEIGHTS = 4096
#: values of a vector, and of a matrix: along its first axis and its last
VECTOR, ROWS, COLUMNS = 32, 4, 8
#: float32's own last bits, where two programs computed the same weight
ROUNDING = 1e-6
#: the relative error of one rounding to bfloat16, and one to float16 before it
NARROW = 2**-8 + 2**-11


@dataclass(frozen=True)
class Fingerprint:
    """Values of one weight of every leaf, by its name in the rules."""

    model: str
    samples: Mapping[str, np.ndarray]
    """float32, one axis."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Fingerprint:
        """Of a checkpoint's weights, without its LoRA factors. Reads the beginnings of its arrays."""
        samples = {}
        for bound in _first_bounds(checkpoint):
            sampled = checkpoint.corner(bound, corner)
            if sampled is not None:
                samples[sampled[0]] = sampled[1].astype(FLOAT32)
        return cls(checkpoint.model.name, samples)

    def text(self) -> str:
        """As JSON: values in little-endian base64."""
        samples = {
            name: base64.b64encode(values.astype("<f4").tobytes()).decode()
            for name, values in self.samples.items()
        }
        return json.dumps({"model": self.model, "samples": samples})


def recorded(source: Source) -> Fingerprint | None:
    """The fingerprint in an adapter's header or record; None where there is none that can be read."""
    entry = source.metadata.get(KEY)
    try:
        stored: Any = (
            parse_object(entry.encode()) if isinstance(entry, str) else read_record(source.root)[KEY]
        )
        samples = {
            str(name): np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(FLOAT32)
            for name, text in stored["samples"].items()
        }
        if len(samples) > MAX_WEIGHTS or not isinstance(stored["model"], str):
            return None
        return Fingerprint(stored["model"], samples)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        return None


def header_of(inputs: Inputs) -> dict[str, str]:
    """The entry in the header of an adapter that tells its base: the source's weights, or what it recorded."""
    known = (
        Fingerprint.of(inputs.source)
        if inputs.source.contents != "lora"
        else recorded(inputs.source.source) or (None if inputs.base is None else Fingerprint.of(inputs.base))
    )
    return {} if known is None else {KEY: known.text()}


@dataclass(frozen=True)
class Distance:
    """How far a base is from the one an adapter was made for."""

    compared: int
    differing: Mapping[str, float]
    """Weight -> norm of the difference of its sampled values over their norm."""

    def __str__(self) -> str:
        names = grouped(self.differing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"{len(self.differing)} of {self.compared} sampled weights differ, relative up to "
            f"{max(self.differing.values()):.1e}: {', '.join(names[:3])}{more}"
        )


def distance(adapter: Checkpoint, base: Checkpoint) -> Distance | None:
    """How far a base is from an adapter's own, by the weights that the adapter does not bring itself.

    Returns None where the adapter records no base.
    """
    ours = recorded(adapter.source)
    if ours is None:
        return None
    theirs = Fingerprint.of(base).samples
    common = {
        name: (values, theirs[name])
        for name, values in ours.samples.items()
        if name in theirs and name not in adapter.stored and values.shape == theirs[name].shape
    }
    gaps = {name: gap(a, b) for name, (a, b) in common.items()}
    return Distance(len(common), {name: far for name, far in gaps.items() if far})


def identity_problems(inputs: Inputs, *, allowed: bool) -> tuple[list[Problem], list[str]]:
    """What speaks against a base that is another than an adapter's own; a note instead where that is allowed."""
    assert inputs.base is not None
    far = distance(inputs.source, inputs.base)
    if far is None or not far.differing:
        return [], []
    here, there = inputs.source.source.location, inputs.base.source.location
    if allowed:
        return [], [f"{there} is not the base that the adapter was made for: {far}"]
    return [
        Problem(
            f"{there} is not the base that {here} was made for: {far}",
            "give its own with --base, or apply it to this one all the same with --base-differs",
        )
    ], []


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """How far two samples are apart; 0 where they are the same weights, one of them rounded."""
    if _same(a, b):
        return 0.0
    with np.errstate(all="ignore"):
        far = float(np.linalg.norm(a - b) / max(np.linalg.norm(a), np.finfo(FLOAT32).tiny))
    return far if np.isfinite(far) else float("inf")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if np.array_equal(a, b, equal_nan=True):
        return True
    with np.errstate(all="ignore"):
        narrow = [
            dtype
            for dtype in (BFLOAT16, FLOAT16)
            if any(np.array_equal(each.astype(dtype).astype(FLOAT32), each) for each in (a, b))
        ]
        if any(np.array_equal(a.astype(dtype), b.astype(dtype)) for dtype in narrow):
            return True
        allowed = (
            NARROW * np.maximum(abs(a), abs(b)) if len(narrow) == 2 else ROUNDING * abs(a).max(initial=0)
        )
        return bool((abs(a - b) <= allowed).all())


def corner(shape: tuple[int, ...]) -> np.ndarray:
    """The positions sampled of a weight of a shape: (count, axes)."""
    size = [1] * len(shape)
    if len(shape) == 1:
        size = [min(VECTOR, shape[0])]
    elif shape:
        size[0], size[-1] = min(ROWS, shape[0]), min(COLUMNS, shape[-1])
    return np.argwhere(np.ones(size, bool)).reshape(-1, len(shape))


def _first_bounds(checkpoint: Checkpoint) -> Iterator[Bound]:
    """The first leaf of every rule, with its sizes: leaves of later layers are left out."""
    model = checkpoint.model
    for part in model.parts:
        sizes = model.local_sizes(part, checkpoint.sizes)
        for rule in part.rules:
            if all(axis in sizes for axis in (*rule.path.axes, *rule.equation.placeholders)):
                yield Bound(part, next(iter(rule.bind(sizes))), sizes)
