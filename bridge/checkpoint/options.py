"""The options of every verb that reads policies: what a checkpoint does not record about itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from bridge.formats.disk.bucket import TIMEOUT
from bridge.graph import State
from bridge.rules.option import (
    ByName,
    ByPart,
    File,
    Flag,
    Number,
    Option,
    PathOrUrl,
    Text,
    Texts,
    documented,
)

SOURCE = "Source"


def _beside_an_adapter(source: State, target: State) -> bool:
    return "lora" in (source.contents, target.contents)


class OpenOptions(TypedDict, total=False):
    """Options of every verb that opens a checkpoint: what its path does not tell."""

    item: Annotated[
        str | None,
        Option(
            kind=Text("NAME"),
            group=SOURCE,
            help="Which of several sets of weights to read where a directory or file has more: an item of a "
            "checkpoint manager, the base or the adapter of a whole model with LoRA.",
        ),
    ]
    size: Annotated[
        Mapping[str, int] | None,
        Option(
            kind=ByName("AXIS=N"),
            group=SOURCE,
            help="Size of an axis that shapes do not determine, such as a number of heads. Repeatable.",
        ),
    ]
    config: Annotated[
        str | Path | None,
        Option(kind=File(), group=SOURCE, help="A config.json to take such sizes from."),
    ]
    leave_out: Annotated[
        Sequence[str],
        Option(
            kind=Texts("PATTERN"),
            group=SOURCE,
            help="Names of arrays to leave out that the model does not have, such as 'value_head.*'. Repeatable.",
        ),
    ]
    timeout: Annotated[
        float,
        Option(
            kind=Number("SECONDS", whole=False),
            default=TIMEOUT,
            group=SOURCE,
            help="How long to wait for a bucket (gs://, s3://) to answer.",
        ),
    ]


class SourceOptions(OpenOptions, total=False):
    """Options of every verb that reads policies."""

    base: Annotated[
        str | Path | None,
        Option(
            kind=PathOrUrl(),
            group=SOURCE,
            help="Base checkpoint that an adapter applies to, or is compared with. An adapter's own is used "
            "where it lies in base/ in its directory, or its adapter_config.json names a local path.",
            fits=_beside_an_adapter,
        ),
    ]
    base_differs: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=SOURCE,
            help="Apply an adapter to another base than the one it was made for. The plan reports how far it is.",
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


OpenOptions.__doc__ = documented(OpenOptions)
SourceOptions.__doc__ = documented(SourceOptions)


def alphas_of(options: SourceOptions) -> dict[str, float]:
    """``lora_alpha`` by part; ``""`` stands for all parts that are not named."""
    given = options["lora_alpha"]
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {"": given}
