"""``bridge routes``."""

from __future__ import annotations

import click

from bridge.graph import Converter, mermaid, route

from .convert import targets
from .options import Names
from .show import common, emit, say


def sources() -> list[str]:
    """The formats that can be read."""
    from bridge.formats.contract import states

    return sorted({state.name for state in states()})


@click.command()
@click.argument("from_", metavar="[FROM]", required=False, type=Names(sources))
@click.argument("to", metavar="[TO]", required=False, type=Names(targets))
@click.option("--mermaid", "as_mermaid", is_flag=True, help="Print the graph as a mermaid flowchart.")
@common
def routes(from_: str | None, to: str | None, as_mermaid: bool, as_json: bool) -> None:
    """Show what bridge converts: the whole graph, what leads out of FROM, or the route FROM → TO.

    Each line is a converter with its loss: exact, equivalent (the same function, other numbers), rounded
    (values are rounded) or lossy (something is gone).
    """
    from bridge.conversion.converters import converters
    from bridge.formats.contract import states

    if as_mermaid:
        for line in mermaid(converters()).split("\n"):
            say(line)
        return
    if from_ is None:
        edges = list(converters())
    elif to is None:
        edges = [edge for edge in converters() if edge.source.name == from_]
    else:
        starts = [state for state in states() if state.name == from_]
        edges = list(dict.fromkeys(edge for state in starts for edge in route(converters(), state, to)))
    if as_json:
        emit({"converters": [_as_json(edge) for edge in edges]})
        return
    if not edges:
        say(f"nothing leads out of {from_}")
        return
    rows = [
        (
            edge.name,
            " + ".join((str(edge.source), *sorted(edge.needs))),
            str(edge.target),
            edge.loss.name.lower(),
            edge.summary,
        )
        for edge in edges
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, source, target, loss, summary in rows:
        say(
            f"{name:{widths[0]}}  {source:{widths[1]}} -> {target:{widths[2]}}  "
            f"{loss:{widths[3]}}  {summary}".rstrip()
        )


def _as_json(edge: Converter) -> dict[str, object]:
    return {
        "name": edge.name,
        "from": str(edge.source),
        "to": str(edge.target),
        "loss": edge.loss.name.lower(),
        "needs": sorted(edge.needs),
        "summary": edge.summary,
    }
