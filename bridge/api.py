"""The library's verbs. ``import bridge`` gives them; nothing heavy is imported before it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from bridge.arrays import WEIGHT_DTYPES, Spec, all_finite, box
from bridge.checkpoint.open import open_checkpoint, open_source, understand
from bridge.checkpoint.opening import BARE, opening_of
from bridge.checkpoint.options import OpenOptions, alphas_of
from bridge.conversion.job import Job
from bridge.conversion.options import Options
from bridge.conversion.plan import plan
from bridge.conversion.run import Result, run, run_steps
from bridge.conversion.settings import given, read_options
from bridge.errors import (
    CheckpointRefused,
    Problem,
    Refusal,
    RouteRefused,
    SourceRefused,
    ValueRefused,
    refuse_if,
)
from bridge.formats.contract import Source, format_named, states
from bridge.formats.disk.location import Location
from bridge.formats.disk.stamps import changed_files
from bridge.graph import Form
from bridge.nnx_arrays import assign, parameters
from bridge.rules.names import grouped
from bridge.rules.option import declared
from bridge.stream.workers import Progress
from bridge.torch_arrays import tensor

if TYPE_CHECKING:
    import torch
    from flax import nnx


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    progress: Progress | None = None,
    executor: Executor | None = None,
    **options: Unpack[Options],
) -> Result:
    """Convert a checkpoint: plan it, and run the plan.

    Args:
        src (`str` or `Path`): the checkpoint, as for :func:`bridge.plan`.
        dst (`str` or `Path`): the directory to make. It appears whole or not at all.
        to (`str`): the format asked for: ``"torch-merged"``, ``"torch-base"``, ``"peft-adapter"`` or ``"orbax"``.
        progress (`Callable[[int, int], None]`, *optional*): called with the bytes converted, and their total.
        executor (`concurrent.futures.Executor`, *optional*): runs the steps; threads of this process by default.
        **options: the fields of :class:`bridge.Options`, as for :func:`bridge.plan`.

    Returns:
        `Result`: bytes, seconds, peak memory, a checksum and, for an adapter, its proof.

    Raises:
        Refusal: with every problem; nothing is written then.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> result = bridge.convert(sample, "my_model", to="torch-merged", lora_alpha=8)
        >>> result.tensors
        107
    """
    return run(plan(src, dst, to=to, **options), progress, executor)


class Opened:
    """A checkpoint opened for lazy reading, by :func:`bridge.open`.

    Attributes:
        specs (`Mapping[str, Spec]`): shape and dtype of every array, by its stored name (``/``-joined in a
            pytree).
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.specs: Mapping[str, Spec] = MappingProxyType(dict(source.specs))

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """Read an array, or rows of it along its first axis.

        Args:
            name (`str`): a key of ``specs``.
            rows (`slice` or `int`, *optional*): rows without a step; ``read(name, 3)`` is one layer.

        Returns:
            `np.ndarray`: in the dtype stored; bfloat16 is that of ``ml_dtypes``.

        Raises:
            KeyError: there is no such array.
            IndexError: the rows are not in the array, or have a step.
            SourceRefused: it cannot be read.
        """
        return self.source.read(name, rows)


@contextlib.contextmanager
def open(path: str | Path, format: str | None = None) -> Iterator[Opened]:
    """Open a checkpoint of any format. Arrays are read when they are asked for.

    Args:
        path (`str` or `Path`): the checkpoint, as for :func:`bridge.plan`.
        format (`str`, *optional*): its format; detected by default.

    Returns:
        `Opened`: use it in a ``with`` statement.

    Raises:
        SourceRefused: nothing is there, or it is not a recognized checkpoint.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> with bridge.open(sample) as checkpoint:
        ...     name = next(name for name in checkpoint.specs if "attn_vec_einsum/w" in name)
        ...     layer = checkpoint.read(name, 1)
        >>> layer.shape, layer.dtype
        ((8, 16, 64), dtype('float32'))
    """
    yield Opened(open_source(Location.parse(path), format))


