"""The library's verbs. ``import bridge`` gives them; nothing heavy is imported before it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge import converters
from bridge.arrays import BFLOAT16, Spec, box
from bridge.checkpoint.checkpoint import open_source, understand
from bridge.checkpoint.leaves import ROOT
from bridge.conversion.job import Plan
from bridge.conversion.plan import plan
from bridge.conversion.run import Progress, Result, run, run_steps
from bridge.errors import CheckpointRefused, Problem, RouteRefused, SourceRefused, refuse_if
from bridge.formats.contract import Source
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import changed

if TYPE_CHECKING:
    import torch


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    progress: Progress | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> Result:
    """Plan a conversion and run it. Options are those of :func:`bridge.plan`.

    Raises:
        Refusal: with every problem found; nothing is written then.
    """
    return run(plan(src, dst, to=to, **options), progress, executor)


class Opened:
    """A checkpoint opened for lazy reading. Use it in a ``with`` statement.

    Attributes:
        specs: shape and dtype of every array, by its stored name (``/``-joined in a pytree).
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.specs: Mapping[str, Spec] = MappingProxyType(dict(source.specs))

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """An array, or rows of it along its first axis: ``read(name, 3)`` is one layer.

        Raises:
            KeyError: there is no such array.
            SourceRefused: it cannot be read.
        """
        return self.source.read(name, rows)


@contextlib.contextmanager
def open(path: str | Path, format: str | None = None) -> Iterator[Opened]:
    """Open a checkpoint of any format; arrays are numpy, bfloat16 ones of ``ml_dtypes``."""
    yield Opened(open_source(Location.parse(path), format))


def load_jax(path: str | Path, **options: Any) -> dict[str, Any]:
    """The pure dict of jax arrays that openpi's ``restore_params`` gives (models/model.py).

    A JAX checkpoint is read as it is; others are converted in memory, with the options of
    :func:`bridge.plan` (``base``, ``rank``, ``lora_alpha``, ``fold``, ``dtype``).

    Raises:
        Refusal: as for a conversion; or options are given for a JAX checkpoint.
    """
    import jax.numpy as jnp

    source = open_source(Location.parse(path))
    checkpoint = understand(source)
    if source.format == converters.ORBAX_BASE.format:
        refuse_if(checkpoint.problems, CheckpointRefused)
        _no_options(source, options)
        leaves = {leaf: source.read(stored) for leaf, stored in checkpoint.stored.items()}
    else:
        arrays = _in_memory(plan(path, None, to=converters.ORBAX_BASE.name, **options))
        leaves = {name.removeprefix(ROOT): array for name, array in arrays.items()}
    tree: dict[str, Any] = {}
    for leaf, array in leaves.items():
        *parents, last = leaf.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(array)
    return tree


def load_torch(path: str | Path, **options: Any) -> dict[str, torch.Tensor]:
    """The state_dict of a policy, from any format that a route leads from to ``torch-merged``.

    A safetensors checkpoint is read as it is; others are converted in memory, with the options
    of :func:`bridge.plan` (``dtype``, ``lora_alpha``, ``layout``, ``base``). Tied weights are
    under both names.

    Raises:
        Refusal: as for a conversion; or options are given for a safetensors checkpoint.
    """
    source = open_source(Location.parse(path))
    if source.format == "torch":
        _no_options(source, options)
        state = {name: _tensor(source.read(name)) for name in source.specs}
        # a file's header may name an alias, and must not replace a tensor by it
        return {alias: state[name] for alias, name in source.metadata.items() if _named(name, state)} | state
    planned = plan(path, None, to="torch-merged", **options)
    state = {name: _tensor(array) for name, array in _in_memory(planned).items()}
    state |= {alias: state[name] for alias, name in planned.output.header.items() if name in state}
    return state


def _no_options(source: Source, options: Mapping[str, Any]) -> None:
    if options:
        raise RouteRefused(
            Problem(
                f"{source.location} is in the form asked for, and is read as it is",
                f"leave out {', '.join(options)}",
            )
        )


def _in_memory(planned: Plan) -> dict[str, np.ndarray]:
    """Carry out a plan without a destination."""
    memory = _Memory({name: np.zeros(spec.shape, spec.dtype) for name, spec in planned.specs.items()})
    run_steps(planned, planned.output, memory, lambda count: None)
    refuse_if(changed(planned.stamps), SourceRefused)
    return memory.arrays


def _named(name: object, state: Mapping[str, object]) -> bool:
    return isinstance(name, str) and name in state


class _Memory:
    """A sink that keeps everything."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def write(self, name: str, array: np.ndarray, at: tuple[int, ...] | None = None) -> None:
        self.arrays[name][box(at or (0,) * array.ndim, array.shape)] = array

    def finish(self) -> None:
        pass


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


__all__ = ["Opened", "convert", "load_jax", "load_torch", "open"]
