"""A PEFT adapter, understood: which weights it changes, by which factors and scale.

Any LoRA adapter over a known model's modules is read, in any layout of their names. Everything
PEFT would ignore is a problem here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bridge.arrays import WEIGHT_DTYPES, Spec
from bridge.checkpoint.adapter_lost import lost_problems
from bridge.checkpoint.adapter_model import Match, model_names, possible_models
from bridge.checkpoint.checkpoint import Checkpoint, Module
from bridge.checkpoint.foreign import lora_kind, never_left_out, quantised
from bridge.checkpoint.kinds import AdapterCheckpoint
from bridge.checkpoint.leave_out import pattern_for
from bridge.checkpoint.problems import Alike, unknown
from bridge.checkpoint.trainers import FACTOR
from bridge.display import and_more
from bridge.errors import CheckpointRefused, Problem, refuse_if
from bridge.formats.contract import Source
from bridge.formats.safetensors.peft import CONFIG
from bridge.peft.config import MERGE, PREFIX, A, AdapterConfig, B, read_config
from bridge.rules.names import grouped

RESAVE = "save the whole adapter again with PEFT's save_pretrained"


def understand_adapter(source: Source, base: Checkpoint | None = None) -> AdapterCheckpoint:
    """Work out which weights an adapter belongs to: those of the model that has most of its modules.

    Args:
        source: the adapter.
        base: what it applies to, which decides between models that have the same modules, and tells how
            many layers there are.

    Raises:
        CheckpointRefused: its modules are of no supported model.
    """
    specs = source.specs
    names = {name: _weight_of(name) for name in specs}
    possible, problems = possible_models(source, names, base)
    where = str(source.location)
    config, unread = read_config(source.metadata[CONFIG], f"{where}/{CONFIG}", len(specs) // 2)
    if not possible:
        # another method has other names: that it is another is what must be said
        refuse_if(unread, CheckpointRefused)
        raise unknown(source, names)
    problems += unread
    match = possible[0]
    model, layout, places = match.model, match.layout, match.places
    unused = model.spare(layout)
    unapplied = {name: unused[weight] for name, weight in names.items() if weight in unused}
    strays = {name: weight for name, weight in names.items() if name not in unapplied}
    problems += _strays(where, strays, possible, source.metadata[CONFIG])
    modules: dict[str, Module] = {}
    saved: dict[str, str] = {}
    faults = Alike(where)
    for weight, place in places.items():
        module = weight.rpartition(".")[0]
        a, b = f"{PREFIX}{module}{A}", f"{PREFIX}{module}{B}"
        if a in specs or b in specs:
            _check_pair(specs, faults, module, a, b)
            if len(place.rule.equation.right) != 2:
                faults.add(module, "has LoRA factors but is not a 2-D weight", "merge it in PEFT instead")
            if config is not None and a in specs and b in specs:
                made = _module(specs, config, f"{where}/{CONFIG}", faults, module, a, b)
                if isinstance(made, Problem):
                    problems.append(made)
                elif made is not None:
                    modules[place.weight] = made
        stored = PREFIX + weight
        if stored in specs:
            saved[place.weight] = stored
            if config is not None and not config.saves(module):
                faults.add(stored, "would overwrite the base, but modules_to_save does not name it", RESAVE)
    foreign = {dtype for dtype in {spec.dtype for spec in specs.values()} if dtype.name not in WEIGHT_DTYPES}
    for name, spec in specs.items():
        if spec.dtype in foreign:
            faults.add(name, f"has dtype {spec.dtype.name}", f"save it as one of {', '.join(WEIGHT_DTYPES)}")
        if spec.size == 0:
            faults.add(name, f"has shape {list(spec.shape)}, which has no elements", RESAVE)
    problems += faults.problems
    # of models that share modules, each has others as well: what must be there is known once one is left
    if isinstance(config, AdapterConfig) and len(model_names(possible)) == 1:
        problems += lost_problems(
            source, config, match, base if base and base.model.name == model.name else None
        )
    return AdapterCheckpoint(
        source=source,
        family=match.family,
        model=model,
        layout=layout,
        stored=saved,
        sizes={},
        problems=tuple(dict.fromkeys(problems)),
        factors=modules,
        unapplied=unapplied,
        possible=tuple(dict.fromkeys(match.model.name for match in possible)),
    )


def _weight_of(name: str) -> str:
    """The weight that an adapter's tensor changes or replaces."""
    name = name.removeprefix(PREFIX)
    for ending in (A, B):
        if name.endswith(ending):
            return name.removesuffix(ending) + ".weight"
    return name


