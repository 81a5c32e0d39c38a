"""One weight on both sides, checked: by the runtimes' equations where it has one, else by its bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xxhash

from bridge.arrays import BFLOAT16, FLOAT16, FLOAT32
from bridge.compare.gaps import gap, gap_after_cast, near, tiles, values
from bridge.compare.sides import Side, SideWeight, WeightPair
from bridge.lora.algebra import effective_rank
from bridge.proof.runtimes import Outputs, jax_forward, random_input, torch_forward

TOKENS = 5
#: rounding of one product-sum, in units of the dtype's epsilon, grows with the root of its length
EPSILON = {FLOAT32: 2.0**-23, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One weight, checked."""

    name: str
    part: str
    leaf: str
    kind: str
    """``"runtime"`` or ``"equal"``."""
    index: tuple[int, ...]
    max_abs: float
    mean_abs: float
    relative: float
    """Largest difference over the largest expected value."""
    allowed: float
    """Largest relative difference allowed; 0 for equality."""
    bfloat16: float | None = None
    """Relative difference when both runtimes compute in bfloat16, as at inference."""
    spectrum: tuple[float, ...] = ()
    """Singular values of the LoRA product of the side that carries it, largest first."""

    @property
    def holds(self) -> bool:
        return bool(self.relative <= self.allowed)

    @property
    def effective_rank(self) -> float | None:
        """How many directions the LoRA product uses."""
        return effective_rank(self.spectrum)


@dataclass(frozen=True)
class Checker:
    """Checks weights of two sides. Called from several threads: no check depends on another."""

    a: Side
    b: Side
    rtol: float | None
    seed: int

    @property
    def needs_runtimes(self) -> bool:
        """Whether any weight can be one that is run."""
        return self.a.in_jax != self.b.in_jax or self.a.has_lora or self.b.has_lora

    def __call__(self, pair: WeightPair) -> Check:
        if not _is_folded(pair):
            # the same weight on both sides: whatever runs it, its values must be equal
            equal = equality(pair, self.rtol or 0.0)
            unmerged = pair.a.has_factors or pair.b.has_factors
            # factors beside them are run even where no einsum is declared: by linear layers
            runs = pair.rule.runtime is not None and self.a.in_jax != self.b.in_jax
            if not equal.holds or not (unmerged or runs):
                return equal
        return self._runtime(pair)

    def _runtime(self, pair: WeightPair) -> Check:
        equation, one = pair.rule.runtime, pair.rule.equation.of_weight
        if equation is None or not (self.a.in_jax or self.b.in_jax):
            # by `linear` on both sides
            x = self._generator(pair).standard_normal((1, TOKENS, _inputs(pair)), dtype=np.float32)
        else:
            x = random_input(equation, pair.a.w, TOKENS, self._generator(pair))

        def run(side: Side, weight: SideWeight) -> Outputs:
            as_stored = weight.change is None or weight.change.axes is not None
            if side.in_jax and as_stored and equation is not None:
                return jax_forward(equation, x, weight)
            return torch_forward(one, x, weight)

        a, b = run(self.a, pair.a), run(self.b, pair.b)
        scale = float(np.abs(a.exact).max()) or 1.0
        difference = np.abs(b.exact - a.exact)
        largest = float(difference.max()) if np.isfinite(difference).all() else math.inf
        relative, allowed = largest / scale, self.rtol if self.rtol is not None else _allowed(pair, x)
        if _is_folded(pair):
            entry, limit = entries(pair)
            limit = limit if self.rtol is None else self.rtol
            # one wrong entry of a large weight moves an output by little: entries are compared as well
            if not entry <= limit and relative <= allowed:
                relative, allowed = entry, limit
        carrying = pair.b.matrices or pair.a.matrices
        return Check(
            name=pair.name,
            part=pair.part.name,
            leaf=pair.rule.leaf,
            kind="runtime",
            index=pair.index,
            max_abs=largest,
            mean_abs=float(difference.mean()),
            relative=relative,
            allowed=allowed,
            bfloat16=float(np.abs(b.narrow - a.narrow).max()) / scale,
            spectrum=carrying.spectrum if carrying else (),
        )

    def _generator(self, pair: WeightPair) -> np.random.Generator:
        """Random numbers of a weight's own, so that no order of weights matters."""
        name = xxhash.xxh3_64_intdigest(pair.name.encode())
        return np.random.default_rng((self.seed, name, pair.start))


