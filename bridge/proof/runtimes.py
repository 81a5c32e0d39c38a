"""One weight applied to an input, by the two runtimes' own equations, in the two frameworks.

On the JAX side openpi's ``Einsum`` and ``FeedForward`` (models/lora.py): the base einsum plus two
LoRA einsums whose labels are replaced as ``_make_lora_eqns`` does it, with everything cast to the
input's dtype first. On the PyTorch side ``linear``, plus PEFT's ``lora_B(lora_A(x)) * scaling``.
Neither knows of the axis equations that converted the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.arrays import BFLOAT16
from bridge.compare.sides import Held
from bridge.rules.equation import Equation
from bridge.stream.readers import Matrices

#: openpi's label of the rank
_RANK = "L"
#: tokens that are run in bfloat16
NARROW_TOKENS = 2
#: entries of a weight that are cast at a time
SLAB = 1 << 21


def lora_equations(equation: str) -> tuple[str, str]:
    """The einsums of the two factors: the weight's last label becomes the rank, then the one before."""
    operands, output = equation.split("->")
    x, weight = operands.split(",")
    inner, outer = weight[-2], weight[-1]
    middle = output.replace(outer, _RANK)
    first = f"{x},{weight.replace(outer, _RANK)}->{middle}"
    return first, f"{middle},{weight.replace(inner, _RANK)}->{output}"


def random_input(equation: str, w: np.ndarray, tokens: int, generator: np.random.Generator) -> np.ndarray:
    """An input for a weight, standard normal, float32: (1, tokens, …)."""
    operands, _ = equation.split("->")
    x, weight = operands.split(",")
    sizes = dict(zip(weight, w.shape, strict=True))
    shape = [1, tokens, *(sizes[label] for label in x[2:])]
    return generator.standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class Outputs:
    """What a runtime computes with a weight, float32 arrays."""

    exact: np.ndarray
    """In float32, at highest precision: (1, tokens, out)."""
    narrow: np.ndarray
    """In bfloat16, as policies run, for the first tokens: (1, narrow tokens, out)."""


def jax_forward(equation: str, x: np.ndarray, held: Held) -> Outputs:
    """What openpi computes from the leaf.

    The leaf is taken in slabs along the first of its axes that the output has too, so that
    no whole weight is cast. An einsum sums over none of the output's axes: a slab gives the
    entries that the whole leaf would give there, by the same equation, on fewer columns.
    """
    import jax

    weight, output = _labels(equation)
    axis = next(position for position, label in enumerate(weight) if label in output)
    factors = held.factors
    exact: list[np.ndarray] = []
    narrow: list[np.ndarray] = []
    with jax.default_matmul_precision("highest"), jax.default_device(jax.devices("cpu")[0]):
        for slab in _slabs(held.w.shape[axis], held.w.size):
            at = (*[slice(None)] * axis, slab)
            a = b = None
            if factors is not None:
                # lora_a has the axis unless the rank stands in its place, lora_b always
                a = factors.a if weight[axis] == weight[-1] else factors.a[at]
                b = factors.b[at]
            w = np.ascontiguousarray(held.w[at])
            results = _openpi()(equation, x, w, a, b, 1.0 if factors is None else factors.scale)
            for kept, result in zip((exact, narrow), results, strict=True):
                kept.append(np.asarray(result))
    joined = (np.concatenate(results, output.index(weight[axis])) for results in (exact, narrow))
    return Outputs(*(each.reshape(*each.shape[:2], -1) for each in joined))


def torch_forward(equation: Equation, x: np.ndarray, held: Held) -> Outputs:
    """What PyTorch computes with the tensor.

    The tensor is taken in runs of rows: each gives the outputs that ``linear`` gives there.

    Args:
        equation: of one weight, which arranges ``held.w`` back into the very tensor that was read.
    """
    import torch

    # without the batch's axis: torch has no fast path for three axes in bfloat16
    inputs = torch.from_numpy(x.reshape(x.shape[1], -1))
    few = inputs[:NARROW_TOKENS].bfloat16()
    weight = equation.arrange(held.w)
    exact, narrow = [], []
    for rows in _slabs(len(weight), weight.size):
        w = _tensor(weight[rows])
        exact.append(_linear(inputs, w, held.matrices, rows))
        narrow.append(_linear(few, w, held.matrices, rows))
    return Outputs(*(torch.cat(results, -1).numpy()[None] for results in (exact, narrow)))


def _linear(x: Any, w: Any, matrices: Matrices | None, rows: slice) -> Any:
    """Some rows of a module's weight applied as PEFT's ``Linear.forward`` does, in the dtype of x."""
    from torch.nn.functional import linear

    result = linear(x, w.to(x.dtype))
    if matrices is not None:
        a, b = (_tensor(matrix).to(x.dtype) for matrix in (matrices.a, matrices.b[rows]))
        result = result + linear(linear(x, a), b) * matrices.scale
    return result.float()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch kept to the thread that calls it: its own would only wait for those of the workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def runtimes() -> Iterator[None]:
    """Both frameworks imported, and torch kept to one thread, as long as this lasts."""
    _openpi()
    with one_thread():
        yield


@functools.cache
def _openpi() -> Callable[..., Any]:
    """openpi's ``Einsum.__call__``, compiled once for every equation and shape."""
    import jax
    import jax.numpy as jnp

    def einsum(equation: str, x: Any, w: Any, a: Any, b: Any, scale: Any) -> Any:
        result = jnp.einsum(equation, x, w.astype(x.dtype))
        if a is not None:
            first, second = lora_equations(equation)
            lora = jnp.einsum(first, x, a.astype(x.dtype))
            lora = jnp.einsum(second, lora, b.astype(x.dtype))
            result = result + lora * scale
        return result.astype(jnp.float32)

    def both(equation: str, x: Any, *weights: Any) -> tuple[Any, Any]:
        narrow = x[:, :NARROW_TOKENS].astype(jnp.bfloat16)
        return einsum(equation, x.astype(jnp.float32), *weights), einsum(equation, narrow, *weights)

    return jax.jit(both, static_argnums=0)


def _labels(equation: str) -> tuple[str, str]:
    """The labels of an einsum's weight, and of its output."""
    operands, output = equation.split("->")
    return operands.split(",")[1], output


def _slabs(length: int, entries: int) -> Iterator[slice]:
    """Cut an axis into runs of one length, each of at most SLAB entries of the weight."""
    count = -(-entries // SLAB)
    step = -(-length // count) if count else 1
    return (slice(start, start + step) for start in range(0, length, step))


def _tensor(array: np.ndarray) -> torch.Tensor:  # type: ignore[name-defined]  # noqa: F821
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
