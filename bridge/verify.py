"""Is it the same policy? Answered with numbers, from the runtimes' own equations.

Every weight that a runtime applies by an einsum is run on random inputs by openpi's equations in
jax from the source's leaves, and by ``linear`` (and PEFT's formula) in torch from the
destination's tensors. Every other weight must be equal after the cast. Nothing goes unchecked:
the count says so. Both sides are streamed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.assets import read_assets
from bridge.checkpoint import open_source
from bridge.errors import Problem, Refusal
from bridge.formats.location import Location
from bridge.lora import join
from bridge.pieces import Factors
from bridge.publish import RECORD
from bridge.recognise import optional_weights
from bridge.record import check_record, check_whole, read_record
from bridge.runtimes import jax_forward, random_input, torch_forward
from bridge.sides import Both, Held, Side, counter, open_side, same_model, walk
from bridge.specs import BFLOAT16, FLOAT16, FLOAT32, raw
from bridge.step import folded

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

    @property
    def holds(self) -> bool:
        return bool(self.relative <= self.allowed)


@dataclass(frozen=True)
class Verdict:
    """The proof, or what speaks against it."""

    source: str
    destination: str
    model: str
    checks: tuple[Check, ...]
    files: Mapping[str, bool] = field(default_factory=dict)
    """Files and records that were checked -> whether they hold."""
    problems: tuple[Problem, ...] = ()
    """What does not hold, the worst first."""
    actions: Mapping[str, float] | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
    """Tensors that no runtime uses, and are not compared -> why."""
    scales: tuple[str, ...] = ()
    """What openpi's LoRA factors were multiplied by, and where that was known from."""

    @property
    def holds(self) -> bool:
        return not self.problems

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(check.kind for check in self.checks))

    def worst(self, kind: str) -> Check | None:
        return max((c for c in self.checks if c.kind == kind), key=lambda c: c.relative, default=None)

    def as_json(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "source": self.source,
            "destination": self.destination,
            "model": self.model,
            "counts": self.counts,
            "scales": list(self.scales),
            "unused": dict(self.unused),
            "files": dict(self.files),
            "actions": dict(self.actions) if self.actions is not None else None,
            "problems": [{"cause": problem.cause, "fix": problem.fix} for problem in self.problems],
            "checks": [vars(check) | {"holds": check.holds} for check in self.checks],
        }


