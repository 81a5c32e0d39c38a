"""Both factorings against the einsums that their runtimes run, written here by hand, in float64.

Nothing of the library's own algebra is an oracle here: a leaf's factors are applied to an input by the
runtime's einsums, and what comes out is compared with what the library's matrices make of that input.

Labels: B batch, T token, D width, N head, H dim, K group, C k|v or gate|up, F hidden, Y layer; L and r are the
rank, as openpi (models/lora.py) and google-deepmind/gemma (gemma/peft/_einsum_utils.py) call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import Equation, by_role, last_two_axes
from bridge.lora.algebra import blocks_of, compress, dead, join, reduce, split, stack
from bridge.lora.distance import module_error, products
from bridge.lora.factors import Factors
from bridge.rules.equation import Index
from bridge.rules.factoring import RANK, FactorAxes

Array = npt.NDArray[np.float64]

#: primes, no two axes of a leaf alike; the 2 that k|v and gate|up are is no other axis's
SIZES = dict(zip("BTDNHKCFYLr", (1, 23, 13, 5, 17, 7, 2, 19, 3, 11, 11), strict=True))
NAMES = {
    "D": "width", "N": "head", "H": "dim", "K": "group", "C": "choice", "F": "hidden", "Y": "layer",
}  # fmt: skip
RANK_SIZE = SIZES["L"]


@dataclass(frozen=True)
class Case:
    """A leaf, and what its runtime computes with it."""

    axes: Callable[..., FactorAxes]
    text: str
    """The rule's equation."""
    runtime: str
    """The einsum of the whole leaf: placeholders come first in the output."""
    lora: tuple[str, ...]
    """The einsums of its factors: one after the other, or one of both."""

    @property
    def equation(self) -> Equation:
        return Equation.parse(self.text)

    @property
    def factor_axes(self) -> FactorAxes:
        return self.axes(self.equation, ("layer",))

    @property
    def sizes(self) -> dict[str, int]:
        return {name: SIZES[label] for label, name in NAMES.items() if name in self.equation.left}

    @property
    def labels(self) -> tuple[str, str, str]:
        """Of the input, and of both factors."""
        if len(self.lora) == 1:
            x, a, b = self.lora[0].split("->")[0].split(",")
            return x, a, b
        (x, a), (_, b) = (each.split("->")[0].split(",") for each in self.lora)
        return x, a, b

    def shapes(self, rank: int = RANK_SIZE) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes = {**SIZES, "L": rank, "r": rank}
        _, a, b = ((tuple(sizes[label] for label in labels)) for labels in self.labels)
        return a, b

    def input(self, seed: int = 1) -> Array:
        shape = [SIZES[label] for label in self.labels[0]]
        return np.random.default_rng(seed).standard_normal(shape)

    def factors(self, seed: int = 2, rank: int = RANK_SIZE) -> tuple[Array, Array]:
        random = np.random.default_rng(seed)
        a, b = (random.standard_normal(shape) for shape in self.shapes(rank))
        return a, b

    def online(self, x: Array, a: Array, b: Array) -> dict[Index, Array]:
        """The runtime's LoRA term of every weight: (tokens, out)."""
        if len(self.lora) == 1:
            out = np.einsum(self.lora[0], x, a, b, optimize=True)
        else:
            out = np.einsum(self.lora[1], np.einsum(self.lora[0], x, a), b)
        return self.flat(out)

    def flat(self, out: Array) -> dict[Index, Array]:
        """An output by the placeholders' entries, with tokens and the weight's rows as one axis each."""
        count = len(self.equation.placeholders)
        tokens = SIZES["B"] * SIZES["T"]
        return {index: out[index].reshape(tokens, -1) for index in np.ndindex(*out.shape[:count])}

    def inputs(self, x: Array) -> Array:
        return x.reshape(SIZES["B"] * SIZES["T"], -1)


