"""Two states of one policy, read side by side: what `verify` and `diff` walk over.

A side is a checkpoint, or an adapter on its base. Walking gives, for every weight, what each side
holds of it: the values, and LoRA factors where they are unmerged. Both are streamed; one weight
of each is in memory (a run of rows, for an embedding) for every worker.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from bridge import converters
from bridge.arrays import FLOAT32
from bridge.checkpoint.checkpoint import Checkpoint, open_source, understand
from bridge.checkpoint.scales import Scale, scales
from bridge.errors import CheckpointRefused, Problem, RouteRefused, refuse_if
from bridge.formats.disk.location import Location
from bridge.lora.algebra import split
from bridge.rules.equation import Equation, Index
from bridge.rules.model import Model, Part
from bridge.rules.rule import Rule
from bridge.stream.inputs import Inputs, factor_reader, shape_problems, weights_reader
from bridge.stream.readers import Done, Factors, LeafFactors, Matrices, ModuleFactors, Piece, Read
from bridge.stream.workers import Load, schedule

T = TypeVar("T")

#: bytes that the weights in memory at once may take, where one alone does not need more
BUDGET = 700 << 20
#: what looking at one weight takes beside it
SCRATCH = 64 << 20


@dataclass(frozen=True)
class Side:
    """One of the two: its checkpoints, and the scales openpi's runtime gives its factors."""

    inputs: Inputs
    scales: Mapping[str, Scale] | None
    """None where factors are left out of account."""

    @property
    def checkpoint(self) -> Checkpoint:
        return self.inputs.source

    @property
    def is_jax(self) -> bool:
        """Whether the weights lie in a pytree, so that openpi's JAX code would run them."""
        return self.inputs.weights.layout is None

    @property
    def has_lora(self) -> bool:
        return self.checkpoint.state in (converters.ORBAX_LORA, converters.PEFT)


@dataclass(frozen=True)
class Held:
    """What a side holds of one weight (or of a run of its rows)."""

    w: np.ndarray
    """In the leaf's axes, placeholders taken out; the stored dtype."""
    factors: Factors | None = None
    """openpi's factors, in the leaf's axes."""
    matrices: Matrices | None = None
    """An adapter's factors."""

    @property
    def has_factors(self) -> bool:
        return self.factors is not None or self.matrices is not None

    def change(self, one: Equation) -> Matrices | None:
        """What the factors add to the weight, as two matrices in float32; None without factors.

        Args:
            one: equation of one weight.
        """
        if self.matrices is not None:
            a, b, scale = self.matrices.a, self.matrices.b, self.matrices.scale
        elif self.factors is not None:
            (a, b), scale = split(one, self.factors.a, self.factors.b), self.factors.scale
        else:
            return None
        return Matrices(a.astype(FLOAT32), b.astype(FLOAT32), scale)


@dataclass(frozen=True)
class Both:
    """One weight on both sides."""

    part: Part
    rule: Rule
    name: str
    """Its PyTorch name, in openpi's layout."""
    index: Index
    start: int
    a: Held
    b: Held


def open_side(
    path: str | Path,
    base: str | Path | None,
    lora_alpha: Mapping[str, float],
    rslora: bool,
    *,
    needs_scale: bool = True,
) -> Side:
    """Open a checkpoint, or an adapter with its base.

    Raises:
        Refusal: with every problem found.
    """
    checkpoint = understand(open_source(Location.parse(path)))
    problems = list(checkpoint.problems)
    if checkpoint.state is converters.PEFT:
        if base is None:
            raise RouteRefused(
                Problem(
                    f"{checkpoint.source.location} is an adapter, and its base is not given",
                    "add --base PATH",
                )
            )
        weights = understand(open_source(Location.parse(base)))
        inputs = Inputs(checkpoint, weights)
        problems += weights.problems
        if not problems:
            problems += shape_problems(inputs)
        refuse_if(problems, CheckpointRefused)
        return Side(inputs, {})
    refuse_if(problems, CheckpointRefused)
    if checkpoint.state is not converters.ORBAX_LORA or not needs_scale:
        return Side(Inputs(checkpoint), {} if needs_scale else None)
    found, problems = scales(checkpoint, lora_alpha, rslora)
    refuse_if(problems, CheckpointRefused)
    return Side(Inputs(checkpoint), found)


