"""One weight applied to an input, by the two runtimes' own equations, in the two frameworks.

On the JAX side the einsum of the runtime, plus the two LoRA einsums of its factoring, with
everything cast to the input's dtype first, as openpi's ``Einsum`` and ``FeedForward`` do
(models/lora.py). On the PyTorch side ``linear``, plus PEFT's ``lora_B(lora_A(x)) * scaling``.
Neither knows of the axis equations that converted the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.compare.sides import SideWeight
from bridge.lora.factors import Matrices
from bridge.rules.equation import Equation
from bridge.torch_arrays import one_thread, tensor

#: tokens that are run in bfloat16
NARROW_TOKENS = 2
#: entries of a weight that are cast at a time
SLAB = 1 << 21


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
    """In bfloat16, as at inference, for the first tokens: (1, narrow tokens, out)."""


def jax_forward(equation: str, x: np.ndarray, weight: SideWeight) -> Outputs:
    """What the JAX runtime computes from the leaf.

    The leaf is taken in slabs along the first of its axes that the output has too, so that
    no whole weight is cast. An einsum sums over none of the output's axes: a slab gives the
    entries that the whole leaf would give there, by the same equation, on fewer columns.
    """
    import jax

    labels, output = _labels(equation)
    axis = next(position for position, label in enumerate(labels) if label in output)
    factors = weight.change
    exact: list[np.ndarray] = []
    narrow: list[np.ndarray] = []
    with jax.default_matmul_precision("highest"), jax.default_device(jax.devices("cpu")[0]):
        for slab in _slabs(weight.w.shape[axis], weight.w.size):
            w = np.ascontiguousarray(weight.w[(*[slice(None)] * axis, slab)])
            equations: tuple[str, ...] = ()
            a, b, scale = None, None, 1.0
            if factors is not None and factors.axes is not None:
                axes = factors.axes
                equations, scale, cut = axes.einsums(equation), factors.scale, axes.equation.left[axis]
                a, b = (
                    factor[tuple(slab if name == cut else slice(None) for name in names)]
                    for factor, names in ((factors.a, axes.a), (factors.b, axes.b))
                )
            results = _einsums()((equation, *equations), x, w, a, b, scale)
            for kept, result in zip((exact, narrow), results, strict=True):
                kept.append(np.asarray(result))
    joined = (np.concatenate(results, output.index(labels[axis])) for results in (exact, narrow))
    return Outputs(*(each.reshape(*each.shape[:2], -1) for each in joined))


def torch_forward(equation: Equation, x: np.ndarray, side: SideWeight) -> Outputs:
    """What PyTorch computes with the tensor.

    The tensor is taken in runs of rows: each gives the outputs that ``linear`` gives there.

    Args:
        equation: of one weight, which arranges ``side.w`` back into the very tensor that was read.
    """
    import torch

    # without the batch's axis: torch has no fast path for three axes in bfloat16
    inputs = torch.from_numpy(x.reshape(x.shape[1], -1))
    few = inputs[:NARROW_TOKENS].bfloat16()
    weight = equation.arrange(side.w)
    exact, narrow = [], []
    matrices = None if side.change is None else side.change.matrices()
    for rows in _slabs(len(weight), weight.size):
        w = tensor(weight[rows])
        exact.append(_linear(inputs, w, matrices, rows))
        narrow.append(_linear(few, w, matrices, rows))
    return Outputs(*(torch.cat(results, -1).numpy()[None] for results in (exact, narrow)))


def _linear(x: Any, w: Any, matrices: Matrices | None, rows: slice) -> Any:
    """Some rows of a module's weight applied as PEFT's ``Linear.forward`` does, in the dtype of x."""
    from torch.nn.functional import linear

    result = linear(x, w.to(x.dtype))
    if matrices is not None:
        a, b = (tensor(matrix).to(x.dtype) for matrix in (matrices.a, matrices.b[rows]))
        result = result + linear(linear(x, a), b) * matrices.scale
    return result.float()


@contextmanager
def runtimes() -> Iterator[None]:
    """Both frameworks imported, and torch kept to one thread, as long as this lasts."""
    _einsums()
    with one_thread():
        yield


@functools.cache
def _einsums() -> Callable[..., Any]:
    """The base einsum and the two of the factors, compiled once for all equations and shapes."""
    import jax
    import jax.numpy as jnp

    def apply(equations: tuple[str, ...], x: Any, w: Any, a: Any, b: Any, scale: Any) -> Any:
        result = jnp.einsum(equations[0], x, w.astype(x.dtype))
        if a is not None:
            lora = jnp.einsum(equations[1], x, a.astype(x.dtype))
            lora = jnp.einsum(equations[2], lora, b.astype(x.dtype))
            result = result + lora * scale
        return result.astype(jnp.float32)

    def both(equations: tuple[str, ...], x: Any, *weights: Any) -> tuple[Any, Any]:
        narrow = x[:, :NARROW_TOKENS].astype(jnp.bfloat16)
        return apply(equations, x.astype(jnp.float32), *weights), apply(equations, narrow, *weights)

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