OPENPI = {
    "q": Case(last_two_axes, "head width dim -> (head dim) width",
              "BTD,NDH->BTNH", ("BTD,NDL->BTNL", "BTNL,NLH->BTNH")),
    "kv": Case(last_two_axes, "choice group width dim -> (group dim) width",
               "BTD,CKDH->CBTKH", ("BTD,CKDL->CBTKL", "CBTKL,CKLH->CBTKH")),
    "attn_vec": Case(last_two_axes, "head dim width -> width (head dim)",
                     "BTNH,NHD->BTD", ("BTNH,NHL->BTL", "BTL,NLD->BTD")),
    "gating": Case(last_two_axes, "choice width hidden -> hidden width",
                   "BTD,CDF->CBTF", ("BTD,CDL->CBTL", "CBTL,CLF->CBTF")),
    "linear": Case(last_two_axes, "hidden width -> width hidden",
                   "BTF,FD->BTD", ("BTF,FL->BTL", "BTL,LD->BTD")),
    "q, stacked": Case(last_two_axes, "layer head width dim -> (head dim) width",
                       "BTD,YNDH->YBTNH", ("BTD,YNDL->YBTNL", "YBTNL,YNLH->YBTNH")),
    "kv, stacked": Case(last_two_axes, "layer choice group width dim -> (group dim) width",
                        "BTD,YCKDH->YCBTKH", ("BTD,YCKDL->YCBTKL", "YCBTKL,YCKLH->YCBTKH")),
    "attn_vec, stacked": Case(last_two_axes, "layer head dim width -> width (head dim)",
                              "BTNH,YNHD->YBTD", ("BTNH,YNHL->YBTL", "YBTL,YNLD->YBTD")),
    "gating, stacked": Case(last_two_axes, "layer choice width hidden -> hidden width",
                            "BTD,YCDF->YCBTF", ("BTD,YCDL->YCBTL", "YCBTL,YCLF->YCBTF")),
    "linear, stacked": Case(last_two_axes, "layer hidden width -> width hidden",
                            "BTF,YFD->YBTD", ("BTF,YFL->YBTL", "YBTL,YLD->YBTD")),
    "q, axis 1": Case(last_two_axes, "head layer width dim -> (head dim) width",
                      "BTD,NYDH->YBTNH", ("BTD,NYDL->YBTNL", "YBTNL,NYLH->YBTNH")),
    "attn_vec, axis 1": Case(last_two_axes, "head layer dim width -> width (head dim)",
                             "BTNH,NYHD->YBTD", ("BTNH,NYHL->YBTL", "YBTL,NYLD->YBTD")),
}  # fmt: skip

BY_ROLE = {
    "q": Case(by_role, "head width dim -> (head dim) width", "BTD,NDH->BTNH", ("BTD,Dr,rNH->BTNH",)),
    "q, width first": Case(by_role, "width head dim -> (head dim) width",
                           "BTD,DNH->BTNH", ("BTD,Dr,rNH->BTNH",)),
    "kv": Case(by_role, "choice group width dim -> (group dim) width",
               "BTD,CKDH->CBTKH", ("BTD,Dr,rCKH->CBTKH",)),
    "attn_vec": Case(by_role, "head dim width -> width (head dim)", "BTNH,NHD->BTD", ("BTNH,NHr,rD->BTD",)),
    "gating": Case(by_role, "choice width hidden -> hidden width", "BTD,CDF->CBTF", ("BTD,Dr,rCF->CBTF",)),
    "gating, transposed": Case(by_role, "choice hidden width -> hidden width",
                               "BTD,CFD->CBTF", ("BTD,Dr,rCF->CBTF",)),
    "linear": Case(by_role, "hidden width -> width hidden", "BTF,FD->BTD", ("BTF,Fr,rD->BTD",)),
    "q, stacked": Case(by_role, "layer head width dim -> (head dim) width",
                       "BTD,YNDH->YBTNH", ("BTD,YDr,YrNH->YBTNH",)),
    "kv, stacked": Case(by_role, "layer choice group width dim -> (group dim) width",
                        "BTD,YCKDH->YCBTKH", ("BTD,YDr,YrCKH->YCBTKH",)),
    "attn_vec, stacked": Case(by_role, "layer head dim width -> width (head dim)",
                              "BTNH,YNHD->YBTD", ("BTNH,YNHr,YrD->YBTD",)),
    "gating, stacked": Case(by_role, "layer choice hidden width -> hidden width",
                            "BTD,YCFD->YCBTF", ("BTD,YDr,YrCF->YCBTF",)),
    # MaxText: param_scan_axis 1, of the weights and of both factors
    "q, axis 1": Case(by_role, "width layer head dim -> (head dim) width",
                      "BTD,DYNH->YBTNH", ("BTD,DYr,rYNH->YBTNH",)),
    "kv, axis 1": Case(by_role, "width layer choice group dim -> (group dim) width",
                       "BTD,DYCKH->YCBTKH", ("BTD,DYr,rYCKH->YCBTKH",)),
    "attn_vec, axis 1": Case(by_role, "head layer dim width -> width (head dim)",
                             "BTNH,NYHD->YBTD", ("BTNH,NYHr,rYD->YBTD",)),
    "linear, axis 1": Case(by_role, "hidden layer width -> width hidden",
                           "BTF,FYD->YBTD", ("BTF,FYr,rYD->YBTD",)),
}  # fmt: skip

