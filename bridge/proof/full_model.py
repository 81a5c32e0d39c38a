"""The whole model in a runtime of its own, on a recorded input.

A reference file is an ``.npz`` with an input and what the JAX runtime computed from it; which
arrays it must have is the family's to say (:class:`bridge.rules.family.FullModel`).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import numpy as np

from bridge.compare.sides import Side
from bridge.errors import Problem, Refusal, refuse_if
from bridge.rules.family import FullModel


def runnable(dst: str | Path, side: Side) -> FullModel:
    """The runtime that runs a side's whole model.

    Raises:
        Refusal: there is none for its model, for a pytree, or for an adapter that names modules of
            another layout's network; or it is not installed, or too old.
    """
    family, model = side.inputs.weights.family, side.inputs.model.name
    known = next((each for each in family.full_models if model in each.models), None)
    if known is None or side.in_jax:
        able = [f"{', '.join(sorted(each.models))} in {each.runtime}" for each in family.full_models]
        raise Refusal(
            Problem(
                f"{dst} is {model} as {side.checkpoint.state}, which no runtime here runs as a whole "
                f"(from PyTorch weights: {'; '.join(able) or 'none'})",
                "convert it to torch-merged, or leave --full-model out",
            )
        )
    layout = side.checkpoint.layout
    if side.inputs.base is not None and layout.name != known.layout:
        raise Refusal(
            Problem(
                f"{dst} is an adapter for the modules of {layout.name}, but {known.runtime} names its own",
                f"convert it with --layout {known.layout}, or leave --full-model out",
            )
        )
    needs = (*known.needs, *(("peft",) if side.inputs.base is not None else ()))
    refuse_if((problem for need in needs for problem in _absent(need)), Refusal)
    return known


def _absent(need: str) -> Iterator[Problem]:
    """The problem of a ``module:name`` that cannot be imported, if it cannot."""
    package, _, name = need.partition(":")
    try:
        module = import_module(package)
        if not name or hasattr(module, name):
            return
        cause = f"--full-model needs {name}, which {package} {getattr(module, '__version__', '')} lacks"
        yield Problem(cause, f"install a newer {package}, or leave --full-model out")
    except ImportError as error:
        cause = f"--full-model needs {package}, which cannot be imported: {error}"
        yield Problem(cause, f"install {package}, or leave --full-model out")


def read_recording(full: FullModel, reference: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a recording. Raises Refusal: it is no recording, or lacks an array."""
    recorded = _recorded(reference)
    if missing := sorted(full.inputs - recorded.keys()):
        raise Refusal(Problem(f"{reference} lacks {', '.join(missing)}", full.record_with))
    return recorded


def compare_outputs(
    full: FullModel, dst: str | Path, side: Side, recorded: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], list[Problem]]:
    """Run the destination in float32, and compare its output with the recorded one.

    Raises:
        Refusal: the runtime does not load all weights.
    """
    allowed = full.allowed
    if any(spec.dtype.itemsize < 4 for spec in side.inputs.weights.source.specs.values()):
        allowed = full.allowed_narrow
    directory = Path(dst if side.inputs.base is None else str(side.inputs.base.source.root))
    model, problem = full.load(directory, recorded)
    if problem is not None:
        raise Refusal(problem)
    if side.inputs.base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, dst).base_model.model
    gap = np.abs(full.run(model, recorded) - recorded[full.output])
    figures = {"max_abs": float(gap.max()), "mean_abs": float(gap.mean()), "allowed": allowed}
    if figures["max_abs"] <= allowed:
        return figures, []
    return figures, [
        Problem(
            f"{dst}: its {full.output} differ from the recorded ones by {figures['max_abs']:.1e} "
            f"({allowed:.0e} allowed)",
            f"the modules above say where; without any, the reference is of another {side.inputs.weights.family.noun}",
        )
    ]


def _recorded(reference: str | Path) -> dict[str, np.ndarray]:
    try:
        # without pickles, which is numpy's default
        with np.load(reference, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise Refusal(
            Problem(f"{reference} is not a recording: {error}", "record it again, as an .npz")
        ) from error