def load_jax(path: str | Path, **options: Unpack[Options]) -> dict[str, Any]:
    """Load a policy from any format as a nested dict of jax arrays.

    A JAX checkpoint is read as it is, in the dtypes stored; others are converted in memory.

    Args:
        path (`str` or `Path`): the checkpoint, as for :func:`bridge.plan`.
        **options: of a conversion to ``"orbax"``, as for :func:`bridge.plan`: ``base`` for an adapter, ``rank``,
            ``lora_alpha``, ``fold``, ``dtype``.

    Returns:
        `dict[str, Any]`: nested dicts, with a `jax.Array` for each leaf.

    Raises:
        Refusal: as for a conversion; or options are given for a JAX checkpoint.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> params = bridge.load_jax(sample)
        >>> params["action_in_proj"]["kernel"].shape  # action, width
        (14, 48)
    """
    import jax.numpy as jnp

    tree: dict[str, Any] = {}
    for leaf, array in _leaves(path, options).read().items():
        *parents, last = leaf.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(array)
    return tree


def load_nnx(model: nnx.Module, path: str | Path, **options: Unpack[Options]) -> None:
    """Load a policy from any format into a flax nnx module, in place.

    The module's parameters (``nnx.Param``, LoRA among them) and the checkpoint's leaves must be the same, by
    path and shape. Values are cast to the dtypes that the module has. Other variables are left alone.

    Args:
        model (`nnx.Module`): a module, or an abstract one of ``nnx.eval_shape``, which has arrays afterwards.
        path (`str` or `Path`): the checkpoint, as for :func:`bridge.plan`.
        **options: as for :func:`bridge.load_jax`, without ``dtype``.

    Raises:
        Refusal: with every leaf that is missing, extra or of another shape, or too large for the module's dtype;
            or as for :func:`bridge.load_jax`. The module is unchanged then.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> model = config.model.create(jax.random.key(0))  # doctest: +SKIP
        >>> bridge.load_nnx(model, "my_adapter", base="my_base")  # doctest: +SKIP
    """
    if options.get("dtype") is not None:
        raise Refusal(
            Problem("dtype has no effect: leaves are cast to the module's dtypes", "leave dtype out")
        )
    leaves, wanted = _leaves(path, options), parameters(model)
    refuse_if(_mismatches(str(path), leaves.specs, wanted), CheckpointRefused)
    arrays, problems = {}, []
    for leaf, array in leaves.read().items():
        with np.errstate(over="ignore"):
            arrays[leaf] = cast = array.astype(wanted[leaf].dtype, copy=False)
        if not all_finite(cast) and all_finite(array):
            cause = f"{path}: {leaf} has values too large for the module's {wanted[leaf].dtype}"
            problems.append(Problem(cause, "build the module in float32 or bfloat16"))
    refuse_if(problems, ValueRefused)
    assign(model, arrays)