CASES = {f"openpi: {name}": case for name, case in OPENPI.items()} | {
    f"by role: {name}": case for name, case in BY_ROLE.items()
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

#: weights that share their first factor
SHARING = pytest.mark.parametrize(
    "case", [case for name, case in BY_ROLE.items() if "choice" in case.text],
    ids=[name for name, case in BY_ROLE.items() if "choice" in case.text],
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of matrices this small, torch's threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(found: Array, expected: Array) -> bool:
    """Equal but for the rounding of float64."""
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max())


def change_of(case: Case, a: Array, b: Array) -> dict[Index, Array]:
    """The change of every weight, (out, in), read off what the runtime makes of unit vectors."""
    letters = case.labels[0][2:]
    size = math.prod(SIZES[label] for label in letters)
    units = np.eye(size).reshape(1, size, *(SIZES[label] for label in letters))
    count = len(case.equation.placeholders)
    if len(case.lora) == 1:
        out = np.einsum(case.lora[0], units, a, b, optimize=True)
    else:
        out = np.einsum(case.lora[1], np.einsum(case.lora[0], units, a), b)
    return {index: out[index].reshape(size, -1).T for index in np.ndindex(*out.shape[:count])}


def weight_axes(case: Case) -> FactorAxes:
    return case.factor_axes.of_weight


@EVERY
def test_the_equation_means_what_the_runtime_applies(case: Case) -> None:
    """Or nothing below would be about the weight that is converted."""
    x = case.input()
    w = np.random.default_rng(0).standard_normal(case.equation.leaf_shape(case.sizes))
    online = case.flat(np.einsum(case.runtime, x, w))
    assert len(online) == math.prod(case.sizes[axis] for axis in case.equation.placeholders)
    for index, part in case.equation.slices(w):
        assert close(case.inputs(x) @ case.equation.arrange(part).T, online[index])


@EVERY
def test_shapes(case: Case) -> None:
    assert case.factor_axes.shapes(case.sizes, RANK_SIZE) == case.shapes()


@EVERY
def test_slices_are_views_of_every_weights_factors(case: Case) -> None:
    a, b = case.factors()
    online = case.online(case.input(), a, b)
    seen = {}
    for index, part_a, part_b in case.factor_axes.slices(a, b):
        assert np.shares_memory(part_a, a) and np.shares_memory(part_b, b)
        seen[index] = weight_axes(case).shapes(case.sizes, RANK_SIZE) == (part_a.shape, part_b.shape)
    assert seen == dict.fromkeys(online, True)


@EVERY
def test_split_is_what_the_runtime_computes(case: Case) -> None:
    x, (a, b) = case.input(), case.factors()
    online = case.online(x, a, b)
    for index, part_a, part_b in case.factor_axes.slices(a, b):
        matrix_a, matrix_b = split(weight_axes(case), part_a, part_b)
        assert matrix_a.flags.c_contiguous
        assert close(case.inputs(x) @ matrix_a.T @ matrix_b.T, online[index])


@EVERY
def test_split_ranks(case: Case) -> None:
    """Heads have products of their own in openpi's factoring, and share one in the other."""
    a, b = case.factors()
    own = {"head": SIZES["N"], "group": SIZES["K"]} if case.axes is last_two_axes else {}
    blocks = math.prod(size for axis, size in own.items() if axis in case.equation.right[0])
    for _, part_a, part_b in case.factor_axes.slices(a, b):
        matrix_a, matrix_b = split(weight_axes(case), part_a, part_b)
        assert matrix_a.shape[0] == matrix_b.shape[1] == RANK_SIZE * blocks


def placed(case: Case, matrices: Mapping[Index, tuple[Array, Array]], rank: int) -> tuple[Array, Array]:
    """Leaves filled with matrices of one rank, weight by weight."""
    a, b = (np.full(shape, np.nan) for shape in case.shapes(rank))
    for index, view_a, view_b in case.factor_axes.slices(a, b):
        view_a[...], view_b[...] = join(weight_axes(case), *matrices[index], case.sizes)
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return a, b


def matrices_of(case: Case, rank: int, seed: int = 5) -> dict[Index, tuple[Array, Array]]:
    """Dense matrices for every weight, as PEFT trains them."""
    random = np.random.default_rng(seed)
    out, into = case.equation.of_weight.weight_shape(case.sizes)
    return {
        index: (random.standard_normal((rank, into)), random.standard_normal((out, rank)))
        for index in np.ndindex(*(case.sizes[axis] for axis in case.equation.placeholders))
    }


def groups_of(case: Case) -> list[list[Index]]:
    """Weights that share their first factor: those that differ in what its labels lack."""
    _, a, _ = case.labels
    placeholders = case.equation.placeholders
    has = [next(label for label, name in NAMES.items() if name == axis) in a for axis in placeholders]
    groups: dict[Index, list[Index]] = {}
    for index in np.ndindex(*(case.sizes[axis] for axis in placeholders)):
        groups.setdefault(tuple(n for n, own in zip(index, has, strict=True) if own), []).append(index)
    return list(groups.values())


@EVERY
def test_join_runs_any_matrices(case: Case) -> None:
    """Of any rank, and none of them block diagonal; those that share a factor need the sum of the ranks."""
    rank, x = 3, case.input()
    matrices = matrices_of(case, rank)
    together: dict[Index, tuple[Array, Array]] = {}
    for group in groups_of(case):
        common, seconds = stack([matrices[index] for index in group])
        assert len(common) == (rank if len(group) == 1 else rank * len(group))
        together |= {index: (common, b) for index, b in zip(group, seconds, strict=True)}
    a, b = placed(case, together, len(common))
    online = case.online(x, a, b)
    for index, (matrix_a, matrix_b) in matrices.items():
        assert close(online[index], case.inputs(x) @ matrix_a.T @ matrix_b.T)


@SHARING
def test_stack_keeps_numbers_and_gives_each_weight_its_own_change(case: Case) -> None:
    matrices = matrices_of(case, 3)
    for group in groups_of(case):
        assert len(group) == 2
        common, seconds = stack([matrices[index] for index in group])
        assert common.shape[0] == 6
        for number, (index, wide) in enumerate(zip(group, seconds, strict=True)):
            own = slice(3 * number, 3 * number + 3)
            assert np.array_equal(common[own], matrices[index][0])
            assert np.array_equal(wide[:, own], matrices[index][1])
            assert not np.delete(wide, np.arange(6)[own], axis=1).any()


@SHARING
def test_stack_of_equal_first_factors_stays_as_it_is(case: Case) -> None:
    matrices = matrices_of(case, 3)
    for group in groups_of(case):
        a = matrices[group[0]][0]
        common, seconds = stack([(a.copy(), matrices[index][1]) for index in group])
        assert np.array_equal(common, a)
        assert all(np.array_equal(b, matrices[index][1]) for b, index in zip(seconds, group, strict=True))


@EVERY
def test_blocks_undo_split(case: Case) -> None:
    """Exactly, but for a sum over heads, which lies in the first of them afterwards."""
    x, (a, b) = case.input(), case.factors()
    again_a, again_b = np.full_like(a, np.nan), np.full_like(b, np.nan)
    # weights with a factor in common write it one after the other, the same
    for index, view_a, view_b in case.factor_axes.slices(again_a, again_b):
        parts = {i: (part_a, part_b) for i, part_a, part_b in case.factor_axes.slices(a, b)}
        found = blocks_of(weight_axes(case), *split(weight_axes(case), *parts[index]), case.sizes)
        assert found is not None
        view_a[...], view_b[...], beyond = found
        assert beyond == 0
    assert np.array_equal(again_a, a)
    if case.factor_axes.summed:
        assert case.factor_axes.summed == ("head",)
        online, again = case.online(x, a, b), case.online(x, again_a, again_b)
        assert all(close(again[index], online[index]) for index in online)
    else:
        assert np.array_equal(again_b, b)


@pytest.mark.parametrize("case", [OPENPI["q"], OPENPI["kv"]], ids=["q", "kv"])
def test_blocks_see_what_lies_off_the_diagonal(case: Case) -> None:
    axes, (a, b) = weight_axes(case), case.factors()
    _, part_a, part_b = next(iter(case.factor_axes.slices(a, b)))
    matrix_a, matrix_b = split(axes, part_a, part_b)
    assert blocks_of(axes, matrix_a[:-1], matrix_b[:, :-1], case.sizes) is None
    largest = np.abs(matrix_b).max()
    matrix_b[-1, 0] = largest / 8
    found = blocks_of(axes, matrix_a, matrix_b, case.sizes)
    assert found is not None and found[2] == pytest.approx(1 / 8)


def blocks(case: Case, weight: Array) -> list[Array]:
    """The rows of a weight that have a product of their own: those of each head of q, in openpi's factoring."""
    if case.axes is by_role or case.equation.right[0][0] not in ("head", "group"):
        return [weight]
    return list(weight.reshape(case.sizes[case.equation.right[0][0]], -1, weight.shape[1]))


@EVERY
def test_dead_is_what_no_change_of_either_factor_reaches(case: Case) -> None:
    """Entry by entry of what passes between the einsums: the output moves with neither factor."""
    random, x = np.random.default_rng(3), case.input()
    a, b = case.factors(rank=4)
    _, label_a, label_b = case.labels
    # contracted by each einsum alone: no entry of its own
    summed = {
        label
        for name, label in ((name, label) for label, name in NAMES.items())
        if name in case.factor_axes.summed
    }
    shared = [label for label in label_a if label in label_b and label not in summed]
    sizes = dict(zip(label_a, a.shape, strict=True))
    states = random.integers(0, 4, [sizes[label] for label in shared])

    def at(factor: Array, labels: str, entry: Mapping[str, int]) -> tuple[Any, ...]:
        return tuple(entry.get(label, slice(None)) for label in labels)

    entries = [dict(zip(shared, index, strict=True)) for index in np.ndindex(*states.shape)]
    for entry, state in zip(entries, states.flat, strict=True):
        if state in (0, 1):
            a[at(a, label_a, entry)] = 0
        if state in (0, 2):
            b[at(b, label_b, entry)] = 0
    found = np.broadcast_to(dead(case.factor_axes, a, b), a.shape)
    for entry in entries:
        moves = []
        for which, labels in enumerate((label_a, label_b)):
            change = np.zeros_like((a, b)[which])
            change[at(change, labels, entry)] = 1.5
            pair = (change, b) if which == 0 else (a, change)
            moves += [np.abs(out).max() > 0 for out in case.online(x, *pair).values()]
        part = found[at(found, label_a, entry)]
        assert part.all() if not any(moves) else not part.any()
    assert 0 < np.count_nonzero(found) < found.size


@EVERY
@pytest.mark.parametrize("rank", [1, 5])
def test_reduce_is_the_best_and_says_what_it_costs(case: Case, rank: int) -> None:
    """Against an SVD of the change itself, block by block."""
    a, b = case.factors()
    change = change_of(case, a, b)
    index, part_a, part_b = next(iter(case.factor_axes.slices(a, b)))
    small_a, small_b, error = reduce(weight_axes(case), part_a, part_b, rank)
    assert (small_a.shape, small_b.shape) == weight_axes(case).shapes(case.sizes, rank)
    matrix_a, matrix_b = split(weight_axes(case), small_a, small_b)
    made = matrix_b @ matrix_a
    best = np.concatenate([best_of(block, rank) for block in blocks(case, change[index])])
    assert close(made, best) or np.abs(made - best).max() < 1e-9 * np.abs(best).max()
    lost = np.linalg.norm(change[index] - best) / np.linalg.norm(change[index])
    assert error == pytest.approx(lost, rel=1e-9)
    assert 0.1 < error < 1


def best_of(matrix: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    best: Array = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


@EVERY
def test_reduce_to_what_is_needed_loses_nothing(case: Case) -> None:
    """Factors with columns of zeros, as a larger rank leaves them."""
    a, b = case.factors(rank=3)
    wide_a, wide_b = (np.zeros(shape) for shape in case.shapes(7))
    rank_a, rank_b = (labels.index("r" if "r" in labels else "L") for labels in case.labels[1:])
    wide_a[(slice(None),) * rank_a + (slice(0, 3),)] = a
    wide_b[(slice(None),) * rank_b + (slice(0, 3),)] = b
    change = change_of(case, a, b)
    for index, part_a, part_b in case.factor_axes.slices(wide_a, wide_b):
        small_a, small_b, error = reduce(weight_axes(case), part_a, part_b, 3)
        matrix_a, matrix_b = split(weight_axes(case), small_a, small_b)
        assert error < 1e-14
        assert close(matrix_b @ matrix_a, change[index])
        break


@pytest.mark.parametrize("name", OPENPI)
def test_einsums_are_openpis(name: str) -> None:
    """String for string, those of one weight: with the labels of k|v, gate|up and layers taken out."""
    case = OPENPI[name]

    def of_one(equation: str) -> str:
        return "".join(letter for letter in equation if letter not in "CY")

    expected = tuple(of_one(equation) for equation in case.lora)
    assert case.factor_axes.einsums(of_one(case.runtime)) == expected


@EVERY
def test_einsums_run_every_weight(case: Case) -> None:
    x, (a, b) = case.input(), case.factors()
    runtime = "".join(letter for letter in case.runtime if letter not in "CY")
    first, second = case.factor_axes.einsums(runtime)
    online = case.online(x, a, b)
    for index, part_a, part_b in case.factor_axes.slices(a, b):
        out = np.einsum(second, np.einsum(first, x, part_a), part_b)
        assert close(out.reshape(online[index].shape), online[index])


@pytest.mark.parametrize("axes", [last_two_axes, by_role])
def test_einsums_of_a_runtime_that_has_a_label_l(axes: Callable[..., FactorAxes]) -> None:
    """The rank needs a label of its own: with L for tokens, "BLD,NDH->BLNH" is as good an einsum as any."""
    case = OPENPI["q"] if axes is last_two_axes else BY_ROLE["q"]
    x, (a, b) = case.input(), case.factors()
    first, second = case.factor_axes.einsums("BLD,NDH->BLNH")
    out = np.einsum(second, np.einsum(first, x, a), b)
    assert close(out.reshape(SIZES["B"] * SIZES["T"], -1), case.online(x, a, b)[()])


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@EVERY
def test_products_are_the_change(case: Case) -> None:
    a, b = case.factors()
    change = change_of(case, a, b)
    output = case.equation.right[0]
    for index, part_a, part_b in case.factor_axes.slices(a, b):
        made = np.full([case.sizes[axis] for axis in output] + [change[index].shape[1]], np.nan)
        for rows, entry_b, entry_a in products(weight_axes(case), part_a, part_b):
            made[rows] = (entry_b @ entry_a).numpy().reshape(made[rows].shape)
        assert close(made.reshape(change[index].shape), change[index])


@EVERY
@pytest.mark.parametrize("scale", [1.0, 0.375])
def test_module_error_is_that_of_the_dense_change(case: Case, scale: float) -> None:
    a, b = case.factors()
    change = change_of(case, a, b)
    random = np.random.default_rng(11)
    for index, part_a, part_b in case.factor_axes.slices(a, b):
        matrix_a, matrix_b = split(weight_axes(case), part_a, part_b)
        factors = Factors(weight_axes(case), part_a, part_b, scale)
        wanted = scale * change[index]
        for noise in (0.0, 1e-6, 1.0):
            wrong = scale * matrix_b + noise * random.standard_normal(matrix_b.shape)
            dense = np.linalg.norm(wrong @ matrix_a - wanted) / np.linalg.norm(wanted)
            found = module_error(tensor(matrix_a), tensor(wrong), factors)
            assert found == pytest.approx(dense, rel=1e-5, abs=1e-14)
            assert (found < 1e-14) == (noise == 0)
        break


# What this file must be able to see.


def per_head(case: Case, a: Array, b: Array) -> Array:
    """attn_vec merged head by head, as six of nine public scripts do: (out, in)."""
    merged: Array = np.einsum("NHL,NLD->NHD", a, b).reshape(-1, SIZES["D"]).T
    return merged


def one_head(case: Case, a: Array, b: Array) -> Array:
    """A sum over heads that was forgotten: the first head's alone."""
    merged: Array = b[0].T @ a.reshape(-1, RANK_SIZE).T
    return merged


@pytest.mark.parametrize("mistake", [per_head, one_head])
def test_wrong_merges_of_attn_vec_are_seen(mistake: Callable[[Case, Array, Array], Array]) -> None:
    case = OPENPI["attn_vec"]
    x, (a, b) = case.input(), case.factors()
    online = case.online(x, a, b)[()]
    wrong = case.inputs(x) @ mistake(case, a, b).T
    assert wrong.shape == online.shape
    assert not close(wrong, online)
    assert np.abs(wrong - online).max() > 0.1 * np.abs(online).max()


def test_one_block_of_k_and_v_is_seen() -> None:
    """MaxText's fault: of factors of three axes, those of the first head alone."""
    case = BY_ROLE["kv"]
    x, (a, b) = case.input(), case.factors()
    online = case.online(x, a, b)
    wrong = {(0,): b[:, 0], (1,): b[:, 0]}
    outputs = {index: case.inputs(x) @ a @ part.reshape(RANK_SIZE, -1) for index, part in wrong.items()}
    assert close(outputs[0,], online[0,])
    assert not close(outputs[1,], online[1,])


# Which axes a factor may have.


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
        "choice hidden width -> hidden width",  # openpi never transposes its gating
        "width layer head dim -> (head dim) width",
    ],
)
def test_leaves_that_openpis_factors_do_not_fit(text: str) -> None:
    with pytest.raises(ValueError, match="LoRA"):
        last_two_axes(Equation.parse(text))


