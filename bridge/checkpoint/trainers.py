"""What trainers leave around the names of a state_dict: wrappers, prefixes, factors beside their weights.

Facts: torch, nn/parallel/distributed.py (``module.``), _dynamo/eval_frame.py (``_orig_mod``),
distributed/fsdp/_common_utils.py (``_fsdp_wrapped_module``); peft 0.21, tuners/tuners_utils.py
(``base_layer``), utils/other.py (``modules_to_save``, ``original_module``); openpi, pull request 854,
models_pytorch/lora_pytorch.py (``lora_a``, ``lora_b``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bridge.errors import CheckpointRefused, Problem, refuse_if
from bridge.formats.contract import Source
from bridge.formats.view import View
from bridge.peft.config import PREFIX, A, B

#: modules that wrap another anywhere in a model and add nothing to it
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

#: modules that wrap a whole model, at most
MAX_WRAPPED = 8

#: prefixes that wrap a whole adapter, and may be doubled
_OUTER = ("module.", PREFIX)

#: PEFT's factors of an adapter of any name, and factors that are parameters of the layer itself
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[ABab])(?:(?:\.[^.]+)?\.weight)?")
#: what PEFT puts into the path of a layer, and of a module that it trains whole
_INSIDE = re.compile(r"\.base_layer(?=\.[^.]+$)|\.original_module(?=\.)")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<rest>.+)")


def unwrapped(source: Source) -> Source:
    """A source whose names are rid of modules that only wrap another, wherever they stand."""
    wrapped = [name for name in source.specs if any(wrapper in name for wrapper in WRAPPERS)]
    changed = sorted({part for name in wrapped for part in name.split(".") if part in WRAPPERS})
    names = {_without_wrappers(name): name for name in source.specs} if changed else {}
    if not changed or len(names) < len(source.specs):
        return source  # two that would become one are refused as unknown names
    return View.of(source, names, f"{' and '.join(changed)} taken out of the names: a trainer's wrapper")


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def common_prefixes(names: Iterable[str]) -> list[str]:
    """The dotted prefixes that all names share, the shortest first; never a whole name, nor half of PEFT's.

    Of no more than MAX_WRAPPED segments: what wraps a model is not deep, and each is compared with all models.

    >>> common_prefixes(["module.net.a.weight", "module.net.b.weight"])
    ['module.', 'module.net.']
    >>> common_prefixes(["base_model.model.a.weight", "base_model.model.b.weight"])
    ['base_model.model.']
    """
    listed = list(names)
    shared, left = [""], min(listed, default="")
    rest = max(listed, default="")
    while "." in left and len(shared) <= MAX_WRAPPED:
        head = PREFIX if left.startswith(PREFIX) else left[: left.index(".") + 1]
        if not rest.startswith(head):
            break
        shared.append(shared[-1] + head)
        left, rest = left.removeprefix(head), rest.removeprefix(head)
    return shared[1:]


def without_prefix(source: Source, prefix: str) -> Source:
    """A source whose names are rid of a prefix that all of them have."""
    names = {name.removeprefix(prefix): name for name in source.specs}
    return View.of(source, names, f"the prefix {prefix} is taken off all {len(names)} names")


def adapter_names(source: Source) -> Source:
    """An adapter whose names are as PEFT saves them: one prefix, and no adapter's name in them."""
    inner = {name: name for name in source.specs}
    taken = ""
    while inner and (
        outer := next((each for each in _OUTER if all(name.startswith(each) for name in inner)), "")
    ):
        inner = {name.removeprefix(outer): stored for name, stored in inner.items()}
        taken += outer
    named = {}
    for name, stored in inner.items():
        factor = FACTOR.fullmatch(name)
        ending = (A if factor["which"] in "Aa" else B) if factor is not None else ""
        named[PREFIX + (f"{factor['module']}{ending}" if factor is not None else name)] = stored
    if all(name == stored for name, stored in named.items()) or len(named) < len(source.specs) or not taken:
        return source
    notes = [] if taken == PREFIX else [f"the prefix {taken} of all names is read as {PREFIX}"]
    if any(name.removeprefix(PREFIX) not in inner for name in named):
        notes.append("the adapter's name is taken out of the names of its factors")
    return View.of(source, named, *notes)


@dataclass(frozen=True)
class Whole:
    """A state_dict of a model with LoRA in it, taken apart."""

    weights: Mapping[str, str]
    """Name of a weight of the base -> the name under which it is stored."""
    factors: Mapping[str, Mapping[str, str]]
    """Module -> ``"a"`` and ``"b"`` -> the names under which they are stored."""
    saved: Mapping[str, str] = field(default_factory=dict)
    """Name of a weight that the adapter replaces -> the name under which it is stored."""


def take_apart(source: Source) -> Whole | None:
    """The base and the adapter of a whole model that was saved with LoRA in it; None without factors.

    Raises:
        CheckpointRefused: it has several adapters, or a weight twice.
    """
    weights: dict[str, str] = {}
    factors: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    twice: list[str] = []
    for name in source.specs:
        factor = FACTOR.fullmatch(name) if ".lora_" in name else None
        copy = _SAVED.fullmatch(name) if ".modules_to_save." in name else None
        if factor is not None:
            pair, which = factors.setdefault(factor["module"], {}), factor["which"].lower()
            twice += [name] if which in pair else []
            pair[which] = name
        else:
            into = weights if copy is None else saved
            plain = _INSIDE.sub("", name) if copy is None else f"{copy['module']}.{copy['rest']}"
            twice += [name] if plain in into else []
            into[plain] = name
    if not factors:
        return None
    refuse_if(
        (
            Problem(
                f"{source.location}: {name} is there besides another of its kind: several adapters in one file",
                "save the model with one of them: delete_adapter in PEFT, on a copy",
            )
            for name in twice[:1]
        ),
        CheckpointRefused,
    )
    return Whole(weights, factors, saved)
