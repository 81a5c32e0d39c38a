"""LoRA leaves filled from PEFT's matrices where several weights share a leaf's first factor: k and v, gate and up.

The leaves are run by the einsums of google-deepmind/gemma (gemma/peft/_lora.py), written by hand, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bridge import Equation, Normal, by_role, last_two_axes
from bridge.arrays import Spec
from bridge.lora.factors import Matrices
from bridge.rules.equation import Index
from bridge.rules.factoring import FactorAxes
from bridge.stream.factor_writers import FactorWriter

Array = npt.NDArray[Any]

LAYERS, GROUPS, WIDTH, DIM = 3, 5, 17, 7
SIZES = {"layer": LAYERS, "kv": 2, "group": GROUPS, "width": WIDTH, "dim": DIM}
KV = "layer kv group width dim -> (group dim) width"
RUNTIME = 0.375

EQUATION = Equation.parse(KV)
BY_ROLE = by_role(EQUATION, ("layer",))


Changes = dict[Index, Matrices]


def writer(rank: int, axes: FactorAxes = BY_ROLE, runtime: float = RUNTIME) -> FactorWriter:
    a, b = (Spec(shape, np.dtype(np.float32)) for shape in axes.shapes(SIZES, rank))
    return FactorWriter(
        a="a",
        b="b",
        spec_a=a,
        spec_b=b,
        axes=axes,
        sizes=SIZES,
        runtime=runtime,
        start=Normal(0.01),
        seed=0,
        family="Toy",
    )


def matrices(seed: int, rank: int, scale: float = 1.0) -> Matrices:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rank, WIDTH)), random.standard_normal((GROUPS * DIM, rank))
    return Matrices(a.astype(np.float32), b.astype(np.float32), scale)


def online(a: Array, b: Array, x: Array) -> Array:
    """One layer's LoRA term: C token K H."""
    out: Array = RUNTIME * np.einsum("TD,Dr,rCKH->CTKH", x, a.astype(np.float64), b.astype(np.float64))
    return out


def written(made: Mapping[Index, tuple[Array, Array]], rank: int) -> tuple[Array, Array]:
    """The two factors of the layer that these weights are of, as the writer puts them into its leaves."""
    a, b = np.zeros((WIDTH, rank)), np.zeros((rank, 2, GROUPS, DIM))
    for index, (part_a, part_b) in made.items():
        a[...], b[:, index[1]] = part_a, part_b
    return a, b


def error(changes: Mapping[Index, Matrices], rank: int) -> float:
    """Relative, of what the runtime makes of the factors, against PEFT's forward."""
    made, _ = writer(rank).fitted(changes)
    for part_a, part_b in made.values():
        assert part_a.shape == (WIDTH, rank) and part_b.shape == (rank, GROUPS, DIM)
    firsts = [part_a for part_a, _ in made.values()]
    assert all(np.array_equal(each, firsts[0]) for each in firsts)
    x = np.random.default_rng(1).standard_normal((11, WIDTH))
    out = online(*written(made, rank), x)
    worst = 0.0
    for number in (0, 1):
        change = changes.get((0, number))
        if change is None:
            assert not out[number].any()
            continue
        peft = change.scale * x @ change.a.T.astype(np.float64) @ change.b.T.astype(np.float64)
        worst = max(worst, float(np.abs(out[number].reshape(11, -1) - peft).max() / np.abs(peft).max()))
    return worst


def test_groups_are_the_weights_of_one_layer() -> None:
    assert writer(2).groups() == [[(layer, 0), (layer, 1)] for layer in range(LAYERS)]
    alone = writer(2, last_two_axes(EQUATION))
    assert alone.groups() == [[index] for index in np.ndindex(LAYERS, 2)]


@pytest.mark.parametrize("rank", [6, 11])
def test_factors_of_their_own_fit_side_by_side(rank: int) -> None:
    changes: Changes = {(0, 0): matrices(2, 3, 1.75), (0, 1): matrices(3, 3, 0.25)}
    assert error(changes, rank) < 2e-7
    assert writer(rank).misfit(changes) is None


def test_ranks_may_differ() -> None:
    changes: Changes = {(0, 0): matrices(2, 4, 1.75), (0, 1): matrices(3, 1, 0.25)}
    assert error(changes, 5) < 2e-7


def test_one_first_factor_stays_one_bit_for_bit() -> None:
    """As an adapter made from such leaves has it: nothing grows on the way back."""
    k = matrices(2, 3, RUNTIME)
    v = Matrices(k.a.copy(), matrices(3, 3).b, RUNTIME)
    made, lost = writer(3).fitted({(0, 0): k, (0, 1): v})
    assert lost == 0
    a, b = written(made, 3)
    assert np.array_equal(a, k.a.T)
    for number, change in enumerate((k, v)):
        assert np.array_equal(b[:, number].reshape(3, -1), change.b.T)


def test_one_first_factor_with_scales_of_their_own() -> None:
    """Scales go into the second factors, so that the first stays shared."""
    k = matrices(2, 3, 3.5)
    v = Matrices(k.a, matrices(3, 3).b, 0.125)
    assert error({(0, 0): k, (0, 1): v}, 3) < 2e-7


def test_a_weight_alone() -> None:
    changes: Changes = {(0, 1): matrices(2, 4, 1.75)}
    assert error(changes, 4) < 2e-7
    assert error(changes, 6) < 2e-7


def test_what_does_not_fit_is_said() -> None:
    alone: Changes = {(0, 0): matrices(2, 4)}
    changes: Changes = {(0, 0): matrices(2, 4), (0, 1): matrices(3, 4)}
    assert writer(7).misfit(changes) == "needs rank 8 together with what shares its first factor; Toy's is 7"
    assert writer(3).misfit(alone) == "has rank 4; Toy's is 3"


def test_an_approximation_is_the_best_of_both_weights_together() -> None:
    """As the runtime has one first factor for them: the smallest error of the two changes as one matrix."""
    changes: Changes = {(0, 0): matrices(2, 4, 1.75), (0, 1): matrices(3, 4, 0.25)}
    made, lost = writer(5).fitted(changes)
    a, b = written(made, 5)
    ours = RUNTIME * np.concatenate([b[:, number].reshape(5, -1).T @ a.T for number in (0, 1)])
    tall = np.concatenate(
        [each.scale * each.b.astype(np.float64) @ each.a.astype(np.float64) for each in changes.values()]
    )
    u, s, vt = np.linalg.svd(tall, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vt[:5]
    assert np.abs(ours - best).max() < 1e-6 * np.abs(best).max()
    assert lost == pytest.approx(np.linalg.norm(tall - best) / np.linalg.norm(tall), rel=1e-5)


def test_blocks_per_head_are_left_alone_by_role() -> None:
    """Block-diagonal matrices, as openpi's q gives them, mean nothing here: their rank is the rank."""
    change = matrices(2, GROUPS * 2)
    blocks = np.zeros_like(change.b)
    for group in range(GROUPS):
        rows, columns = slice(group * DIM, (group + 1) * DIM), slice(2 * group, 2 * group + 2)
        blocks[rows, columns] = change.b[rows, columns]
    diagonal: Changes = {(0, 0): Matrices(change.a, blocks, 1.0)}
    assert writer(2).misfit(diagonal) == f"has rank {GROUPS * 2}; Toy's is 2"
    assert writer(2, last_two_axes(EQUATION)).misfit(diagonal) is None
    assert error(diagonal, GROUPS * 2) < 2e-7