@pytest.mark.parametrize("text", ["width -> width", "1 token width -> token width", "layer width -> width"])
def test_leaves_that_have_no_roles(text: str) -> None:
    with pytest.raises(ValueError, match="LoRA"):
        by_role(Equation.parse(text), ("layer",))


def test_a_second_factor_that_weights_share_is_refused() -> None:
    """No runtime has one, and a writer that fills leaves weight by weight would write one over the other."""
    equation = Equation.parse("choice width hidden -> hidden width")
    with pytest.raises(ValueError, match="choice"):
        FactorAxes(equation, ("choice", "width", RANK), (RANK, "hidden"))


def test_axes_that_are_named_twice_are_refused() -> None:
    equation = Equation.parse("width hidden -> hidden width")
    with pytest.raises(ValueError, match="LoRA"):
        FactorAxes(equation, ("width", "width", RANK), (RANK, "hidden"))
    with pytest.raises(ValueError, match="LoRA"):
        FactorAxes(equation, ("width", RANK), (RANK, RANK, "hidden"))


# Any axes at all.


@dataclass(frozen=True)
class Drawn:
    axes: FactorAxes
    sizes: Mapping[str, int]
    rank: int
    seed: int

    @property
    def label(self) -> dict[str, str]:
        names = [*self.axes.equation.left, RANK]
        return dict(zip(names, "abcdefghijklm", strict=False))

    def joined(self, axes: tuple[str, ...]) -> str:
        return "".join(self.label[axis] for axis in axes)

    def factors(self) -> tuple[Array, Array]:
        random = np.random.default_rng(self.seed)
        known = {**self.sizes, RANK: self.rank}
        a, b = ([known[axis] for axis in side] for side in (self.axes.a, self.axes.b))
        return random.standard_normal(a), random.standard_normal(b)

    def change(self, a: Array, b: Array) -> dict[Index, Array]:
        """By the two einsums of a runtime: each contracts the input's axes that its own factor has."""
        axes, equation = self.axes, self.axes.equation
        output, inputs = equation.right
        width = math.prod(self.sizes[axis] for axis in inputs)
        units = np.eye(width).reshape(width, *(self.sizes[axis] for axis in inputs))
        middle = tuple(axis for axis in axes.a if axis not in inputs)
        first = f"z{self.joined(inputs)},{self.joined(axes.a)}->z{self.joined(middle)}"
        result = f"{self.joined(equation.placeholders)}z{self.joined(output)}"
        second = f"z{self.joined(middle)},{self.joined(axes.b)}->{result}"
        out = np.einsum(second, np.einsum(first, units, a), b)
        count = len(equation.placeholders)
        return {index: out[index].reshape(width, -1).T for index in np.ndindex(*out.shape[:count])}


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """A leaf of up to seven axes in any order, and factors that have any of them that they may have."""
    outputs = ("o0", "o1", "o2")[: draw(st.integers(1, 3))]
    inputs = ("i0", "i1")[: draw(st.integers(1, 2))]
    apart = ("p0", "p1")[: draw(st.integers(0, 2))]
    left = draw(st.permutations([*outputs, *inputs, *apart]))
    right = tuple(draw(st.permutations(outputs))), tuple(draw(st.permutations(inputs)))
    shared = [axis for axis in left if draw(st.booleans())]
    a = draw(st.permutations([*(axis for axis in left if axis in inputs or axis in shared), RANK]))
    b = draw(st.permutations([*(axis for axis in left if axis not in inputs or axis in shared), RANK]))
    sizes = dict(zip(left, draw(st.permutations([1, 2, 3, 2, 3, 2, 1])), strict=False))
    axes = FactorAxes(Equation(tuple(left), right), tuple(a), tuple(b))
    return Drawn(axes, sizes, draw(st.integers(1, 3)), draw(st.integers(0, 99)))


