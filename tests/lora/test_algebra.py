"""LoRA algebra, held against what openpi computes at run time, in float64."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.lora.algebra import delta, factor_axes, factor_shapes, scaling
from bridge.rules.equation import Equation

#: (rule's equation, openpi's einsum of a layer): models/gemma.py. "C" stands for its 2 (k|v) and 3 (q|k|v).
EINSUMS = {
    "q": ("layer head width dim -> (head dim) width", "BTD,NDH->BTNH"),
    "kv": ("layer kv group width dim -> (group dim) width", "BSD,CKDH->CBSKH"),
    "qkv": ("layer qkv head width dim -> (head dim) width", "BSD,CKDH->CBSKH"),
    "attn_vec": ("layer head dim width -> width (head dim)", "BTNH,NHD->BTD"),
    # FeedForward: x @ a @ b of each branch, and of the way back
    "gating": ("layer branch width hidden -> hidden width", "BTD,CDF->CBTF"),
    "linear": ("layer hidden width -> width hidden", "BTF,FD->BTD"),
}
#: sizes of the labels of the einsums; all primes, no two alike, the rank neither
SIZES = dict(zip("BTSDNHKCFL", (2, 3, 5, 17, 7, 11, 13, 19, 23, 29), strict=True))


def lora_einsums(einsum: str) -> tuple[str, str]:
    """openpi's ``Einsum._make_lora_eqns`` (models/lora.py): the factored axes are the last two."""
    match = re.fullmatch(r"(.*),(.*)->(.*)", einsum)
    assert match is not None
    inputs, weight, outputs = match.groups()
    a_label, b_label = weight[-2], weight[-1]
    a_out = outputs.replace(b_label, "L")
    return (
        f"{inputs},{weight.replace(b_label, 'L')}->{a_out}",
        f"{a_out},{weight.replace(a_label, 'L')}->{outputs}",
    )


def labels(einsum: str) -> tuple[str, str]:
    inputs, weight = einsum.split("->")[0].split(",")
    return inputs, weight


@pytest.mark.parametrize("name", EINSUMS)
def test_delta_is_what_openpi_computes_online(name: str) -> None:
    text, einsum = EINSUMS[name]
    generator = np.random.default_rng(7)
    inputs, weight = labels(einsum)
    shape = tuple(SIZES[label] for label in weight)
    shapes = factor_shapes(shape, SIZES["L"])
    a, b = (generator.standard_normal(shape) for shape in shapes)
    w = generator.standard_normal(shape)
    x = generator.standard_normal([SIZES[label] for label in inputs])

    einsum_a, einsum_b = lora_einsums(einsum)
    assert tuple(SIZES[label] for label in labels(einsum_a)[1]) == a.shape
    assert tuple(SIZES[label] for label in labels(einsum_b)[1]) == b.shape
    online = np.einsum(einsum, x, w) + 0.75 * np.einsum(einsum_b, np.einsum(einsum_a, x, a), b)

    # as the runtime folds: the equation of one weight, its placeholders taken out
    equation = Equation.parse(text)
    axes = factor_axes(equation.of_weight)
    change = np.empty((1, *shape))
    slices = zip(equation.slices(change), equation.slices(a[None]), equation.slices(b[None]), strict=True)
    for (_, into), (_, one_a), (_, one_b) in slices:
        into[...] = delta(axes, one_a, one_b)
    np.testing.assert_allclose(np.einsum(einsum, x, w + 0.75 * change[0]), online, rtol=1e-11, atol=1e-9)
    # and of all layers at once
    np.testing.assert_allclose(delta(factor_axes(equation), a[None], b[None]), change, rtol=1e-12, atol=1e-12)


def test_head_by_head_products_are_not_attn_vec() -> None:
    """What six of nine public merges compute; were it the same, the test above would prove nothing."""
    axes = factor_axes(Equation.parse("head dim width -> width (head dim)"))
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((3, 5, 2)), generator.standard_normal((3, 2, 7))
    assert axes.summed == (0,)
    assert not np.allclose(delta(axes, a, b), a @ b)


@pytest.mark.parametrize("name", EINSUMS)
def test_roles_follow_from_the_equation(name: str) -> None:
    equation = Equation.parse(EINSUMS[name][0])
    axes = factor_axes(equation)
    assert (*axes.shared, axes.inner, axes.outer) == equation.left
    assert axes.summed == ((1,) if name == "attn_vec" else ())


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_a_summed_axis_may_be_moved_into_the_first_head(
    layers: int, heads: int, dim: int, width: int, rank: int, seed: int
) -> None:
    """The gauge freedom of attn_vec: b in head 0, zeros elsewhere, is the same function."""
    axes = factor_axes(Equation.parse("layer head dim width -> width (head dim)"))
    generator = np.random.default_rng(seed)
    a = generator.integers(-9, 9, (layers, heads, dim, rank)).astype(np.float64)
    b = generator.integers(-9, 9, (layers, heads, rank, width)).astype(np.float64)
    first = np.zeros_like(b)
    first[:, 0] = b.sum(axis=1)
    np.testing.assert_array_equal(delta(axes, a, b), delta(axes, a, first))


def test_delta_leaves_its_arguments_and_their_dtype() -> None:
    axes = factor_axes(Equation.parse("head dim width -> width (head dim)"))
    a, b = np.ones((2, 3, 1), np.float32), np.ones((2, 1, 5), np.float32)
    product = delta(axes, a, b)
    assert product.dtype == np.float32 and product.shape == (2, 3, 5)
    assert (product == 2).all() and (b == 1).all()


@pytest.mark.parametrize(
    "text",
    [
        "layer width -> width",  # a vector
        "width -> width",
        "1 token width -> token width",
        "rows columns channel width -> width channel rows columns",  # four axes
        "in out -> in out",  # inner is an output
        "layer head width dim -> width (head dim)",  # outer is an input
        "layer out in -> out in",
    ],
)
def test_leaves_that_cannot_carry_factors(text: str) -> None:
    with pytest.raises(ValueError, match="LoRA"):
        factor_axes(Equation.parse(text))


def test_scaling() -> None:
    assert scaling(16, 16.0, rslora=False) == 1.0
    assert scaling(4, 16.0, rslora=False) == 4.0
    assert scaling(4, 16.0, rslora=True) == 8.0