def same_model(a: Side, b: Side) -> Model:
    """The model both sides are of, with every size known from one of them.

    Raises:
        CheckpointRefused: they are different models or dimensions.
    """
    model = a.inputs.model
    if model.name != b.inputs.model.name or model.rules_key != b.inputs.model.rules_key:
        raise CheckpointRefused(
            Problem(
                f"{a.inputs.weights.source.location} is {model.name}, and {b.inputs.weights.source.location} is "
                f"{b.inputs.model.name}",
                "compare two checkpoints of one model",
            )
        )
    ours, theirs = a.inputs.weights.sizes, b.inputs.weights.sizes
    ranks = {
        model.qualified(part.name, rule.lora.rank) for part in model.parts for rule in part.rules if rule.lora
    }
    refuse_if(
        (
            Problem(
                f"{axis} is {ours[axis]} in {a.inputs.weights.source.location}, and {theirs[axis]} in "
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
class Walked(Generic[T]):
    """What a walk over two sides found."""

    looks: tuple[T, ...]
    """What was seen of every weight (every run of rows), in the order of the model's rules."""
    read: tuple[Mapping[Read, str], Mapping[Read, str]]
    """For each side: checksum of every array it read."""
    problems: tuple[Problem, ...]
    """Tied weights of a side that are stored twice and differ."""


def walk(
    a: Side,
    b: Side,
    look: Callable[[Both], T],
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Walked[T]:
    """Look at every weight on both sides.

    Rules are independent: several are walked at once, each in one thread, and what is found does
    not depend on how many.

    Args:
        a: one side.
        b: the other.
        look: called with a weight as both sides hold it, valid during the call; from any thread.
        workers: rules at once.
        progress: called with the bytes of weights looked at, and their total, on both sides.

    Raises:
        Refusal: a side cannot be read, or they are not of one model.
    """
    model = same_model(a, b)
    sizes = {**a.inputs.weights.sizes, **b.inputs.weights.sizes}
    # without a pytree on either side nothing tells heads apart, and nothing needs to
    flat = not (a.is_jax or b.is_jax)
    errands = [
        _Errand(a, b, part, rule, model.local_sizes(part.name, sizes), flat)
        for part in model.parts
        for rule in part.rules
    ]
    loads = [errand.load for errand in errands]
    ticker = _Ticker(sum(load.work for load in loads), progress)
    # a worker is a thread already: threads of the linear algebra's own would only wait for each other
    blas = threadpool_limits(1, user_api="blas")
    with blas, ThreadPoolExecutor(workers, thread_name_prefix="bridge") as threads:
        try:
            ended = schedule(
                lambda number: threads.submit(_run, errands[number], look, ticker),
                loads,
                workers=workers,
                budget=BUDGET,
            )
        finally:
            # on an error, errands under way end at their next weight
            ticker.stopped.set()
    done = [pair for _, pair in ended]
    return Walked(
        tuple(one for looks, _ in ended for one in looks),
        (
            {k: v for first, _ in done for k, v in first.read.items()},
            {k: v for _, second in done for k, v in second.read.items()},
        ),
        tuple(problem for pair in done for each in pair for problem in each.problems),
    )


@dataclass(frozen=True)
class _Errand:
    """One rule's weights on both sides."""

    a: Side
    b: Side
    part: Part
    rule: Rule
    sizes: dict[str, int]
    flat: bool

    @property
    def load(self) -> Load:
        found = [_load(side, self.rule, self.sizes, flat=self.flat) for side in (self.a, self.b)]
        return Load(sum(load.work for load in found), sum(load.memory for load in found) + SCRATCH)

    def weights(self, done: tuple[Done, Done]) -> Iterator[Both]:
        """Every weight as both sides hold it, valid until the next."""
        rule = self.rule.flat if self.flat else self.rule
        names = dict(self.rule.weights(self.sizes))
        with ExitStack() as stack:
            # files are closed where one side fails, not when its error is forgotten
            sides = [
                stack.enter_context(
                    closing(_pieces(side, self.part, self.rule, self.sizes, each, flat=self.flat))
                )
                for side, each in zip((self.a, self.b), done, strict=True)
            ]
            for (piece, held_a), (_, held_b) in _aligned(*sides):
                yield Both(self.part, rule, names[piece.index], piece.index, piece.start, held_a, held_b)


def _run(errand: _Errand, look: Callable[[Both], T], ticker: _Ticker) -> tuple[list[T], tuple[Done, Done]]:
    done = Done(), Done()
    looks = []
    for both in errand.weights(done):
        looks.append(look(both))
        ticker.add(both.a.w.nbytes + both.b.w.nbytes)
    return looks, done


class _Ticker:
    """Adds up bytes from several threads, and passes the sum on."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.stopped = threading.Event()
        self._total, self._progress = total, progress
        self._count = 0
        self._lock = threading.Lock()

    def add(self, seen: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
        with self._lock:
            self._count += seen
            if self._progress is not None:
                self._progress(min(self._count, self._total), self._total)


class _Stopped(Exception):
    """Raised inside an errand that is not needed any more."""


def _load(side: Side, rule: Rule, sizes: dict[str, int], *, flat: bool) -> Load:
    """What walking a rule's weights costs on one side."""
    weights, used, local = weights_reader(side.inputs, rule, sizes, flat=flat)
    specs = {read: side.inputs.spec(read) for read in weights.reads}
    equation = used.equation
    one = math.prod(local[axis] for axis in equation.one.left) * max(
        spec.dtype.itemsize for spec in specs.values()
    )
    if equation.streams and not equation.placeholders:
        one = 0  # its rows are looked at as they are read
    elif side.is_jax and not equation.in_order:
        # no weight is whole before the end of the leaf
        one *= math.prod(local[axis] for axis in equation.placeholders)
    memory = one + max(side.inputs.sources[key].buffered_bytes(name) for key, name in specs)
    names = dict(used.weights(local))
    reader = factor_reader(side.inputs, used, names, None)
    if isinstance(reader, LeafFactors) and side.scales is not None:
        memory += sum(side.inputs.spec(read).nbytes for read in reader.reads)
    return Load(sum(each.nbytes for each in specs.values()), memory)


Pieces = Generator[tuple[Piece, Held], None, None]


def _pieces(side: Side, part: Part, rule: Rule, sizes: dict[str, int], done: Done, *, flat: bool) -> Pieces:
    weights, used, local = weights_reader(side.inputs, rule, sizes, flat=flat)
    names = dict(used.weights(local))
    reader = factor_reader(side.inputs, used, names, (side.scales or {}).get(part.name))
    sources = side.inputs.sources
    modules = reader if isinstance(reader, ModuleFactors) else None
    factors_at = None
    if isinstance(reader, LeafFactors) and side.scales is not None:
        factors_at = reader.open(used, sources, done, None)
    runs = used.equation.streams and not used.equation.placeholders
    matrices: Matrices | None = None
    for number, piece in enumerate(weights.pieces(used, sources, done, None)):
        factors = factors_at(piece.index) if factors_at is not None else None
        if modules is not None and (number == 0 or not runs):
            matrices = modules.matrices(piece.index, sources, done, None)
        rows = slice(piece.start, piece.start + len(piece.w)) if runs else slice(None)
        yield piece, Held(piece.w, factors, _rows(matrices, rows))


def _aligned(a: Pieces, b: Pieces) -> Iterator[tuple[tuple[Piece, Held], tuple[Piece, Held]]]:
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


def _cut(pair: tuple[Piece, Held], first: int, stop: int | None) -> tuple[Piece, Held]:
    piece, held = pair
    rows = slice(first, stop)
    w = held.w[rows]
    return Piece(piece.index, piece.start + first, w), Held(w, held.factors, _rows(held.matrices, rows))


def _rows(matrices: Matrices | None, rows: slice) -> Matrices | None:
    """An adapter's factors of a run of the weight's rows."""
    return None if matrices is None else Matrices(matrices.a, matrices.b[rows], matrices.scale)