def nearly(found: Array, expected: Array) -> bool:
    return found.shape == expected.shape and np.allclose(found, expected, rtol=0, atol=1e-10)


@settings(max_examples=100, deadline=None)
@given(drawn())
def test_any_axes(leaf: Drawn) -> None:
    """split, join, blocks_of, reduce, products and module_error, whatever axes the factors have."""
    axes, sizes = leaf.axes, leaf.sizes
    a, b = leaf.factors()
    change, one = leaf.change(a, b), axes.of_weight
    assert axes.shapes(sizes, leaf.rank) == (a.shape, b.shape)
    assert {index for index, _, _ in axes.slices(a, b)} == change.keys()
    for index, part_a, part_b in axes.slices(a, b):
        matrix_a, matrix_b = split(one, part_a, part_b)
        assert nearly(matrix_b @ matrix_a, change[index])
        joined = join(one, matrix_a, matrix_b, sizes)
        assert nearly(product(one, *joined), change[index])
        found = blocks_of(one, matrix_a, matrix_b, sizes)
        assert found is not None and found[2] == 0 and found[0].shape == part_a.shape
        assert nearly(product(one, *found[:2]), change[index])
        small_a, small_b, error = reduce(one, part_a, part_b, leaf.rank)
        assert error < 1e-7
        assert nearly(product(one, small_a, small_b), change[index])
        output, width = one.equation.right[0], change[index].shape[1]
        made = np.full([*(sizes[axis] for axis in output), width], np.nan)
        for rows, entry_b, entry_a in products(one, part_a, part_b):
            made[rows] = (entry_b @ entry_a).numpy().reshape(made[rows].shape)
        assert nearly(made.reshape(change[index].shape), change[index])
        factors = Factors(one, part_a, part_b, 0.5)
        assert module_error(tensor(matrix_a), tensor(0.5 * matrix_b), factors) < 1e-12


