"""LoRA algebra against what openpi computes at run time, in float64."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.lora.algebra import join, split
from bridge.lora.factors import scaling
from bridge.rules.equation import Equation
from bridge.rules.factoring import RANK, last_two_axes
from tests.kit.algebra import openpi_change, restore

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
def test_the_change_is_what_openpi_computes_online(name: str) -> None:
    text, einsum = EINSUMS[name]
    generator = np.random.default_rng(7)
    equation = Equation.parse(text)
    axes = last_two_axes(equation)
    inputs, weight = labels(einsum)
    # the weights of one layer
    sizes = dict(zip(equation.left, (1, *(SIZES[label] for label in weight)), strict=True))
    a, b = (generator.standard_normal(shape) for shape in axes.shapes(sizes, SIZES["L"]))
    w = generator.standard_normal(equation.leaf_shape(sizes))
    x = generator.standard_normal([SIZES[label] for label in inputs])

    einsum_a, einsum_b = lora_einsums(einsum)
    assert tuple(SIZES[label] for label in labels(einsum_a)[1]) == a.shape[1:]
    assert tuple(SIZES[label] for label in labels(einsum_b)[1]) == b.shape[1:]
    added = np.einsum(einsum_b, np.einsum(einsum_a, x, a[0]), b[0])
    online = np.einsum(einsum, x, w[0]) + 0.75 * added

    change = np.full_like(w, np.nan)
    parts = dict(equation.slices(change))
    for index, part_a, part_b in axes.slices(a, b):
        matrix_a, matrix_b = split(axes.of_weight, part_a, part_b)
        parts[index][...] = restore(equation, matrix_b @ matrix_a, sizes)
    np.testing.assert_allclose(np.einsum(einsum, x, (w + 0.75 * change)[0]), online, rtol=1e-11, atol=1e-9)
    # the oracle of other tests is the same
    np.testing.assert_allclose(openpi_change(equation, a, b), change, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in EINSUMS if name not in ("kv", "qkv", "gating")])
def test_the_runtimes_einsums_are_openpis(name: str) -> None:
    """Of one weight: `kv` and its like apply several at once."""
    text, einsum = EINSUMS[name]
    assert last_two_axes(Equation.parse(text)).einsums(einsum) == lora_einsums(einsum)


def test_head_by_head_products_are_not_attn_vec() -> None:
    """What six of nine public merges compute; were it the same, the test above would prove nothing."""
    equation = Equation.parse("head dim width -> width (head dim)")
    axes = last_two_axes(equation)
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((3, 5, 2)), generator.standard_normal((3, 2, 7))
    assert axes.summed == ("head",)
    matrix_a, matrix_b = split(axes, a, b)
    assert not np.allclose(matrix_b @ matrix_a, equation.arrange(a @ b))


@pytest.mark.parametrize("name", EINSUMS)
def test_roles_follow_from_the_equation(name: str) -> None:
    equation = Equation.parse(EINSUMS[name][0])
    axes = last_two_axes(equation)
    *shared, inner, outer = equation.left
    assert axes.a == (*shared, inner, RANK) and axes.b == (*shared, RANK, outer)
    assert axes.summed == (("head",) if name == "attn_vec" else ())
    assert axes.kept == {"q": ("head",), "kv": ("group",), "qkv": ("head",)}.get(name, ())
    # every placeholder is shared: no two weights have a factor in common
    assert axes.placeholders_a == tuple(range(len(equation.placeholders)))


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_a_summed_axis_may_be_moved_into_the_first_head(
    heads: int, dim: int, width: int, rank: int, seed: int
) -> None:
    """The freedom of attn_vec's factors: b in head 0, zeros elsewhere, is the same function."""
    equation = Equation.parse("head dim width -> width (head dim)")
    axes = last_two_axes(equation)
    generator = np.random.default_rng(seed)
    a = generator.integers(-9, 9, (heads, dim, rank)).astype(np.float64)
    b = generator.integers(-9, 9, (heads, rank, width)).astype(np.float64)
    first = np.zeros_like(b)
    first[0] = b.sum(axis=0)
    for ours, moved in zip(split(axes, a, b), split(axes, a, first), strict=True):
        np.testing.assert_array_equal(ours, moved)
    sizes = {"head": heads, "dim": dim, "width": width}
    again_a, again_b = join(axes, *split(axes, a, b), sizes)
    np.testing.assert_array_equal(again_a, a)
    np.testing.assert_array_equal(again_b, first)


def test_split_leaves_its_arguments_and_their_dtype() -> None:
    axes = last_two_axes(Equation.parse("head dim width -> width (head dim)"))
    a, b = np.ones((2, 3, 1), np.float32), np.ones((2, 1, 5), np.float32)
    matrix_a, matrix_b = split(axes, a, b)
    assert matrix_a.dtype == matrix_b.dtype == np.float32
    assert (matrix_b @ matrix_a == 2).all() and (matrix_b @ matrix_a).shape == (5, 6)
    assert (a == 1).all() and (b == 1).all()


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
        last_two_axes(Equation.parse(text))


def test_scaling() -> None:
    assert scaling(16, 16.0, rslora=False) == 1.0
    assert scaling(4, 16.0, rslora=False) == 4.0
    assert scaling(4, 16.0, rslora=True) == 8.0
