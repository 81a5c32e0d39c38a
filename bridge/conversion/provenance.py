"""The record of a finished conversion: what goes into its ``bridge.json``.

It contains no time and no path, so that the same conversion gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.identity import KEY
from bridge.conversion.job import Job
from bridge.publish.record import combined, files_in, self_checksum
from bridge.stream.output import Output
from bridge.stream.readers import Done

#: packages whose version can change the bytes of an output
PACKAGES = ("openpi-bridge", "numpy", "ml-dtypes", "tensorstore", "zstandard")


def record_text(job: Job, output: Output, place: Path, done: Iterable[Done], sums: Mapping[str, str]) -> str:
    """The record of one output as JSON; ``place`` contains the rest of the output."""
    done = list(done)
    read = {key: checksum for each in done for key, checksum in each.read.items()}
    drawn = {leaf: asdict(what) for each in done for leaf, what in each.drawn.items()}
    record: dict[str, Any] = {
        "model": job.inputs.model.name,
        "route": [converter.name for converter in job.route],
        "state": str(output.state),
        "loss": job.loss.name.lower(),
        "layout": output.layout.name,
        "dtype": output.dtype,
        "scales": {name: scale.as_json() for name, scale in job.scales.items()},
        "facts": {key: fact.as_json() for key, fact in job.facts.items()},
        "sizes": {axis: size for axis, size in sorted(job.inputs.sizes.items()) if axis != "1"},
        **({KEY: json.loads(output.header[KEY])} if KEY in output.header else {}),
        "sources": {
            key: {
                "format": checkpoint.source.format,
                "state": str(checkpoint.state),
                "value_suffix": checkpoint.suffixed,
                **_left_out(checkpoint),
                "scales": {name: each.as_json() for name, each in job.read_scales.items() if key == "source"},
                "fingerprint": combined({name: sum for (which, name), sum in read.items() if which == key}),
                "arrays": {
                    name: {"dtype": checkpoint.source.specs[name].dtype.name, "checksum": read[which, name]}
                    for which, name in sorted(read)
                    if which == key
                },
            }
            for key, checkpoint in job.inputs.checkpoints.items()
        },
        "checksum": combined(sums),
        "tensors": {
            name: {"dtype": spec.dtype.name, "checksum": sums.get(name, "zeros")}
            for name, spec in output.specs.items()
        },
        "files": {name: xxhash.xxh3_128(data).hexdigest() for name, data in sorted(output.files.items())},
        "container": sorted(files_in(place) - output.files.keys()),
        "outputs": [other.where for other in job.outputs if other.where and not output.where],
        "checksums": "xxh3-128 of the values in little-endian C order",
        "versions": _versions(),
    }
    if job.inputs.resized:
        stored = job.inputs.weights.sizes
        record["resized"] = {
            axis: {"from": stored[axis], "to": length} for axis, length in sorted(job.inputs.resized.items())
        }
    if drawn:
        record["initialised"] = {"seed": job.options["seed"], "leaves": dict(sorted(drawn.items()))}
    record["record"] = self_checksum(record)
    return json.dumps(record, indent=2) + "\n"


def _left_out(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arrays that the user left out, where there are any; they are not read, so that they have no checksum."""
    arrays = checkpoint.left_out.arrays
    return {"left_out": {name: str(spec) for name, spec in sorted(arrays.items())}} if arrays else {}


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions
