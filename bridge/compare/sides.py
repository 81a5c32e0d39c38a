"""Two states of one model, read side by side: what verification and `diff` walk over.

A side is a checkpoint, or an adapter on its base. Walking gives, for every weight, what each side
has of it: the values, and LoRA factors where they are unmerged. Both are streamed; one weight of
each is in memory (a run of rows, for an embedding) for every worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from bridge.arrays import FLOAT32
from bridge.checkpoint.adapter_base import base_of
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.identity import identity_problems
from bridge.checkpoint.inputs import Inputs, shape_problems
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.checkpoint.leave_out import unmatched
from bridge.checkpoint.open import adapter_of, open_checkpoint
from bridge.checkpoint.opening import BARE, Opening, opening_of
from bridge.checkpoint.options import SourceOptions, alphas_of
from bridge.checkpoint.scales import alphas_for, scales
from bridge.errors import CheckpointRefused, Problem, Refusal, RouteRefused, refuse_if
from bridge.formats.disk.location import Location
from bridge.lora.factors import LowRank, Matrices, Scale
from bridge.rules.equation import Index
from bridge.rules.model import Bound, Model, Part
from bridge.rules.rule import Rule
from bridge.stream.readers import Done, Piece, Read, Tick, pieces
from bridge.stream.workers import Counter, Load, Progress, on_threads

T = TypeVar("T")

#: bytes that the weights in memory at once may take, where one alone does not need more
BUDGET = 700 << 20
#: what looking at one weight takes beside it
SCRATCH = 64 << 20


@dataclass(frozen=True)
class Side:
    """One of the two: its checkpoints, and the scales the JAX runtime gives its factors."""

    inputs: Inputs
    scales: Mapping[str, Scale] | None
    """None where factors are left out of account."""
    notes: tuple[str, ...] = ()
    """What base an adapter was given, where that is not plain."""

    @property
    def checkpoint(self) -> Checkpoint:
        return self.inputs.source

    @property
    def in_jax(self) -> bool:
        """Whether the weights lie in a pytree, so that the JAX runtime would run them."""
        return self.inputs.weights.in_jax

    @property
    def has_lora(self) -> bool:
        return self.checkpoint.has_lora

    @property
    def checkpoints(self) -> Iterable[Checkpoint]:
        """All that it reads from."""
        return self.inputs.checkpoints.values()


@dataclass(frozen=True)
class SideWeight:
    """What a side has of one weight (or of a run of its rows)."""

    w: np.ndarray
    """In the leaf's axes, placeholders taken out; the stored dtype."""
    change: LowRank | None = None
    """Its LoRA factors, as they are stored."""

    @property
    def has_factors(self) -> bool:
        return self.change is not None

    @property
    def matrices(self) -> Matrices | None:
        """What the factors add to the weight, as two matrices in float32; None without factors."""
        return None if self.change is None else self.change.matrices(FLOAT32)


@dataclass(frozen=True, kw_only=True)
class WeightPair:
    """One weight on both sides."""

    part: Part
    rule: Rule
    name: str
    """Its PyTorch name, in the rules."""
    index: Index
    start: int
    a: SideWeight
    b: SideWeight


def open_side(
    path: str | Path,
    base: str | Path | None,
    lora_alpha: Mapping[str, float],
    rslora: bool,
    *,
    base_differs: bool = False,
    needs_scale: bool = True,
    opening: Opening = BARE,
) -> Side:
    """Open a checkpoint, or an adapter with its base.

    Args:
        path: of the checkpoint.
        base: that an adapter applies to; of one that was saved with its base, that by default.
        lora_alpha: by part.
        rslora: whether the run used rank-stabilised LoRA.
        needs_scale: whether factors count.
        opening: what the path does not tell; its item is of the checkpoint alone.

    Raises:
        Refusal: with every problem.
    """
    checkpoint = open_checkpoint(path, opening=opening)
    if isinstance(checkpoint, AdapterCheckpoint):
        based = base_of(checkpoint, base)
        if based.missing is not None:
            raise RouteRefused(based.missing)
        weights = based.open(opening)
        inputs = Inputs(adapter_of(weights, checkpoint), weights)
        problems, notes = [*inputs.source.problems, *weights.problems], list[str]()
        if not problems:
            problems += shape_problems(inputs)
        if not problems:
            problems, notes = identity_problems(inputs, allowed=base_differs)
        refuse_if(problems, CheckpointRefused)
        if based.origin:
            notes.insert(0, f"{checkpoint.source.location}: its base is {based.description}")
        return Side(inputs, {}, tuple(notes))
    refuse_if(checkpoint.problems, CheckpointRefused)
    if not checkpoint.has_lora or not needs_scale:
        return Side(Inputs(checkpoint), {} if needs_scale else None)
    known, problems = scales(checkpoint, lora_alpha, rslora)
    refuse_if(problems, CheckpointRefused)
    return Side(Inputs(checkpoint), known)


def open_sides(a: str | Path, b: str | Path, options: SourceOptions) -> tuple[Side, Side]:
    """Open two checkpoints that are compared, each with its own alphas. An item that is chosen is of the first.

    Raises:
        Refusal: with every problem of the first that has some.
    """
    base, given, rslora = options["base"], alphas_of(options), options["rslora"]
    opening = opening_of(options, given, rslora)
    roots, differs = (Location.parse(a), Location.parse(b)), options["base_differs"]
    own, other = alphas_for(*roots, given, rslora), alphas_for(*roots[::-1], given, rslora)
    sides = (
        open_side(a, base, *own, base_differs=differs, opening=opening),
        open_side(b, base, *other, base_differs=differs, opening=replace(opening, item=None)),
    )
    refuse_if(unmatched(opening, (each.left_out for side in sides for each in side.checkpoints)), Refusal)
    return sides


def same_model(a: Side, b: Side) -> Model:
    """The model both sides are of, with every size known from one of them.

    Raises:
        CheckpointRefused: they are different models or dimensions.
    """
    model = a.inputs.model
    if model.name != b.inputs.model.name or model.rules_key != b.inputs.model.rules_key:
        raise CheckpointRefused(
            Problem(
                f"{a.inputs.weights.source.location} is {model.name} but {b.inputs.weights.source.location} is "
                f"{b.inputs.model.name}",
                "compare two checkpoints of one model",
            )
        )
    ours, theirs = a.inputs.sizes, b.inputs.sizes
    ranks = {
        model.qualified(part.name, rule.lora.rank) for part in model.parts for rule in part.rules if rule.lora
    }
    refuse_if(
        (
            Problem(
                f"{axis} is {ours[axis]} in {a.inputs.weights.source.location} but {theirs[axis]} in "
                f"{b.inputs.weights.source.location}",
                "compare two checkpoints of the same dimensions",
            )
            for axis in sorted((ours.keys() & theirs.keys()) - ranks)
            if ours[axis] != theirs[axis]
        ),
        CheckpointRefused,
    )
    return model


@dataclass(frozen=True)
class Walk(Generic[T]):
    """What a walk over two sides gave."""

    results: tuple[T, ...]
    """What became of every weight (every run of rows), in the order of the model's rules."""
    read: tuple[Mapping[Read, str], Mapping[Read, str]]
    """For each side: checksum of every array it read."""
    problems: tuple[Problem, ...]
    """Tied weights of a side that are stored twice and differ."""


def walk(
    a: Side,
    b: Side,
    check: Callable[[WeightPair], T],
    *,
    workers: int = 2,
    progress: Progress | None = None,
) -> Walk[T]:
    """Visit every weight on both sides.

    Leaves are independent: several are walked at once, each in one thread, and the results do not
    depend on how many.

    Args:
        a: one side.
        b: the other.
        check: called with a weight as both sides have it, valid during the call; from any thread.
        workers: leaves at once.
        progress: called with the bytes of weights visited, and their total, on both sides.

    Raises:
        Refusal: a side cannot be read, or they are not of one model.
    """
    model = same_model(a, b)
    sizes = {**a.inputs.sizes, **b.inputs.sizes}
    # without a pytree on either side nothing tells heads apart, and nothing needs to
    flat = not (a.in_jax or b.in_jax)
    tasks = [_Task(a, b, bound, flat) for bound in model.bind(sizes)]
    loads = [task.load for task in tasks]
    counter = Counter(sum(load.work for load in loads), progress)
    ended = on_threads(
        lambda number, tick: _run(tasks[number], check, tick),
        loads,
        workers=workers,
        budget=BUDGET,
        tick=counter.add,
    )
    done = [pair for _, pair in ended]
    return Walk(
        tuple(result for results, _ in ended for result in results),
        (
            {k: v for first, _ in done for k, v in first.read.items()},
            {k: v for _, second in done for k, v in second.read.items()},
        ),
        tuple(problem for pair in done for each in pair for problem in each.problems),
    )


