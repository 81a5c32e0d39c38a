"""The converters: which form and contents become which, at what loss, and who plans it.

The graph is this table, laid over the states of the installed formats: a container that a plug-in
brings is converted from and to as soon as it says what its arrays are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from bridge.checkpoint.inputs import Inputs
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.checkpoint.options import alphas_of
from bridge.checkpoint.scales import scales
from bridge.conversion.adapter_relayout import build_relaid_adapter
from bridge.conversion.lora_leaves import joined_scales
from bridge.conversion.options import Options
from bridge.conversion.request import Built, Request
from bridge.conversion.to_adapter import build_adapter
from bridge.conversion.to_pytree import build_pytree
from bridge.conversion.to_state_dict import build_state_dict
from bridge.conversion.tree_relayout import build_relaid_tree, relaid_scales
from bridge.errors import Problem
from bridge.formats.contract import format_named, states
from bridge.graph import Converter, Form, Loss, State
from bridge.lora.factors import Scale

Scaling = Callable[[Inputs, Options], tuple[dict[str, int], dict[str, Scale], list[Problem]]]
"""By part: ranks of the LoRA leaves to be written, and what the runtime multiplies products by."""


def own_scales(inputs: Inputs, options: Options) -> tuple[dict[str, int], dict[str, Scale], list[Problem]]:
    """The scales of the source's own factors."""
    if isinstance(inputs.source, AdapterCheckpoint) and inputs.source.alphas_given:
        return {}, {}, []  # they are in the scale of every module
    return {}, *scales(inputs.source, alphas_of(options), options["rslora"])


def no_scales(inputs: Inputs, options: Options) -> tuple[dict[str, int], dict[str, Scale], list[Problem]]:
    """None, unless scales are given: then they must be of use."""
    return own_scales(inputs, options) if alphas_of(options) or options["rslora"] else ({}, {}, [])


@dataclass(frozen=True, kw_only=True)
class Edge(Converter):
    """A converter of this table."""

    build: Callable[[Request], Built]
    scaling: Scaling = no_scales


_PYTREE = State(name="", contents="base", format="", form=Form.PYTREE)
_FACTORED = replace(_PYTREE, contents="base+lora")
_WEIGHTS = State(name="", contents="base", format="", form=Form.STATE_DICT)
_STRIPPED = replace(_WEIGHTS, stripped=True)
_ADAPTER = State(name="", contents="lora", format="", form=Form.ADAPTER)
_BASE = frozenset({"base"})

ROWS = (
    Edge(
        name="export", source=_PYTREE, target=_WEIGHTS, loss=Loss.EXACT,
        summary="rename, transpose, reshape", build=build_state_dict,
    ),
    Edge(
        name="fold", source=_FACTORED, target=_WEIGHTS, loss=Loss.LOSSY, fold=True,
        summary="LoRA merged, factors discarded", build=build_state_dict, scaling=own_scales,
    ),
    Edge(
        name="split", source=_FACTORED, target=_ADAPTER, loss=Loss.EQUIVALENT,
        summary="LoRA factors as PEFT tensors, unmerged", build=build_adapter, scaling=own_scales,
    ),
    Edge(
        name="strip", source=_FACTORED, target=_STRIPPED, loss=Loss.LOSSY, last=True,
        summary="LoRA left out: the base of an adapter", build=build_state_dict,
    ),
    Edge(
        # alone: an adapter is not joined to be folded, it is merged
        name="fold", source=_FACTORED, target=_PYTREE, loss=Loss.LOSSY, fold=True, alone=True,
        summary="LoRA merged, factors discarded", build=build_pytree, scaling=own_scales,
    ),
    Edge(
        name="import", source=_WEIGHTS, target=_PYTREE, loss=Loss.EXACT,
        summary="stack, transpose, reshape", build=build_pytree,
    ),
    Edge(
        name="import", source=_STRIPPED, target=_PYTREE, loss=Loss.EXACT,
        summary="stack, transpose, reshape", build=build_pytree,
    ),
    Edge(
        name="join", source=_ADAPTER, target=_FACTORED, loss=Loss.EQUIVALENT, needs=_BASE,
        summary="an adapter beside its base, unmerged", build=build_pytree, scaling=joined_scales,
    ),
    Edge(
        name="merge", source=_ADAPTER, target=_WEIGHTS, loss=Loss.LOSSY, fold=True, needs=_BASE,
        summary="an adapter merged into its base", build=build_state_dict,
    ),
    Edge(
        name="relayout", source=_PYTREE, target=_PYTREE, loss=Loss.EXACT, alone=True,
        summary="other suffix or dtype", build=build_pytree,
    ),
    Edge(
        name="relayout", source=_FACTORED, target=_FACTORED, loss=Loss.EXACT, alone=True,
        summary="other suffix, dtype or rank", build=build_relaid_tree, scaling=relaid_scales,
    ),
    Edge(
        name="relayout", source=_ADAPTER, target=_ADAPTER, loss=Loss.EXACT, alone=True,
        summary="other names, dtype or rank", build=build_relaid_adapter,
    ),
    *(
        Edge(
            name="relayout", source=source, target=target, loss=Loss.EXACT, alone=True,
            summary="other names or dtype", build=build_state_dict,
        )
        for source in (_WEIGHTS, _STRIPPED)
        for target in (_WEIGHTS, _STRIPPED)
    ),
)  # fmt: skip


@cache
def converters() -> tuple[Edge, ...]:
    """Every converter between states of the installed formats; none to a format that is only read."""
    return tuple(
        replace(row, source=source, target=target)
        for row in ROWS
        for source in states()
        if _is(source, row.source)
        for target in states()
        if _is(target, row.target) and format_named(target.format).create is not None
    )


def _is(state: State, kind: State) -> bool:
    return (state.form, state.contents, state.stripped) == (kind.form, kind.contents, kind.stripped)


def targets() -> tuple[str, ...]:
    """What ``--to`` accepts."""
    return tuple(dict.fromkeys(edge.target.name for edge in converters()))