def _mismatches(path: str, specs: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> Iterator[Problem]:
    """Leaves of a checkpoint and parameters of a module that are not the same, grouped."""
    fix = "build the module from the config that the checkpoint was trained with; `bridge inspect` shows its sizes"
    faults: dict[str, list[str]] = {}
    for leaf in wanted.keys() - specs.keys():
        faults.setdefault("is in the module but not in the checkpoint", []).append(leaf)
    for leaf in specs.keys() - wanted.keys():
        faults.setdefault("is in the checkpoint but not in the module", []).append(leaf)
    for leaf in specs.keys() & wanted.keys():
        ours, theirs = list(specs[leaf].shape), wanted[leaf]
        if ours != list(theirs.shape):
            faults.setdefault(
                f"has shape {ours} in the checkpoint but {list(theirs.shape)} in the module", []
            ).append(leaf)
        elif theirs.dtype not in WEIGHT_DTYPES.values():
            faults.setdefault(f"is {theirs.dtype} in the module, not a dtype of weights", []).append(leaf)
    for fault, names in sorted(faults.items()):
        yield from (Problem(f"{path}: leaf {name} {fault}", fix) for name in grouped(sorted(names)))


def load_torch(path: str | Path, **options: Unpack[Options]) -> dict[str, torch.Tensor]:
    """Load a policy as a state_dict, from any format that a route leads from to ``"torch-merged"``.

    A safetensors checkpoint is read as it is, in the dtypes stored; others are converted in memory.

    Args:
        path (`str` or `Path`): the checkpoint, as for :func:`bridge.plan`.
        **options: of a conversion to ``"torch-merged"``, as for :func:`bridge.plan`: ``dtype``, ``lora_alpha``,
            ``layout``, ``base`` for an adapter.

    Returns:
        `dict[str, torch.Tensor]`: tensors on the CPU, by name; tied weights are under both names.

    Raises:
        Refusal: as for a conversion; or options are given for a safetensors checkpoint.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> state = bridge.load_torch(sample, lora_alpha=8, dtype="bfloat16")
        >>> state["action_in_proj.weight"].shape, state["action_in_proj.weight"].dtype  # width, action
        (torch.Size([48, 14]), torch.bfloat16)
    """
    read = read_options(options)
    opening = opening_of(read, alphas_of(read), read["rslora"])
    source = open_source(Location.parse(path), opening=opening)
    if format_named(source.format).form is Form.STATE_DICT and opening != BARE:
        # names as the model has them, without what is left out
        checkpoint = understand(source, opening)
        refuse_if(checkpoint.problems, CheckpointRefused)
        source = checkpoint.source
    if format_named(source.format).form is Form.STATE_DICT:
        _no_options(source, options)
        state = {name: tensor(source.read(name)) for name in source.specs}
        # a file's header may name an alias, and must not replace a tensor by it
        return {alias: state[name] for alias, name in source.metadata.items() if _named(name, state)} | state
    planned = plan(path, None, to=_state(Form.STATE_DICT), **options)
    state = {name: tensor(array) for name, array in _in_memory(planned).items()}
    state |= {alias: state[name] for alias, name in planned.output.header.items() if name in state}
    return state


@dataclass(frozen=True)
class _Leaves:
    """The leaves of a policy, by path in the pytree."""

    specs: Mapping[str, Spec]
    read: Callable[[], dict[str, np.ndarray]]


def _leaves(path: str | Path, options: Options) -> _Leaves:
    """The leaves of a checkpoint of any format; they are read, or converted in memory, when asked for."""
    read = read_options(options)
    opening = opening_of(read, alphas_of(read), read["rslora"])
    checkpoint = open_checkpoint(path, opening=opening)
    source = checkpoint.source
    if format_named(source.format).form is Form.PYTREE:
        refuse_if(checkpoint.problems, CheckpointRefused)
        _no_options(source, options)
        stored = checkpoint.stored
        return _Leaves(
            {leaf: source.specs[name] for leaf, name in stored.items()},
            lambda: {leaf: source.read(name) for leaf, name in stored.items()},
        )
    planned = plan(path, None, to=_state(Form.PYTREE), **options)
    root = planned.inputs.weights.family.tree.root
    return _Leaves(
        {name.removeprefix(root): spec for name, spec in planned.specs.items()},
        lambda: {name.removeprefix(root): array for name, array in _in_memory(planned).items()},
    )


def _state(form: Form) -> str:
    """The state that a model is converted to in memory: the first of its form."""
    return next(state.name for state in states() if state.form is form)


def _no_options(source: Source, options: Options) -> None:
    if extra := [each for each in given(read_options(options)) if each not in declared(OpenOptions)]:
        raise RouteRefused(
            Problem(
                f"{source.location} is already in this form and is read as it is",
                f"leave out {', '.join(extra)}",
            )
        )


def _in_memory(planned: Job) -> dict[str, np.ndarray]:
    """Carry out a plan without a destination."""
    memory = _Memory({name: np.zeros(spec.shape, spec.dtype) for name, spec in planned.specs.items()})
    run_steps(planned, planned.output, memory, lambda count: None)
    refuse_if(changed_files(planned.stamps), SourceRefused)
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


__all__ = ["Opened", "convert", "load_jax", "load_nnx", "load_torch", "open"]
