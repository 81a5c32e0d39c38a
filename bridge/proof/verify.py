"""Is it the same policy? Answered with numbers, from the runtimes' own equations.

Every weight that a runtime applies by an einsum is run on random inputs by openpi's equations in
jax from the source's leaves, and by ``linear`` (and PEFT's formula) in torch from the
destination's tensors. Every other weight must be equal after the cast. Nothing goes unchecked:
the count says so. Both sides are streamed, several leaves at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridge.arrays import FLOAT32
from bridge.checkpoint.assets import read_assets
from bridge.checkpoint.checkpoint import open_source
from bridge.checkpoint.match import optional_weights
from bridge.compare.sides import Side, open_side, same_model, walk
from bridge.errors import Problem, Refusal
from bridge.formats.disk.location import Location
from bridge.proof.checks import EPSILON, Check, Checker
from bridge.proof.runtimes import runtimes
from bridge.publish.atomic import RECORD
from bridge.publish.record import check_record, check_whole, read_record


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
    workers: int = 2,
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
        seed: of the random inputs; every weight has its own, from its name.
        workers: leaves checked at once; the numbers do not depend on it.
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
        from bridge.proof.actions import refuse_unless_runnable

        refuse_unless_runnable(dst, b)
    checker = Checker(a, b, rtol, seed)
    with runtimes() if checker.needs_runtimes else nullcontext():
        walked = walk(a, b, checker, workers=workers, progress=progress)
    merged: dict[str, Check] = {}
    for check in walked.looks:
        before = merged.get(check.name)
        merged[check.name] = check if before is None else _worse(before, check)
    problems = [
        Problem(f"{check.name}: {_difference(check)}", _fix(check))
        for check in sorted(merged.values(), key=_badness, reverse=True)
        if not check.holds
    ]
    problems += walked.problems
    files: dict[str, bool] = {}
    for side, read in zip((a, b), walked.read, strict=True):
        for key, checkpoint in side.inputs.checkpoints.items():
            known = {name: checksum for (which, name), checksum in read.items() if which == key}
            found, trouble = check_record(checkpoint.source, known)
            files |= found
            problems += trouble
    found, trouble = _asset_checks(a, b)
    files |= found
    problems += trouble
    actions = None
    if reference is not None:
        from bridge.proof.actions import compare_actions

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


__all__ = ["Check", "Verdict", "alphas_for", "verify"]