@dataclass(frozen=True)
class _Task:
    """The weights of one leaf on both sides."""

    a: Side
    b: Side
    bound: Bound
    flat: bool

    @property
    def load(self) -> Load:
        loads = [_load(side, self.bound, flat=self.flat) for side in (self.a, self.b)]
        return Load(sum(load.work for load in loads), sum(load.memory for load in loads) + SCRATCH)

    def weights(self, done: tuple[Done, Done]) -> Iterator[WeightPair]:
        """Every weight as both sides have it, valid until the next."""
        rule = self.bound.rule.flat if self.flat else self.bound.rule
        names = self.bound.names
        with ExitStack() as stack:
            # files are closed where one side fails, not when its error is forgotten
            sides = [
                stack.enter_context(closing(_pieces(side, self.bound, each, flat=self.flat)))
                for side, each in zip((self.a, self.b), done, strict=True)
            ]
            for (piece, ours), (_, theirs) in _aligned(*sides):
                yield WeightPair(
                    part=self.bound.part,
                    rule=rule,
                    name=names[piece.index],
                    index=piece.index,
                    start=piece.start,
                    a=ours,
                    b=theirs,
                )


def _run(task: _Task, check: Callable[[WeightPair], T], tick: Tick) -> tuple[list[T], tuple[Done, Done]]:
    done = Done(), Done()
    results = []
    for pair in task.weights(done):
        results.append(check(pair))
        tick(pair.a.w.nbytes + pair.b.w.nbytes)
    return results, done


def _load(side: Side, bound: Bound, *, flat: bool) -> Load:
    """What walking a leaf's weights costs on one side."""
    weights, used = side.inputs.weights_reader(bound, flat=flat)
    specs = {read: side.inputs.spec(read) for read in weights.reads}
    equation = used.rule.equation
    weight = math.prod(used.sizes[axis] for axis in equation.of_weight.left) * max(
        spec.dtype.itemsize for spec in specs.values()
    )
    if equation.streams and not equation.placeholders:
        weight = 0  # its rows are visited as they are read
    elif side.in_jax and not equation.in_order:
        # no weight is whole before the end of the leaf
        weight *= math.prod(used.sizes[axis] for axis in equation.placeholders)
    memory = weight + max(side.inputs.sources[key].buffered_bytes(name) for key, name in specs)
    reader = side.inputs.factor_reader(used, None)
    if reader is not None and side.scales is not None:
        memory += reader.memory(side.inputs.sources)
    return Load(sum(each.nbytes for each in specs.values()), memory)


Pieces = Generator[tuple[Piece, SideWeight], None, None]


def _pieces(side: Side, bound: Bound, done: Done, *, flat: bool) -> Pieces:
    weights, used = side.inputs.weights_reader(bound, flat=flat)
    sources, equation = side.inputs.sources, used.rule.equation
    runs = equation.streams and not equation.placeholders
    change_at: Callable[[Index], LowRank | None] = lambda index: None  # noqa: E731
    if side.scales is not None:
        reader = side.inputs.factor_reader(used, side.scales.get(bound.part.name))
        if reader is not None:
            change_at = reader.open(used.rule, sources, done, None)
    change: LowRank | None = None
    for number, piece in enumerate(pieces(weights, used.rule, sources, done, None)):
        if number == 0 or not runs:
            change = change_at(piece.index)
        rows = slice(piece.start, piece.start + len(piece.w)) if runs else slice(None)
        yield piece, SideWeight(piece.w, _rows(change, rows))


def _aligned(a: Pieces, b: Pieces) -> Iterator[tuple[tuple[Piece, SideWeight], tuple[Piece, SideWeight]]]:
    """Pair pieces of the same weight; runs of rows are cut to the same length on both sides."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        if left[1].w.shape == right[1].w.shape:
            yield left, right
            left, right = next(a, None), next(b, None)
            continue
        rows = min(len(left[1].w), len(right[1].w))
        yield _cut(left, 0, rows), _cut(right, 0, rows)
        left = _cut(left, rows, None) if len(left[1].w) > rows else next(a, None)
        right = _cut(right, rows, None) if len(right[1].w) > rows else next(b, None)
    if left is not None or right is not None:
        raise ValueError("one side has more weights of a rule than the other")


def _cut(pair: tuple[Piece, SideWeight], first: int, stop: int | None) -> tuple[Piece, SideWeight]:
    piece, weight = pair
    rows = slice(first, stop)
    w = weight.w[rows]
    return Piece(piece.index, piece.start + first, w), SideWeight(w, _rows(weight.change, rows))


def _rows(change: LowRank | None, rows: slice) -> LowRank | None:
    """A weight's factors for a run of its rows."""
    return change if change is None or rows == slice(None) else change.matrices().rows(rows)
