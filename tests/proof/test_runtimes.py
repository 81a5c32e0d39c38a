"""openpi's equations on fewer columns, PyTorch's on runs of rows: the same as on whole arrays."""

from __future__ import annotations

import numpy as np
import pytest

from bridge.compare.sides import Held
from bridge.proof import runtimes
from bridge.proof.runtimes import jax_forward, torch_forward
from bridge.rules.equation import Equation
from bridge.stream.readers import Factors, Matrices

EQUATIONS = {
    "BTD,NDH->BTNH": {"D": 7, "N": 5, "H": 3},
    "BSD,KDH->BSKH": {"D": 7, "K": 1, "H": 3},
    "BTNH,NHD->BTD": {"D": 11, "N": 5, "H": 3},
    "BTD,DF->BTF": {"D": 7, "F": 13},
    "BTF,FD->BTD": {"D": 13, "F": 7},
}


def drawn(equation: str, sizes: dict[str, int], rank: int = 2) -> tuple[np.ndarray, Held]:
    random = np.random.default_rng(3)
    x, weight = equation.split("->")[0].split(",")
    shape = [sizes[label] for label in weight]
    a = random.standard_normal([*shape[:-1], rank], np.float32)
    b = random.standard_normal([*shape[:-2], rank, shape[-1]], np.float32)
    w = random.standard_normal(shape, np.float32)
    inputs = random.standard_normal([1, 5, *(sizes[label] for label in x[2:])], np.float32)
    return inputs, Held(w, Factors(a, b, 1.5))


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("slab", [1, 40, 1 << 20])
def test_slabs_compute_what_the_whole_leaf_does(
    equation: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By openpi's three einsums on whole arrays, in float64."""
    monkeypatch.setattr(runtimes, "SLAB", slab)
    x, held = drawn(equation, EQUATIONS[equation])
    assert held.factors is not None
    first, second = runtimes.lora_equations(equation)
    expected = np.einsum(equation, x, held.w, dtype=np.float64) + 1.5 * np.einsum(
        second, np.einsum(first, x, held.factors.a, dtype=np.float64), held.factors.b, dtype=np.float64
    )
    outputs = jax_forward(equation, x, held)
    flat = expected.reshape(1, 5, -1)
    np.testing.assert_allclose(outputs.exact, flat, atol=2e-6 * np.abs(flat).max())
    few = flat[:, : runtimes.NARROW_TOKENS]
    np.testing.assert_allclose(outputs.narrow, few, atol=0.03 * np.abs(few).max())
    assert np.abs(outputs.narrow - few).max() > 1e-4, "not in bfloat16"


@pytest.mark.parametrize("slab", [1, 40, 1 << 20])
def test_runs_of_rows_compute_what_the_whole_tensor_does(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "SLAB", slab)
    random = np.random.default_rng(4)
    tensor, a, b = (random.standard_normal(shape, np.float32) for shape in ((15, 7), (3, 7), (15, 3)))
    x = random.standard_normal((1, 5, 7), np.float32)
    equation = Equation.parse("head in dim -> (head dim) in")
    held = Held(equation.restore(tensor, {"head": 5, "dim": 3, "in": 7}), None, Matrices(a, b, 1.5))
    expected = x.astype(np.float64) @ (tensor + 1.5 * (b.astype(np.float64) @ a)).T
    outputs = torch_forward(equation, x, held)
    np.testing.assert_allclose(outputs.exact, expected, atol=2e-6 * np.abs(expected).max())
    few = expected[:, : runtimes.NARROW_TOKENS]
    np.testing.assert_allclose(outputs.narrow, few, atol=0.03 * np.abs(few).max())