def _is_folded(pair: WeightPair) -> bool:
    """Whether one side has the weight with its factors summed in, and the other beside it."""
    return pair.a.has_factors != pair.b.has_factors


def _inputs(pair: WeightPair) -> int:
    """The length of the vectors that a weight is applied to."""
    sizes = dict(zip(pair.rule.equation.of_weight.left, pair.a.w.shape, strict=True))
    return math.prod(sizes[axis] for axis in pair.rule.equation.right[1])


def _allowed(pair: WeightPair, x: np.ndarray) -> float:
    """What rounding alone can make of a difference: sums in float32, and weights that were cast."""
    sums = EPSILON[FLOAT32] * (8 + 0.5 * (x.size // TOKENS) ** 0.5)
    if _is_folded(pair):
        rounded = EPSILON[(pair.b if pair.a.has_factors else pair.a).w.dtype]
    else:
        dtypes = {pair.a.w.dtype, pair.b.w.dtype}
        rounded = max(EPSILON[dtype] for dtype in dtypes) if len(dtypes) > 1 else 0.0
    return float(sums + (rounded if rounded > EPSILON[FLOAT32] else 0.0))


def entries(pair: WeightPair) -> tuple[float, float]:
    """Largest difference of a folded weight's entries, over its largest entry; and what rounding allows."""
    apart, merged = (pair.a, pair.b) if pair.a.has_factors else (pair.b, pair.a)
    equation = pair.rule.equation.of_weight
    measured = gap(*(values(equation, side.w, side.matrices) for side in (apart, merged)))
    limit = EPSILON[merged.w.dtype] + 8 * EPSILON[FLOAT32]
    return measured.largest / (measured.reach or 1.0), limit


def equality(pair: WeightPair, allowed: float) -> Check:
    """Equal after the declared cast: the wider side, cast to the narrower's dtype, is it bit for bit."""
    a, b = pair.a.w, pair.b.w
    narrow = min((a.dtype, b.dtype), key=lambda dtype: (dtype.itemsize, dtype.name))
    wider = b.dtype.itemsize > a.dtype.itemsize
    # equal in the wider dtype is equal in both
    measured = gap_after_cast(a, b, b.dtype) if wider else None
    if not wider or (measured is not None and not _widened(a, b)):
        measured = gap_after_cast(a, b, narrow)
    largest = mean = relative = 0.0
    if measured is not None:
        largest = measured.largest if math.isfinite(measured.largest) else math.inf
        mean = measured.total / a.size
        # bits may differ where the numbers do not: two zeros
        relative = max(largest / (measured.reach or 1.0), 1e-300)
    return Check(
        name=pair.name,
        part=pair.part.name,
        leaf=pair.rule.leaf,
        kind="equal",
        index=pair.index,
        max_abs=largest,
        mean_abs=mean,
        relative=relative,
        allowed=allowed,
    )


def _widened(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether ``b`` was made from ``a`` by widening, and not ``a`` from ``b`` by rounding.

    Then it has no bits beyond ``a``'s: where few entries have some they are faults, where most have
    some they were rounded.
    """
    beyond = filled = 0
    for tile in tiles(a, b):
        wide = near(b[tile], b.dtype)
        beyond += int(np.count_nonzero(near(a[tile], b.dtype) != wide))
        filled += int(np.count_nonzero(wide))
    return 2 * beyond < filled