def _strays(
    where: str, names: Mapping[str, str], possible: Sequence[Match], config: Mapping[str, Any]
) -> list[Problem]:
    family, model, layout = possible[0].family, possible[0].model, possible[0].layout
    places, models = possible[0].places, " or ".join(model_names(possible))
    biased = config.get("bias", "none") != "none"
    strays = {
        name: weight for name, weight in names.items() if weight not in places or not name.startswith(PREFIX)
    }
    tied = {
        layout.rename(alias): layout.rename(of)
        for alias, of in model.tied.items()
        if not {alias, of} & model.applied
    }
    problems = [
        Problem(
            f"{where}: {name} changes {strays[name]} alone, and {family.runtime} has one tensor for it and "
            f"{tied[strays[name]]}",
            "use this adapter in PyTorch, on a base with two",
        )
        for name in strays
        if strays[name] in tied
    ]
    others = grouped(name for name, weight in strays.items() if weight not in tied)
    if quantiser := quantised(where, others):
        return [*problems, *quantiser]  # its state would not be there for an adapter alone
    of_kinds: dict[tuple[str, str], list[str]] = {}
    for name in others:
        of_kinds.setdefault(lora_kind(name), []).append(name)
    for (field, kind), members in of_kinds.items():
        if kind and not config.get(field):
            lost = f", and the config does not say {field}: PEFT would run without it" if field else ""
            cause = f"{and_more(members)} {kind}{lost or ', which bridge does not convert'}"
            problems.append(
                Problem(
                    f"{where}: {cause}", f"put back the {CONFIG} that was saved with it" if lost else MERGE
                )
            )
    # the config is refused for the biases that it declares
    rest = (name for name in of_kinds.get(("", ""), ()) if not (biased and name.endswith(".bias")))
    return problems + [
        Problem(
            f"{where}: {name} does not belong to any {models} module; PEFT would ignore it",
            RESAVE
            if FACTOR.fullmatch(name) or never_left_out(name)
            else f"{RESAVE}, or add --leave-out {pattern_for(name)!r}",
        )
        for name in rest
    ]


def _check_pair(specs: Mapping[str, Spec], faults: Alike, module: str, a: str, b: str) -> None:
    """Both factors of a module are there, and fit each other."""
    missing = [name for name in (a, b) if name not in specs]
    if missing:
        faults.add(missing[0], "is missing; PEFT would silently run without it", RESAVE)
        return
    shape_a, shape_b = specs[a].shape, specs[b].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        faults.add(
            module, f"has lora_A {list(shape_a)} and lora_B {list(shape_b)}, which do not match", RESAVE
        )


def _module(
    specs: Mapping[str, Spec], config: AdapterConfig, where: str, faults: Alike, module: str, a: str, b: str
) -> Module | Problem | None:
    """The factors of one module, or the problem that its config cannot be read in time."""
    try:
        rank = config.rank(module)
        scale, applies = config.scale(module, rank), config.applies(module)
    except TimeoutError:
        return Problem(f"{where}: matching its patterns {config.clock.spent}", RESAVE)
    if not applies:
        faults.add(
            module,
            "has factors but the config gives it no LoRA: PEFT would silently run without them",
            f"put back the {CONFIG} that was saved with it; if that is this one, name it in target_modules",
        )
    stored = specs[a].shape[0] if specs[a].shape else 0
    if stored != rank:
        faults.add(module, f"has rank {stored} but the config gives it {rank}", RESAVE)
        return None
    return Module(a, b, rank, scale)
