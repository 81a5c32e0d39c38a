"""The options of a conversion, each declared here and nowhere else."""

from collections.abc import Mapping
from typing import Annotated, Any

from bridge.checkpoint.options import SOURCE, SourceOptions
from bridge.graph import Form, State
from bridge.rules.option import ByPart, Choice, Flag, Number, Option, Text, documented

OUTPUT = "Output"
ADAPTER = "PEFT adapter (--to peft-adapter)"
TREE = "JAX checkpoint (--to orbax)"


def _makes_adapter(source: State, target: State) -> bool:
    return target.form is Form.ADAPTER


def _splits_adapter(source: State, target: State) -> bool:
    """Whether factors become an adapter's: those of an adapter stay as they are."""
    return target.form is Form.ADAPTER and source.form is not Form.ADAPTER


def _makes_tree(source: State, target: State) -> bool:
    return target.form is Form.PYTREE


def _makes_tensors(source: State, target: State) -> bool:
    return target.form is not Form.PYTREE


def _makes_lora_leaves(source: State, target: State) -> bool:
    return target.contents == "base+lora"


def _makes_weights(source: State, target: State) -> bool:
    return target.form is not Form.ADAPTER


def _makes_lora(source: State, target: State) -> bool:
    return "lora" in target.contents


class Options(SourceOptions, total=False):
    """Options of :func:`bridge.plan`, and of all that plans a conversion."""

    from_: Annotated[
        str | None,
        Option(kind=Text("FORMAT"), group=SOURCE, help="Format of SRC; detected automatically by default."),
    ]
    no_check: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=SOURCE,
            help="Convert a source that has changed since bridge wrote it: skip the checksums in its bridge.json.",
        ),
    ]
    dtype: Annotated[
        str | None,
        Option(
            # a test compares these with bridge.arrays, which would cost the command's --help numpy
            kind=Choice("keep", "float32", "bfloat16", "float16"),
            group=OUTPUT,
            help="dtype to write. Default: bfloat16 from JAX to torch-merged; float32 when LoRA is merged; the "
            "source's own otherwise, tensor by tensor. 16-bit output keeps in float32 what the runtime keeps in "
            "float32, such as norms.",
        ),
    ]
    layout: Annotated[
        str | None,
        Option(
            kind=Text("NAME"),
            group=OUTPUT,
            help="Weight naming scheme; the model's first by default.",
            fits=_makes_tensors,
        ),
    ]
    rank: Annotated[
        int | Mapping[str, int] | None,
        Option(
            kind=ByPart("[PART=]RANK", whole=True, exclusive=True),
            group=OUTPUT,
            help="With --to peft-adapter: compress all modules to this rank, by SVD. With --to orbax: rank of the "
            "LoRA leaves. Repeatable.",
            fits=_makes_lora,
        ),
    ]
    overwrite: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=OUTPUT,
            help="Replace DST if bridge wrote it, once the new output is complete.",
        ),
    ]
    keep_alpha: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=ADAPTER,
            help="Keep factors unchanged; store the scale in lora_alpha.",
            fits=_splits_adapter,
        ),
    ]
    with_base: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=ADAPTER,
            help="Also write the base that the adapter applies to, into DST/base.",
            fits=_makes_adapter,
        ),
    ]
    base_name: Annotated[
        str | None,
        Option(
            kind=Text("NAME"),
            group=ADAPTER,
            help="Value of base_model_name_or_path in adapter_config.json.",
            fits=_makes_adapter,
        ),
    ]
    modules_to_save: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=ADAPTER,
            help="Store the weights that differ from --base in the adapter.",
            fits=_splits_adapter,
        ),
    ]
    fold: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=TREE,
            help="Merge the adapter into the weights instead of writing LoRA leaves.",
            fits=_makes_tree,
        ),
    ]
    lossy: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=TREE,
            help="Approximate, by SVD, factors that do not fit the rank of the LoRA leaves.",
            fits=_makes_lora_leaves,
        ),
    ]
    seed: Annotated[
        int,
        Option(
            kind=Number(positive=False),
            default=0,
            group=OUTPUT,
            help="Seed of what no source has and is drawn as the runtime would draw it: LoRA that an adapter lacks, "
            "entries that pad an axis.",
            fits=_makes_weights,
        ),
    ]
    value_suffix: Annotated[
        bool,
        Option(
            kind=Flag(),
            group=TREE,
            help="End leaf names with 'value', as training checkpoints do.",
            fits=_makes_tree,
        ),
    ]
    settings: Mapping[str, Any]
    """Options of families, by keyword, for typed callers; others pass them as keywords of the verb."""


Options.__doc__ = documented(Options)


def compress_to(options: Options) -> int | None:
    """The rank that every module of an adapter is compressed to, if any."""
    rank = options["rank"]
    return rank if isinstance(rank, int) else None
