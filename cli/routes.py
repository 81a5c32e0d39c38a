"""``bridge routes``."""

from __future__ import annotations

import json

import click

from bridge.converters import CONVERTERS, STATES, TARGETS
from bridge.graph import Converter, mermaid, route

from .show import common, say


@click.command()
@click.argument(
    "from_", metavar="[FROM]", required=False, type=click.Choice(sorted({s.name for s in STATES}))
)
@click.argument("to", metavar="[TO]", required=False, type=click.Choice(TARGETS))
@click.option("--mermaid", "as_mermaid", is_flag=True, help="Print the graph as a mermaid flowchart.")
@common
def routes(from_: str | None, to: str | None, as_mermaid: bool, as_json: bool) -> None:
    """Show what bridge converts: the whole graph, what leads out of FROM, or the way FROM TO.

    Each line is a converter with its loss: exact, gauge (the same function, other numbers), round
    (values are rounded) or drop (something is gone).
    """
    if as_mermaid:
        click.echo(mermaid(CONVERTERS))
        return
    if from_ is None:
        edges = list(CONVERTERS)
    elif to is None:
        edges = [edge for edge in CONVERTERS if edge.source.name == from_]
    else:
        starts = [state for state in STATES if state.name == from_]
        edges = list(dict.fromkeys(edge for state in starts for edge in route(CONVERTERS, state, to)))
    if as_json:
        click.echo(json.dumps({"converters": [_as_json(edge) for edge in edges]}, indent=2))
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
