"""One weight applied to an input, by the two runtimes' own equations, in the two frameworks.

On the JAX side openpi's ``Einsum`` and ``FeedForward`` (models/lora.py): the base einsum plus two
LoRA einsums whose labels are replaced as ``_make_lora_eqns`` does it, with everything cast to the
input's dtype first. On the PyTorch side ``linear``, plus PEFT's ``lora_B(lora_A(x)) * scaling``.
Neither knows of the axis equations that converted the weight.
"""

from __future__ import annotations

import numpy as np

from bridge.axes import Equation
from bridge.sides import Held
from bridge.specs import BFLOAT16

#: openpi's label of the rank
_RANK = "L"


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


def jax_forward(equation: str, x: np.ndarray, held: Held, dtype: str) -> np.ndarray:
    """What openpi computes from the leaf: (1, tokens, …), float32."""
    import jax
    import jax.numpy as jnp

    with jax.default_matmul_precision("highest"), jax.default_device(jax.devices("cpu")[0]):
        inputs = jnp.asarray(x, dtype)
        result = jnp.einsum(equation, inputs, jnp.asarray(held.w, dtype))
        if held.factors is not None:
            first, second = lora_equations(equation)
            middle = jnp.einsum(first, inputs, jnp.asarray(held.factors.a, dtype))
            result = (
                result + jnp.einsum(second, middle, jnp.asarray(held.factors.b, dtype)) * held.factors.scale
            )
        return np.asarray(result.astype(jnp.float32))


def torch_forward(equation: Equation, x: np.ndarray, held: Held, dtype: str) -> np.ndarray:
    """What PyTorch computes with the tensor: (1, tokens, out), float32.

    Args:
        equation: of one weight, which arranges ``held.w`` back into the very tensor that was read.
    """
    import torch
    from torch.nn.functional import linear

    kind = getattr(torch, dtype)
    inputs = torch.from_numpy(x.reshape(*x.shape[:2], -1)).to(kind)
    result = linear(inputs, _tensor(equation.arrange(held.w)).to(kind))
    if held.matrices is not None:
        lora_a, lora_b = _tensor(held.matrices.a).to(kind), _tensor(held.matrices.b).to(kind)
        result = result + linear(linear(inputs, lora_a), lora_b) * held.matrices.scale
    return np.asarray(result.float().numpy())


def _tensor(array: np.ndarray) -> torch.Tensor:  # type: ignore[name-defined]  # noqa: F821
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
