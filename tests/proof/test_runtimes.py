"""openpi's equations on fewer columns, PyTorch's on runs of rows: the same as on whole arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from bridge.compare.sides import SideWeight
from bridge.lora.factors import Factors, Matrices
from bridge.proof import runtimes
from bridge.proof.runtimes import jax_forward, torch_forward
from bridge.rules.equation import Equation
from bridge.rules.factoring import last_two_axes
from tests.kit.algebra import restore


@dataclass(frozen=True)
class Einsums:
    """How openpi applies a weight (models/lora.py, gemma.py), and the axes that bridge declares for it."""

    lora: tuple[str, str]
    axes: str
    sizes: dict[str, int]


EQUATIONS = {
    "BTD,NDH->BTNH": Einsums(
        ("BTD,NDL->BTNL", "BTNL,NLH->BTNH"), "N D H -> (N H) D", {"D": 7, "N": 5, "H": 3}
    ),
    "BSD,KDH->BSKH": Einsums(
        ("BSD,KDL->BSKL", "BSKL,KLH->BSKH"), "K D H -> (K H) D", {"D": 7, "K": 1, "H": 3}
    ),
    "BTNH,NHD->BTD": Einsums(
        ("BTNH,NHL->BTL", "BTL,NLD->BTD"), "N H D -> D (N H)", {"D": 11, "N": 5, "H": 3}
    ),
    "BTD,DF->BTF": Einsums(("BTD,DL->BTL", "BTL,LF->BTF"), "D F -> F D", {"D": 7, "F": 13}),
    "BTF,FD->BTD": Einsums(("BTF,FL->BTL", "BTL,LD->BTD"), "F D -> D F", {"D": 13, "F": 7}),
}


def drawn(equation: str, rank: int = 2) -> tuple[np.ndarray, np.ndarray, Factors]:
    """An input, a weight and its factors."""
    random, sizes = np.random.default_rng(3), EQUATIONS[equation].sizes
    x, weight = equation.split("->")[0].split(",")
    shape = [sizes[label] for label in weight]
    a = random.standard_normal([*shape[:-1], rank], np.float32)
    b = random.standard_normal([*shape[:-2], rank, shape[-1]], np.float32)
    w = random.standard_normal(shape, np.float32)
    inputs = random.standard_normal([1, 5, *(sizes[label] for label in x[2:])], np.float32)
    return inputs, w, Factors(last_two_axes(Equation.parse(EQUATIONS[equation].axes)), a, b, 1.5)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("slab", [1, 40, 1 << 20])
def test_slabs_compute_what_the_whole_leaf_does(
    equation: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By openpi's three einsums on whole arrays, in float64."""
    monkeypatch.setattr(runtimes, "SLAB", slab)
    x, w, factors = drawn(equation)
    first, second = EQUATIONS[equation].lora
    expected = np.einsum(equation, x, w, dtype=np.float64) + 1.5 * np.einsum(
        second, np.einsum(first, x, factors.a, dtype=np.float64), factors.b, dtype=np.float64
    )
    outputs = jax_forward(equation, x, SideWeight(w, factors))
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
    leaf = restore(equation, tensor, {"head": 5, "dim": 3, "in": 7})
    expected = x.astype(np.float64) @ (tensor + 1.5 * (b.astype(np.float64) @ a)).T
    outputs = torch_forward(equation, x, SideWeight(leaf, Matrices(a, b, 1.5)))
    np.testing.assert_allclose(outputs.exact, expected, atol=2e-6 * np.abs(expected).max())
    few = expected[:, : runtimes.NARROW_TOKENS]
    np.testing.assert_allclose(outputs.narrow, few, atol=0.03 * np.abs(few).max())