def verify(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    base: str | Path | None = None,
    lora_alpha: Mapping[str, float] | None = None,
    rslora: bool = False,
    rtol: float | None = None,
    seed: int = 0,
    reference: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Prove that two checkpoints are the same policy, or one that it is as it was written.

    Args:
        src: one state of the policy; alone, it is checked against its own ``bridge.json``.
        dst: another state of it.
        base: what an adapter among the two applies to.
        lora_alpha: alpha by expert, where the source has LoRA of other than stock ranks and no
            ``bridge.json`` of the destination says it.
        rslora: the run used rank-stabilised LoRA.
        rtol: allowed relative difference of a runtime check; from dtypes and sizes by default.
        seed: of the random inputs.
        reference: an ``.npz`` of an observation, noise and the actions openpi sampled for it; the
            destination is run on it by stock transformers (pi0).

    Raises:
        Refusal: one of them cannot be read, or they are not states of one model.
    """
    if dst is None:
        return _verify_record(src)
    alphas, root = alphas_for((dst, src), lora_alpha, rslora)
    a, b = open_side(src, base, alphas, root), open_side(dst, base, alphas, root)
    model = same_model(a, b)
    if reference is not None:
        from bridge.full_model import refuse_unless_runnable

        refuse_unless_runnable(dst, b)
    generator = np.random.default_rng(seed)
    merged: dict[str, Check] = {}
    for both in walk(a, b, counter((a, b), progress)):
        check = _check(a, b, both, rtol, generator)
        before = merged.get(check.name)
        merged[check.name] = check if before is None else _worse(before, check)
    problems = [
        Problem(f"{check.name}: {_difference(check)}", _fix(check))
        for check in sorted(merged.values(), key=_badness, reverse=True)
        if not check.holds
    ]
    files: dict[str, bool] = {}
    for side in (a, b):
        for checkpoint in side.inputs.checkpoints.values():
            found, trouble = check_record(checkpoint.source)
            files |= found
            problems += trouble
    found, trouble = _asset_checks(a, b)
    files |= found
    problems += trouble
    actions = None
    if reference is not None:
        from bridge.full_model import compare_actions

        actions, trouble = compare_actions(dst, base, b, reference)
        problems += trouble
    return Verdict(
        str(a.checkpoint.source.location),
        str(b.checkpoint.source.location),
        model.name,
        tuple(merged.values()),
        files,
        tuple(problems),
        actions,
        {name: why for side in (a, b) for name, why in _unused(side).items()},
        tuple(dict.fromkeys(_scales(a, recorded=not lora_alpha) + _scales(b, recorded=not lora_alpha))),
    )


def _unused(side: Side) -> dict[str, str]:
    """Tensors of a side that stand for no weight of the model."""
    checkpoint = side.inputs.weights
    if checkpoint.layout is None:
        return {}
    compared = set(checkpoint.stored.values())
    reasons = optional_weights(checkpoint.model, checkpoint.layout)
    return {name: reasons[name] for name in checkpoint.source.specs if name not in compared}


def _check(a: Side, b: Side, both: Both, rtol: float | None, generator: np.random.Generator) -> Check:
    folded = _is_folded(both)
    if not folded:
        # the same weight on both sides: whatever runs it, its values must be equal
        equal = _equality(both, rtol or 0.0)
        unmerged = both.a.has_factors or both.b.has_factors
        if not equal.holds or both.rule.runtime is None or (a.is_jax == b.is_jax and not unmerged):
            return equal
    return _runtime(a, b, both, rtol, generator)


def _is_folded(both: Both) -> bool:
    """Whether one side holds the weight with its factors summed in, and the other beside it."""
    return both.a.has_factors != both.b.has_factors


def _runtime(a: Side, b: Side, both: Both, rtol: float | None, generator: np.random.Generator) -> Check:
    equation = both.rule.runtime
    one = both.rule.equation.one
    if not (a.is_jax or b.is_jax):
        # two PyTorch forms: read flat, (in, out)
        x = generator.standard_normal((1, TOKENS, both.a.w.shape[0]), dtype=np.float32)
    else:
        assert equation is not None
        x = random_input(equation, both.a.w, TOKENS, generator)

    def run(side: Side, held: Held, dtype: str) -> np.ndarray:
        if side.is_jax and held.matrices is None and equation is not None:
            return jax_forward(equation, x, held, dtype).reshape(1, TOKENS, -1)
        return torch_forward(one, x, held, dtype)

    expected, actual = run(a, both.a, "float32"), run(b, both.b, "float32")
    scale = float(np.abs(expected).max()) or 1.0
    gap = np.abs(actual - expected)
    narrow_a, narrow_b = run(a, both.a, "bfloat16"), run(b, both.b, "bfloat16")
    largest = float(gap.max()) if np.isfinite(gap).all() else float("inf")
    relative, allowed = largest / scale, rtol if rtol is not None else _allowed(both, x)
    if _is_folded(both):
        entry, limit = _entries(both)
        limit = limit if rtol is None else rtol
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
        float(gap.mean()),
        relative,
        allowed,
        float(np.abs(narrow_b - narrow_a).max()) / scale,
    )


def _allowed(both: Both, x: np.ndarray) -> float:
    """What rounding alone can make of a difference: sums in float32, and weights that were cast."""
    sums = EPSILON[FLOAT32] * (8 + 0.5 * (x.size // TOKENS) ** 0.5)
    if _is_folded(both):
        rounded = EPSILON[(both.b if both.a.has_factors else both.a).w.dtype]
    else:
        dtypes = {both.a.w.dtype, both.b.w.dtype}
        rounded = max(EPSILON[dtype] for dtype in dtypes) if len(dtypes) > 1 else 0.0
    return float(sums + (rounded if rounded > EPSILON[FLOAT32] else 0.0))


def _entries(both: Both) -> tuple[float, float]:
    """Largest difference of a folded weight's entries, over its largest entry; and what rounding allows."""
    apart, merged = (both.a, both.b) if both.a.has_factors else (both.b, both.a)
    factors = apart.factors
    if factors is None:
        assert apart.matrices is not None
        one = both.rule.equation.one
        sizes = dict(zip(one.left, apart.w.shape, strict=True))
        factors = Factors(*join(one, apart.matrices.a, apart.matrices.b, sizes), apart.matrices.scale)
    expected = folded(both.rule, apart.w, factors)
    gap = float(np.abs(expected - merged.w.astype(FLOAT32)).max())
    limit = EPSILON[merged.w.dtype] + 8 * EPSILON[FLOAT32]
    return gap / (float(np.abs(expected).max()) or 1.0), limit


def _equality(both: Both, allowed: float) -> Check:
    """Equal after the declared cast: the wider side, cast to the narrower's dtype, is it bit for bit."""
    a, b = both.a.w, both.b.w
    narrow = min((a.dtype, b.dtype), key=lambda dtype: (dtype.itemsize, dtype.name))
    if _widened(a, b):
        narrow = b.dtype
    cast_a, cast_b = (each.astype(narrow, copy=False) for each in (a, b))
    gap = 0.0
    mean = relative = 0.0
    if raw(cast_a) != raw(cast_b):
        wide_a, wide_b = cast_a.astype(np.float64), cast_b.astype(np.float64)
        differences = np.abs(wide_a - wide_b)
        gap = float(differences.max()) if np.isfinite(differences).all() else float("inf")
        mean = float(differences.mean())
        relative = max(gap / (float(np.abs(wide_a).max()) or 1.0), 1e-300)
    return Check(both.name, both.part.name, both.rule.leaf, "equal", both.index, gap, mean, relative, allowed)


def _widened(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether ``b`` was made from ``a`` by widening, and not ``a`` from ``b`` by rounding.

    Then it holds no bits beyond ``a``'s: few entries that have some are faults, and most of them
    are what was rounded.
    """
    if b.dtype.itemsize <= a.dtype.itemsize:
        return False
    beyond = np.count_nonzero(a.astype(b.dtype) != b)
    return bool(2 * beyond < np.count_nonzero(b))


def _worse(a: Check, b: Check) -> Check:
    """Runs of rows of one weight as one: the worst of both."""
    # a difference that is not a number is the worst there is
    return b if b.relative > a.relative or b.relative != b.relative else a


def _badness(check: Check) -> float:
    return math.inf if math.isnan(check.relative) else check.relative


def _difference(check: Check) -> str:
    if check.kind == "equal":
        limit = f"{check.allowed:.1e} allowed" if check.allowed else "they must be equal"
        return f"values differ by up to {check.max_abs:.1e}, {check.relative:.1e} of the largest ({limit})"
    return (
        f"differs by {check.relative:.1e} of its largest output or entry ({check.allowed:.1e} allowed), "
        f"outputs by up to {check.max_abs:.1e}"
    )


def _fix(check: Check) -> str:
    if check.kind == "equal" and check.relative < 4 * EPSILON[FLOAT32]:
        return "where both were merged, each in its own way, last bits differ: --rtol 1e-6 allows for that"
    return "see that the two belong together (step, --base, --lora-alpha); if they do, convert again"


def _scales(side: Side, *, recorded: bool) -> tuple[str, ...]:
    found = (side.scales or {}).values()
    return tuple(
        str(replace(scale, origin=f"from {RECORD}") if recorded and scale.origin == "given" else scale)
        for scale in found
    )


def alphas_for(
    paths: Iterable[str | Path], given: Mapping[str, float] | None, rslora: bool
) -> tuple[dict[str, float], bool]:
    """Alphas as given, else as the first ``bridge.json`` beside one of the paths records them."""
    if given:
        return dict(given), rslora
    for path in paths:
        scales = read_record(Location.parse(path)).get("scales", {})
        if isinstance(scales, dict) and scales:
            try:
                found = {name: float(scale["alpha"]) for name, scale in scales.items()}
                return found, rslora or any(scale["rslora"] for scale in scales.values())
            except (KeyError, TypeError, ValueError):
                continue
    return {}, rslora


def _asset_checks(a: Side, b: Side) -> tuple[dict[str, bool], list[Problem]]:
    """The norm stats of both sides, byte for byte."""
    ours, theirs = (read_assets(side.checkpoint.source.root).files for side in (a, b))
    found, problems = {}, []
    for name in sorted(ours.keys() | theirs.keys()):
        same = ours.get(name) == theirs.get(name)
        found[name] = same
        if not same:
            lacking = next((s for s, files in ((a, ours), (b, theirs)) if name not in files), None)
            where = lacking.checkpoint.source.root if lacking else b.checkpoint.source.root
            problems.append(
                Problem(
                    f"{where / name} {'is missing' if lacking else 'differs'}: the policy would move the robot wrongly",
                    "copy the assets of the source beside the weights",
                )
            )
    return found, problems


def _verify_record(path: str | Path) -> Verdict:
    """A directory, and the outputs in it, against the records of them."""
    location = Location.parse(path)
    whole = check_whole(location)
    try:
        source = open_source(location)
    except Refusal as refused:
        if not (location / RECORD).is_file():
            raise
        # that a file is missing, or is not what was written, is the cause
        return _failed(location, whole or refused.problems)
    if source.root != location:
        whole = check_whole(source.root)
    if whole:
        return _failed(source.root, whole)
    files, problems = check_record(source)
    if not files:
        problems = [
            Problem(
                f"{source.root} has no {RECORD} to check it against",
                "name what it was made from: verify SRC DST",
            )
        ]
    record = read_record(source.root)
    for where in record.get("outputs", []) if not problems else []:
        inner = _verify_record(Path(str(source.root), where))
        files, problems = {**files, **inner.files}, [*problems, *inner.problems]
    model = str(record.get("model", "unknown"))
    return Verdict(str(source.location), str(source.location), model, (), files, tuple(problems))


def _failed(root: Location, problems: Iterable[Problem]) -> Verdict:
    return Verdict(str(root), str(root), "unknown", (), {str(root / RECORD): False}, tuple(problems))
