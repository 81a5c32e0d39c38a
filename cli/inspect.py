"""``bridge inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bridge.checkpoint.options import SOURCE, OpenOptions
from bridge.display import abbreviated, byte_size

from .options import Command, GroupedOption, options
from .show import common, emit, say, style, table

if TYPE_CHECKING:
    from bridge import Description
    from bridge.checkpoint.describe import PartDescription


#: files that are named; --json has all
SHOWN = 20


@click.command(cls=Command)
@click.argument("path")
@options(OpenOptions)
@click.option(
    "--from", "from_", cls=GroupedOption, group=SOURCE, help="Format of PATH; detected automatically."
)
@common
def inspect(path: str, from_: str | None, as_json: bool, **options: Any) -> None:
    """Describe the checkpoint at PATH: format, model, dimensions, LoRA ranks, dtypes, what was trained, assets.

    Reads names, shapes and the small files beside the weights. Exit status 1 when a problem is found.
    """
    import bridge

    description = bridge.describe(path, from_, **options)
    if as_json:
        emit(description.as_json())
    else:
        _print(description)
    if description.problems:
        raise click.exceptions.Exit(1)


def _print(description: Description) -> None:
    say(f"{style(description.path, bold=True)}")
    suffix = ", leaves end in 'value' (saved by training)" if description.value_suffix else ""
    say(f"  state       {description.state}{suffix}")
    say(f"  model       {style(description.model, bold=True)}, names: {description.layout}")
    say(
        f"  parameters  {abbreviated(description.parameters)} in {description.arrays} arrays, "
        f"{byte_size(description.nbytes)} ({byte_size(description.stored_bytes)} stored)"
    )
    rows: list[tuple[str, ...]] = [("part", "parameters", "dtype", "dimensions", "LoRA", "trained")]
    rows += [_row(part) for part in description.parts]
    say("")
    table(rows)
    say("")
    if description.base:
        say(f"  base        {description.base}")
    shown = [*description.assets[:SHOWN]]
    if more := len(description.assets) - len(shown):
        shown.append(f"and {more} more")
    say(f"  assets      {', '.join(shown) or 'none'}")
    for fact in description.facts.values():
        say(f"  {fact['title']:<16}  {fact['text']} ({fact['origin']})")
    for remark in description.remarks:
        say(f"  {click.style('look at', fg='yellow')}     {remark}")
    for note in description.notes:
        say(f"  note        {note}")
    for problem in description.problems:
        say(f"  {style('problem', fg='red')}     {problem}")


def _row(part: PartDescription) -> tuple[str, ...]:
    sizes = " ".join(f"{axis} {count}" for axis, count in part.sizes.items())
    return (
        part.name,
        abbreviated(part.parameters),
        ", ".join(part.dtypes),
        sizes,
        _lora(part),
        part.trained,
    )


def _lora(part: PartDescription) -> str:
    if part.lora is None:
        return "none"
    ranks = part.lora["ranks"]
    alpha = part.lora["stock_alpha"]
    rank = "/".join(str(each) for each in dict.fromkeys(ranks.values()))
    dtypes = ", ".join(part.lora["dtypes"])
    if len(set(ranks.values())) > 1:
        named = dict.fromkeys(ranks.values())
        kinds = (f"{', '.join(sorted(m for m in ranks if ranks[m] == each))} {each}" for each in named)
        return f"ranks {'; '.join(kinds)}, {dtypes}"
    return f"rank {rank} {dtypes}, alpha {'not stored' if alpha is None else f'{alpha:g} (stock)'}"
