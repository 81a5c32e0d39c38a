"""The parameters of a flax nnx module by leaf path, as a ``params`` pytree names them: ``llm/layers/…/w``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.arrays import Spec

if TYPE_CHECKING:
    from flax import nnx


def parameters(module: nnx.Module) -> dict[str, Spec]:
    """Shape and dtype of every parameter of a module, abstract ones (``nnx.eval_shape``) included."""
    import jax

    specs: dict[str, Spec] = {}

    def look(leaf: str, variable: Any) -> Any:
        # a Variable without an array is a parameter that the module goes without
        for array in jax.tree.leaves(variable):
            specs[leaf] = Spec(tuple(array.shape), np.dtype(array.dtype))
        return variable

    _replace(_state(module), look)
    return specs


def assign(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Set parameters of a module, by leaf path."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    state = _state(module)
    _replace(
        state,
        lambda leaf, variable: (
            jax.tree.map(lambda _: jnp.asarray(arrays[leaf]), variable) if leaf in arrays else variable
        ),
    )
    nnx.update(module, state)


def _state(module: nnx.Module) -> MutableMapping[Any, Any]:
    from flax import nnx

    state: MutableMapping[Any, Any] = nnx.state(module, nnx.Param)
    return state


def _replace(
    state: MutableMapping[Any, Any], change: Callable[[str, Any], Any], path: tuple[str, ...] = ()
) -> None:
    """Replace every variable of a state: a mapping in every version of flax, whatever its class."""
    for key in list(state):
        inner = (*path, str(key))
        value = state[key]
        if isinstance(value, MutableMapping):
            _replace(value, change, inner)
        else:
            state[key] = change("/".join(inner), value)
