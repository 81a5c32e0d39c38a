"""The format graph: states a model can be in, converters between them, and the best route.

A state is a format *and what it contains*: a checkpoint with LoRA is another node than one
without, so no plain export leaves it and factors cannot be dropped unnoticed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, TypeVar

from bridge.errors import Problem, RouteRefused


class Loss(IntEnum):
    """What a conversion costs, from nothing to something that cannot be recovered."""

    EXACT = 0
    """Every value returns bit for bit."""
    EQUIVALENT = 1
    """The same function; numbers that cancel out may differ."""
    ROUNDED = 2
    """Values are rounded."""
    LOSSY = 3
    """Something is gone: factors summed into weights, or left out."""

    @classmethod
    def named(cls, name: str) -> Loss:
        """From its name in a record; those of version 0.1.0 are still read.

        >>> Loss.named("gauge")
        <Loss.EQUIVALENT: 1>
        """
        return cls[_OLD_LOSSES.get(name, name).upper()]


_OLD_LOSSES = {"gauge": "equivalent", "round": "rounded", "drop": "lossy"}


class Form(StrEnum):
    """What the arrays of a container are."""

    PYTREE = "pytree"
    """Leaves of a JAX pytree."""
    STATE_DICT = "state_dict"
    """Weights of a PyTorch model."""
    ADAPTER = "adapter"
    """LoRA factors of a PEFT adapter."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A node: a format, by the name users give it, and what it contains."""

    name: str
    contents: str
    """``"base"``, ``"base+lora"`` or ``"lora"``."""
    format: str
    """The container, as registered under ``bridge.formats``."""
    form: Form
    stripped: bool = False
    """Whether LoRA was left out of it: the base of an adapter."""

    def __str__(self) -> str:
        return f"{self.name}[{self.contents}]"


@dataclass(frozen=True, kw_only=True)
class Converter:
    """An edge, from state to state."""

    name: str
    source: State
    target: State
    loss: Loss
    summary: str
    build: Callable[..., Any]
    """Plans what is written to the target."""
    fold: bool = False
    """Whether LoRA factors are summed into the weights on the way."""
    last: bool = False
    """Whether it is only taken to a target asked for by name, never on the way to another."""
    alone: bool = False
    """Whether it is only taken as a whole route: on the way to or from elsewhere, another edge does what it does."""
    needs: frozenset[str] = frozenset()
    """Inputs beside the source: ``"base"``."""


Route = tuple[Converter, ...]

Edge = TypeVar("Edge", bound=Converter)


def route(
    converters: Iterable[Edge],
    source: State,
    target: str,
    given: Collection[str] = (),
    contents: str | None = None,
) -> tuple[Edge, ...]:
    """The route with the least worst loss, then the fewest hops (Dijkstra).

    Args:
        converters: the edges.
        source: the state the source is in.
        target: the name of the format asked for.
        given: inputs beside the source that the user gave (``"base"``).
        contents: what the target must contain, where its format has several states.

    Raises:
        RouteRefused: there is none; the fix says what would open one.
    """
    edges = tuple(converters)
    best = _dijkstra([edge for edge in edges if edge.needs <= set(given)], source, target, contents)
    if best is not None:
        return best
    wanting = _dijkstra(edges, source, target, contents)
    if wanting is not None:
        needs = sorted(frozenset().union(*(edge.needs for edge in wanting)) - set(given))
        raise RouteRefused(
            Problem(
                f"no route from {source} to {target} without a {' and a '.join(needs)}",
                "add " + " ".join(f"--{need} PATH" for need in needs),
            )
        )
    reachable = sorted(
        {edge.target.name for edge in edges if _dijkstra(edges, source, edge.target.name, None)}
    )
    raise RouteRefused(
        Problem(
            f"no route from {source} to {target}",
            f"from {source} bridge converts to {', '.join(reachable)}"
            if reachable
            else "nothing leads out of it",
        )
    )


def _dijkstra(
    edges: Collection[Edge], source: State, target: str, contents: str | None
) -> tuple[Edge, ...] | None:
    # the number breaks ties by the order of declaration, and keeps routes out of comparisons
    queue: list[tuple[Loss, int, int, State, tuple[Edge, ...]]] = [(Loss.EXACT, 0, 0, source, ())]
    done: set[State] = set()
    number = 0
    while queue:
        loss, hops, _, state, path = heapq.heappop(queue)
        if path and state.name == target and contents in (None, state.contents):
            return path
        if path and (path[-1].last or path[-1].alone):
            continue
        if state in done:
            continue
        done.add(state)
        for edge in edges:
            if edge.source == state and not (edge.alone and path):
                number += 1
                heapq.heappush(queue, (max(loss, edge.loss), hops + 1, number, edge.target, (*path, edge)))
    return None


def mermaid(converters: Iterable[Converter]) -> str:
    """The graph as a mermaid flowchart."""
    edges = tuple(converters)
    states = dict.fromkeys(state for edge in edges for state in (edge.source, edge.target))
    lines = ["flowchart LR", *(f'    {_id(state)}["{state}"]' for state in states)]
    for edge in edges:
        needs = "".join(f" + {need}" for need in sorted(edge.needs))
        lines.append(
            f'    {_id(edge.source)} -- "{edge.name}{needs}: {edge.loss.name.lower()}" --> {_id(edge.target)}'
        )
    return "\n".join(lines)


def _id(state: State) -> str:
    return str(state).replace("-", "_").replace("[", "_").replace("]", "").replace("+", "_")
