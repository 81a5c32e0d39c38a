"""The options of every verb that reads policies: what a checkpoint does not record about itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypedDict

from bridge.graph import State
from bridge.rules.option import ByPart, Flag, Number, Option, PathOrUrl, documented

SOURCE = "Source"


def _beside_an_adapter(source: State, target: State) -> bool:
    return "lora" in (source.contents, target.contents)


class SourceOptions(TypedDict, total=False):
    """Options of every verb that reads policies."""

    base: Annotated[
        str | Path | None,
        Option(
            kind=PathOrUrl(),
            group=SOURCE,
            help="Base checkpoint that an adapter applies to, or is compared with.",
            fits=_beside_an_adapter,
        ),
    ]
    lora_alpha: Annotated[
        float | Mapping[str, float] | None,
        Option(
            kind=ByPart("[PART=]ALPHA"),
            group=SOURCE,
            help="LoRA alpha of the training config, when it cannot be inferred from the rank or bridge.json. "
            "Repeatable.",
            fix="give a positive number, from the training config's LoRAConfig",
        ),
    ]
    rslora: Annotated[
        bool,
        Option(kind=Flag(), group=SOURCE, help="The run used rsLoRA scaling: alpha / sqrt(rank)."),
    ]
    workers: Annotated[int, Option(kind=Number(), default=2, help="Worker threads.")]


SourceOptions.__doc__ = documented(SourceOptions)


def alphas_of(options: SourceOptions) -> dict[str, float]:
    """``lora_alpha`` by part; ``""`` stands for all parts that are not named."""
    given = options["lora_alpha"]
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {"": given}
