"""Is it the same policy? Answered with numbers, from the runtimes' own equations.

Every weight that a runtime applies by an einsum is run on random inputs by the JAX runtime's
equations from the source's leaves, and by ``linear`` (and PEFT's formula) in torch from the
destination's tensors. Every other weight must be equal after the cast. Nothing goes unchecked:
the count says so. Both sides are streamed, several leaves at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from bridge.arrays import FLOAT32
from bridge.checkpoint.known import Beside, read_beside
from bridge.checkpoint.open import open_source
from bridge.checkpoint.options import alphas_of
from bridge.compare.shared import shared
from bridge.compare.sides import Side, open_sides, same_model, walk
from bridge.errors import Problem, Refusal
from bridge.formats.disk.location import Location
from bridge.proof.checks import EPSILON, Check, Checker
from bridge.proof.full_model import compare_outputs, read_recording, runnable
from bridge.proof.options import VerifyOptions
from bridge.proof.runtimes import runtimes
from bridge.publish.record import RECORD, check_record, check_whole, read_record
from bridge.rules.option import complete
from bridge.stream.workers import Progress


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The proof, or what speaks against it."""

    source: str
    destination: str
    model: str
    checks: tuple[Check, ...]
    files: Mapping[str, bool] = field(default_factory=dict)
    """Files and records that were checked -> whether they match."""
    facts: Mapping[str, bool] = field(default_factory=dict)
    """What is in no weight and both sides state -> whether it is the same."""
    problems: tuple[Problem, ...] = ()
    """Failed checks, the worst first."""
    actions: Mapping[str, float] | None = None
    """How far the whole model's output is from the recorded one: max_abs, mean_abs, allowed."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Tensors that no runtime uses, and are not compared -> why."""
    scales: tuple[str, ...] = ()
    """What the runtime multiplies LoRA products by, and where that is known from."""
    notes: tuple[str, ...] = ()
    runtime: str = ""
    """What ran the whole model, if anything did."""
    output: str = ""
    """What was compared of the whole model, such as logits."""

    shared: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Axes that one side was resized along -> how many entries are compared, and how many the longer side has."""

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
            "shared": {axis: {"compared": least, "of": most} for axis, (least, most) in self.shared.items()},
            "files": dict(self.files),
            "facts": dict(self.facts),
            "actions": dict(self.actions) if self.actions is not None else None,
            "notes": list(self.notes),
            "problems": [{"cause": problem.cause, "fix": problem.fix} for problem in self.problems],
            "checks": [vars(check) | {"holds": check.holds} for check in self.checks],
        }


def verify(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[VerifyOptions],
) -> Verdict:
    """Prove that two checkpoints are the same policy, or that one is as it was written.

    Every weight that the runtimes apply by an einsum is run on random inputs, in jax and in torch; all others
    must be equal after the cast. Both sides are streamed.

    Args:
        src (`str` or `Path`): one state of the policy; alone, it is checked against its own ``bridge.json``.
        dst (`str` or `Path`, *optional*): another state of it.
        progress (`Callable[[int, int], None]`, *optional*): called with the bytes of weights checked, and
            their total.
        **options: the fields of :class:`bridge.VerifyOptions`. An adapter among the two needs
            ``base``, where it does not lie beside it; alphas
            that are not given are read from the ``bridge.json`` of ``dst`` or ``src``. The numbers depend on
            ``seed``, and not on ``workers``.

    Returns:
        `Verdict`: :attr:`Verdict.holds`, and the errors of every weight, in float32 and in bfloat16.

    Raises:
        Refusal: one of them cannot be read, or they are not states of one model.
        TypeError: a keyword is not an option, or a value is of another type.

    Example:
        >>> import bridge
        >>> from importlib.resources import files
        >>> sample = next((files("bridge.cli") / "sample").iterdir()) / "checkpoint"
        >>> result = bridge.convert(sample, "merged", to="torch-merged", lora_alpha=8)
        >>> verdict = bridge.verify(sample, "merged")
        >>> verdict.holds, verdict.counts
        (True, {'equal': 64, 'runtime': 42})
    """
    options = complete(VerifyOptions, options)
    if dst is None:
        return _verify_record(src)
    reference, given = options["reference"], alphas_of(options)
    a, b, cut = shared(*open_sides(src, dst, options))
    model = same_model(a, b)
    full_model = None if reference is None else runnable(dst, b)
    recorded = None if reference is None or full_model is None else read_recording(full_model, reference)
    checker = Checker(a, b, options["rtol"], options["seed"])
    with runtimes() if checker.needs_runtimes else nullcontext():
        walked = walk(a, b, checker, workers=options["workers"], progress=progress)
    merged: dict[str, Check] = {}
    for check in walked.results:
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
            checked, trouble = check_record(checkpoint.source, known)
            files |= checked
            problems += trouble
    beside = read_beside(a.inputs), read_beside(b.inputs)
    facts, trouble = _fact_checks(a, b, *beside)
    problems += trouble
    checked, trouble = _asset_checks(a, b, *beside, facts)
    files |= checked
    problems += trouble
    figures = None
    if recorded is not None and full_model is not None:
        figures, trouble = compare_outputs(full_model, dst, b, recorded)
        problems += trouble
    return Verdict(
        source=str(a.checkpoint.source.location),
        destination=str(b.checkpoint.source.location),
        model=model.name,
        checks=tuple(merged.values()),
        files=files,
        facts=facts,
        problems=tuple(problems),
        actions=figures,
        unused={name: why for side in (a, b) for name, why in _unused(side).items()},
        scales=tuple(dict.fromkeys(_scales(a, recorded=not given) + _scales(b, recorded=not given))),
        notes=tuple(dict.fromkeys((*a.notes, *b.notes))),
        runtime=full_model.runtime if full_model is not None else "",
        output=full_model.output if full_model is not None else "",
        shared=cut,
    )


def _unused(side: Side) -> dict[str, str]:
    """Tensors of a side that stand for no weight of the model."""
    return {name: why for each in side.inputs.checkpoints.values() for name, why in each.unused.items()}


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
    return tuple(
        str(replace(scale, origin=f"from {RECORD}") if recorded and scale.origin == "given" else scale)
        for scale in (side.scales or {}).values()
    )


def _asset_checks(
    a: Side, b: Side, ours: Beside, theirs: Beside, facts: Mapping[str, bool]
) -> tuple[dict[str, bool], list[Problem]]:
    """The files that travel with both sides, byte for byte, but for those that state a fact of ``facts``."""
    directory = b.inputs.weights.family.assets
    if directory is None:
        return {}, []
    left, right = _counting(a, ours, facts), _counting(b, theirs, facts)
    # what both sides state as a fact may stand in another file on either; a record is no such file
    stated = {
        origin: equal
        for key, equal in facts.items()
        for origins in [{each.known.facts[key].origin for each in (ours, theirs)}]
        if RECORD not in origins
        for origin in origins
    }
    names = sorted((left.keys() | right.keys()) - stated.keys())
    same = {name: left.get(name) == right.get(name) for name in names}
    problems = []
    for name in (name for name, equal in same.items() if not equal):
        lacking = next((s for s, files in ((a, left), (b, right)) if name not in files), None)
        where = lacking.checkpoint.source.root if lacking else b.checkpoint.source.root
        problems.append(
            Problem(
                f"{where / name} {'is missing' if lacking else 'differs'}: {directory.matters}",
                "copy the assets of the source beside the weights",
            )
        )
    return same | {name: equal for name, equal in stated.items() if name in left or name in right}, problems


def _counting(side: Side, beside: Beside, facts: Mapping[str, bool]) -> dict[str, bytes]:
    """The files of a side, without those of its base whose facts the adapter states itself."""
    files, table = dict(beside.assets.files), side.inputs.weights.family.facts
    if side.inputs.base is None or table is None:
        return files
    for name, data in beside.assets.files.items():
        stated = {fact.kind.key for fact in table.read(side.inputs.model, {name: data}, {}).facts}
        if stated & facts.keys() and all(beside.known.facts[key].origin != name for key in stated):
            del files[name]
    return files


def _fact_checks(a: Side, b: Side, ours: Beside, theirs: Beside) -> tuple[dict[str, bool], list[Problem]]:
    """The facts that both sides state, and those that one lacks and cannot run without."""
    checked: dict[str, bool] = {}
    problems: list[Problem] = []
    for key in dict.fromkeys((*ours.known.facts, *theirs.known.facts)):
        left, right = ours.known.stated(key), theirs.known.stated(key)
        if left is None or right is None or not left.kind.matters:
            continue
        checked[key] = left.kind.same(left.value, right.value)
        if not checked[key]:
            values = left.kind.contrast(left.value, right.value)
            places = [side.checkpoint.source.root / fact.origin for side, fact in ((a, left), (b, right))]
            problems.append(
                Problem(
                    f"the {left.kind.title} is {values[0]} in {places[0]}, but {values[1]} in {places[1]}",
                    "see which of them the model was trained with, and convert again from that",
                )
            )
    undecided = (*ours.known.damaged, *theirs.known.damaged)
    problems += [each.problem for each in undecided if checked.get(each.kind.key, True)]
    return checked, problems


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
                "give a second checkpoint: verify SRC DST",
            )
        ]
    record = read_record(source.root)
    for where in record.get("outputs", []) if not problems else []:
        inner = _verify_record(Path(str(source.root), where))
        files, problems = {**files, **inner.files}, [*problems, *inner.problems]
    model = str(record.get("model", "unknown"))
    return Verdict(
        source=str(source.location),
        destination=str(source.location),
        model=model,
        checks=(),
        files=files,
        problems=tuple(problems),
    )


def _failed(root: Location, problems: Iterable[Problem]) -> Verdict:
    return Verdict(
        source=str(root),
        destination=str(root),
        model="unknown",
        checks=(),
        files={str(root / RECORD): False},
        problems=tuple(problems),
    )
