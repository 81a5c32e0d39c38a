"""The format graph: states a policy can be in, converters between them, and the best route.

A state is a format *and what it holds*: a checkpoint with LoRA is another node than one
without, so no plain export leaves it and factors cannot be dropped unnoticed.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum

from bridge.errors import Problem, RouteRefused


class Loss(IntEnum):
    """What a conversion costs, from nothing to something that cannot be had back."""

    EXACT = 0
    """Every value returns bit for bit."""
    GAUGE = 1
    """The same function; numbers that cancel out may differ."""
    ROUND = 2
    """Values are rounded."""
    DROP = 3
    """Something is gone: factors summed into weights, or left out."""


@dataclass(frozen=True)
class State:
    """A node: a format, by the name users give it, and what it holds."""

    name: str
    holds: str
    format: str
    """The container, as registered under ``bridge.formats``."""

    def __str__(self) -> str:
        return f"{self.name}[{self.holds}]"


@dataclass(frozen=True)
class Converter:
    """An edge, from state to state."""

    name: str
    source: State
    target: State
    loss: Loss
    summary: str
    fold: bool = False
    """Whether LoRA factors are summed into the weights on the way."""
    last: bool = False
    """Whether it is only taken to a target asked for by name, never on the way to another."""
    needs: frozenset[str] = frozenset()
    """Inputs beside the source: ``"base"``."""


Route = tuple[Converter, ...]


def route(
    converters: Iterable[Converter],
    source: State,
    target: str,
    given: Collection[str] = (),
    holds: str | None = None,
) -> Route:
    """The route with the least worst loss, then the fewest hops (Dijkstra).

    Args:
        converters: the edges.
        source: the state the source is in.
        target: the name of the format asked for.
        given: inputs beside the source that the user gave (``"base"``).
        holds: what the target must hold, where its format can hold several things.

    Raises:
        RouteRefused: there is none; the fix says what would open one.
    """
    edges = tuple(converters)
    found = _dijkstra([edge for edge in edges if edge.needs <= set(given)], source, target, holds)
    if found is not None:
        return found
    wanting = _dijkstra(edges, source, target, holds)
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


def _dijkstra(edges: Collection[Converter], source: State, target: str, holds: str | None) -> Route | None:
    # the number breaks ties by the order of declaration, and keeps routes out of comparisons
    queue: list[tuple[Loss, int, int, State, Route]] = [(Loss.EXACT, 0, 0, source, ())]
    done: set[State] = set()
    number = 0
    while queue:
        loss, hops, _, state, path = heapq.heappop(queue)
        if path and state.name == target and holds in (None, state.holds):
            return path
        if state in done or (path and path[-1].last):
            continue
        done.add(state)
        for edge in edges:
            if edge.source == state:
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
