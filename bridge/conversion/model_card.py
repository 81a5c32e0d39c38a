"""The README that is written beside an adapter: what it is and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bridge.conversion.request import Request
from bridge.display import with_article
from bridge.peft.config import A, module_of
from bridge.rules.family import Family
from bridge.rules.model import Model
from bridge.stream.output import Output


def model_card(request: Request, adapter: Output) -> bytes:
    """The card, as Markdown, of factors that come from the family's runtime."""
    family, options = request.inputs.source.family, request.options
    alpha = (
        f"{family.runtime} applies no scale, so alpha equals the rank everywhere."
        if not request.scales
        else f"Factors are as {family.runtime} trained them; alpha / rank in `adapter_config.json` is its scale."
        if options["keep_alpha"]
        else f"The scale of {family.runtime} is folded into `lora_B`, so alpha equals the rank everywhere."
    )
    unscaled = (
        f" {family.unscaled.capitalize()} has scale 1, as in {family.runtime}." if family.unscaled else ""
    )
    trained = (
        f": a LoRA run of {family.runtime} trains {family.trained_beside} in full, and on another base it is "
        f"another {family.noun}"
        if family.trained_beside
        else ""
    )
    base = (
        "Its base is in `base/`."
        if options["with_base"]
        else f"Apply it to the base it was trained on{trained}."
    )
    told = " ".join((alpha + unscaled, *_blocks(request)))
    return card(request, adapter, _scale_rows(request), told, base)


def card(request: Request, adapter: Output, rows: Iterable[str], told: str, base: str) -> bytes:
    """The card of any adapter.

    Args:
        request: what it is made from.
        adapter: the files.
        rows: of a table of parts, with rank, alpha and scale.
        told: what must be known of ranks and alphas.
        base: what it is for.
    """
    family = request.inputs.source.family
    modules = sum(name.endswith(A) for name in adapter.specs)
    parameters = sum(spec.size for spec in adapter.specs.values())
    lines = [
        "---",
        "library_name: peft",
        "---",
        "",
        f"# LoRA adapter of {with_article(_named(family, request.inputs.model))} {family.noun}",
        "",
        f"{modules} modules, {parameters} parameters, module paths of {adapter.layout.name}. {base}",
        "",
        f"| {family.part_noun} | rank | alpha | scale |",
        "|---|---|---|---|",
        *rows,
        "",
        told,
        "",
        *(("```python", adapter.layout.loading, "```", "") if adapter.layout.loading else ()),
        "Written by bridge (openpi-bridge); `bridge.json` records from what.",
        "",
    ]
    return "\n".join(lines).encode()


def _named(family: Family, model: Model) -> str:
    """The runtime and the model, where they are not one name."""
    same = family.runtime.casefold() == model.name.casefold()
    return family.runtime if same else f"{family.runtime} {model.name}"


def _scale_rows(request: Request) -> Iterator[str]:
    """A row for each part that has factors."""
    checkpoint = request.inputs.source
    for part in checkpoint.model.parts:
        scale, ranks = request.scales.get(part.name), checkpoint.ranks_of(part)
        if scale is not None:
            yield f"| {part.name} | {scale.rank} | {scale.alpha:g} | {scale.value:g} |"
        elif ranks:
            yield f"| {part.name} | {', '.join(map(str, dict.fromkeys(ranks.values())))} | – | 1 |"


def _blocks(request: Request) -> list[str]:
    """Why some modules have a larger rank in PEFT."""
    kept = {
        module_of(rule.weight).rpartition(".")[2]: " and ".join(rule.factor_axes.kept)
        for _, rule in request.inputs.source.lora_rules()
        if rule.factor_axes.kept and not rule.template.choices
    }
    return [
        f"In PEFT, `{module}` has the rank times the number of {axes}s, because every {axes} has factors of its own."
        for module, axes in kept.items()
    ]
