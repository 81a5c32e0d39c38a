"""One weight on both sides, checked: by the runtimes' equations where it has one, else by its bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xxhash

from bridge.arrays import BFLOAT16, FLOAT16, FLOAT32
from bridge.compare.gaps import Product, Values, gap, gap_after_cast, near, tiles
from bridge.compare.sides import Both, Held, Side
from bridge.lora.spectrum import effective_rank, spectrum
from bridge.proof.runtimes import Outputs, jax_forward, random_input, torch_forward

TOKENS = 5
#: rounding of one product-sum, in units of the dtype's epsilon, grows with the root of its length
EPSILON = {FLOAT32: 2.0**-23, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}


@dataclass(frozen=True)
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
    """Relative difference when both runtimes compute in bfloat16, as policies run."""
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
        return self.a.is_jax != self.b.is_jax or self.a.has_lora or self.b.has_lora

    def __call__(self, both: Both) -> Check:
        if not _is_folded(both):
            # the same weight on both sides: whatever runs it, its values must be equal
            equal = equality(both, self.rtol or 0.0)
            unmerged = both.a.has_factors or both.b.has_factors
            if (
                not equal.holds
                or both.rule.runtime is None
                or (self.a.is_jax == self.b.is_jax and not unmerged)
            ):
                return equal
        return self._runtime(both)

    def _runtime(self, both: Both) -> Check:
        equation, one = both.rule.runtime, both.rule.equation.one
        if equation is None or not (self.a.is_jax or self.b.is_jax):
            # by `linear` on both sides
            x = self._generator(both).standard_normal((1, TOKENS, _inputs(both)), dtype=np.float32)
        else:
            x = random_input(equation, both.a.w, TOKENS, self._generator(both))

        def run(side: Side, held: Held) -> Outputs:
            if side.is_jax and held.matrices is None and equation is not None:
                return jax_forward(equation, x, held)
            return torch_forward(one, x, held)

        a, b = run(self.a, both.a), run(self.b, both.b)
        scale = float(np.abs(a.exact).max()) or 1.0
        difference = np.abs(b.exact - a.exact)
        largest = float(difference.max()) if np.isfinite(difference).all() else math.inf
        relative, allowed = largest / scale, self.rtol if self.rtol is not None else _allowed(both, x)
        if _is_folded(both):
            entry, limit = entries(both)
            limit = limit if self.rtol is None else self.rtol
            # one wrong entry of a large weight moves an output by little: the entries are held as well
            if not entry <= limit and relative <= allowed:
                relative, allowed = entry, limit
        return Check(
            both.name,
            both.part.name,
            both.rule.leaf,
            "runtime",
            both.index,
            largest,
            float(difference.mean()),
            relative,
            allowed,
            float(np.abs(b.narrow - a.narrow).max()) / scale,
            spectrum(one, both.b if both.b.has_factors else both.a),
        )

    def _generator(self, both: Both) -> np.random.Generator:
        """Random numbers of a weight's own, so that no order of weights matters."""
        name = xxhash.xxh3_64_intdigest(both.name.encode())
        return np.random.default_rng((self.seed, name, both.start))


def _is_folded(both: Both) -> bool:
    """Whether one side holds the weight with its factors summed in, and the other beside it."""
    return both.a.has_factors != both.b.has_factors


def _inputs(both: Both) -> int:
    """The length of the vectors that a weight is applied to."""
    sizes = dict(zip(both.rule.equation.one.left, both.a.w.shape, strict=True))
    return math.prod(sizes[axis] for axis in both.rule.equation.right[1])


def _allowed(both: Both, x: np.ndarray) -> float:
    """What rounding alone can make of a difference: sums in float32, and weights that were cast."""
    sums = EPSILON[FLOAT32] * (8 + 0.5 * (x.size // TOKENS) ** 0.5)
    if _is_folded(both):
        rounded = EPSILON[(both.b if both.a.has_factors else both.a).w.dtype]
    else:
        dtypes = {both.a.w.dtype, both.b.w.dtype}
        rounded = max(EPSILON[dtype] for dtype in dtypes) if len(dtypes) > 1 else 0.0
    return float(sums + (rounded if rounded > EPSILON[FLOAT32] else 0.0))


def values(both: Both, held: Held) -> Values:
    """The weight that a side computes with."""
    one = both.rule.equation.one
    change = held.change(one)
    if change is None:
        return Values(held.w)
    sizes = dict(zip(one.left, held.w.shape, strict=True))
    return Values(held.w, Product(one, sizes, change))


def entries(both: Both) -> tuple[float, float]:
    """Largest difference of a folded weight's entries, over its largest entry; and what rounding allows."""
    apart, merged = (both.a, both.b) if both.a.has_factors else (both.b, both.a)
    found = gap(values(both, apart), values(both, merged))
    limit = EPSILON[merged.w.dtype] + 8 * EPSILON[FLOAT32]
    return found.largest / (found.reach or 1.0), limit


def equality(both: Both, allowed: float) -> Check:
    """Equal after the declared cast: the wider side, cast to the narrower's dtype, is it bit for bit."""
    a, b = both.a.w, both.b.w
    narrow = min((a.dtype, b.dtype), key=lambda dtype: (dtype.itemsize, dtype.name))
    wider = b.dtype.itemsize > a.dtype.itemsize
    # equal in the wider dtype is equal in both
    found = gap_after_cast(a, b, b.dtype) if wider else None
    if not wider or (found is not None and not _widened(a, b)):
        found = gap_after_cast(a, b, narrow)
    largest = mean = relative = 0.0
    if found is not None:
        largest = found.largest if math.isfinite(found.largest) else math.inf
        mean = found.total / a.size
        # bits may differ where the numbers do not: two zeros
        relative = max(largest / (found.reach or 1.0), 1e-300)
    return Check(
        both.name, both.part.name, both.rule.leaf, "equal", both.index, largest, mean, relative, allowed
    )


def _widened(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether ``b`` was made from ``a`` by widening, and not ``a`` from ``b`` by rounding.

    Then it holds no bits beyond ``a``'s: few entries that have some are faults, and most of them
    are what was rounded.
    """
    beyond = filled = 0
    for tile in tiles(a, b):
        wide = near(b[tile], b.dtype)
        beyond += int(np.count_nonzero(near(a[tile], b.dtype) != wide))
        filled += int(np.count_nonzero(wide))
    return 2 * beyond < filled