def product(axes: FactorAxes, a: Array, b: Array) -> Array:
    """The change of one weight by a runtime's einsums."""
    sizes = dict(zip(axes.a, a.shape, strict=True)) | dict(zip(axes.b, b.shape, strict=True))
    return Drawn(axes, sizes, sizes[RANK], 0).change(a, b)[()]


@settings(max_examples=100, deadline=None)
@given(drawn(), st.randoms(use_true_random=False))
def test_any_einsum(leaf: Drawn, random: Any) -> None:
    """The two that are derived from a runtime's own, with its labels in any order."""
    one = leaf.axes.of_weight
    output, inputs = one.equation.right
    letters = random.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", len(one.equation.left) + 2)
    label = dict(zip(one.equation.left, letters[2:], strict=True))
    batch, token = letters[:2]
    x, w, out = ("".join(label[axis] for axis in side) for side in (inputs, one.equation.left, output))
    first, second = one.einsums(f"{batch}{token}{x},{w}->{batch}{token}{out}")
    a, b = leaf.factors()
    _, part_a, part_b = next(iter(leaf.axes.slices(a, b)))
    given = np.random.default_rng(0).standard_normal((2, 3, *(leaf.sizes[axis] for axis in inputs)))
    found = np.einsum(second, np.einsum(first, given, part_a), part_b)
    expected = given.reshape(6, -1) @ product(one, part_a, part_b).T
    assert nearly(found.reshape(6, -1), expected)


def test_compress_of_stacked_second_factors_is_the_best_of_both() -> None:
    """What a leaf of one `a` can keep of k and v: the best of their changes, one above the other."""
    case = BY_ROLE["kv"]
    matrices = list(matrices_of(case, 5).values())
    common, seconds = stack(matrices)
    tall = np.concatenate([b @ a for a, b in matrices])
    small_a, small_b, error = compress(common, np.concatenate(seconds), 4)
    best = best_of(tall, 4)
    assert np.abs(small_b @ small_a - best).max() < 1e-10 * np.abs(best).max()
    assert error == pytest.approx(np.linalg.norm(tall - best) / np.linalg.norm(tall), rel=1e-9)
