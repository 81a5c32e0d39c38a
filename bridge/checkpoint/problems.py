"""What speaks against a source, once its model is known: names nothing reads, factors without their twin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from bridge.arrays import WEIGHT_DTYPES, Spec
from bridge.checkpoint.foreign import never_left_out, quantised, says_config
from bridge.checkpoint.leave_out import pattern_for
from bridge.checkpoint.match import Fit
from bridge.errors import CheckpointRefused, Problem, refuse_if
from bridge.formats.contract import Source
from bridge.formats.safetensors.header import MAX_TENSORS
from bridge.rules.family import families
from bridge.rules.model import Model
from bridge.rules.names import Names, grouped, skeleton
from bridge.rules.rule import Rule

RECOPY = "copy the checkpoint again, or re-download it"
#: names of an unknown model that a message shows
SHOWN = 3
#: names, shortened, of a set of arrays that are listed one by one
MAX_NAMES = 8


class Alike:
    """Problems of names: those that differ in numbers alone become one line.

    Args:
        where: what the names are in.
    """

    def __init__(self, where: object) -> None:
        self._where = where
        self._names: dict[tuple[str, str], list[str]] = {}

    def add(self, name: str, says: str, fix: str) -> None:
        """A problem of one name: what is wrong with it, after the name, and what to do."""
        self._names.setdefault((says, fix), []).append(name)

    @property
    def problems(self) -> list[Problem]:
        return [
            Problem(f"{self._where}: {name} {says}", fix)
            for (says, fix), names in self._names.items()
            for name in grouped(names)
        ]


def unknown(source: Source, names: Iterable[str]) -> CheckpointRefused:
    """What to raise when no family's model has a source's names."""
    known = dict.fromkeys(model.name for family in families() for model in family.models)
    listed = grouped(names)
    return CheckpointRefused(
        next(iter(quantised(source.location, listed)), None)
        or Problem(
            f"{source.location}: these {len(listed)} names match no supported model "
            f"(first: {', '.join(listed[:SHOWN])}){says_config(source)}"
            if listed
            else f"{source.location} contains no array",
            f"supported models: {', '.join(known)}; another model needs a plug-in of its own",
        )
    )


def fit_problems(source: Source, fit: Fit, kind: str) -> list[Problem]:
    """Names that are missing, and names that no rule reads.

    Args:
        source: the checkpoint.
        fit: the model that its names fit best.
        kind: what a name stands for.

    Raises:
        CheckpointRefused: it is quantised, and every name and dtype that disagrees comes of that.
    """
    model = fit.model.name
    refuse_if(quantised(source.location, fit.extra), CheckpointRefused)
    # names that lack some and have others may be all of another model's
    says, lacks = "", RECOPY
    if fit.extra:
        says = says_config(source)
        lacks = f"if this is another model than {model}, it needs a plug-in of its own; if not, {RECOPY}"
    problems = [
        Problem(f"{source.location}: {kind} {name} of {model} is missing{says}", lacks)
        for name in fit.missing
    ]
    problems += [
        Problem(
            f"{source.location}: {kind} {name} is not part of {model}",
            never_left_out(name)
            or f"it would be lost: add --leave-out {pattern_for(name)!r} where you do not need it, or declare it in a "
            "plug-in",
        )
        for name in _without_sets(fit)
    ]
    return problems


def _without_sets(fit: Fit) -> Iterator[str]:
    """The names that a model does not have; those of a whole set beside it, such as a moving average, as one."""
    mark = "/" if fit.leaves.stored else "."
    own = {name.partition(mark)[0] for name in fit.names}
    for top, group in itertools.groupby(fit.extra, key=lambda name: name.partition(mark)[0]):
        names = list(group)
        if len(names) > MAX_NAMES and top not in own and not any(map(never_left_out, names)):
            yield f"{top}{mark}{{{len(names)} names}}"
        else:
            yield from names


def misshapen(
    source: Source, names: Iterable[str], shape: tuple[int, ...], axes: tuple[str, ...], why: str
) -> list[Problem]:
    """Arrays of another number of axes than their rule's."""
    return [
        Problem(
            f"{source.location}: {name} has {len(shape)} {'axis' if len(shape) == 1 else 'axes'} {list(shape)}; "
            f"expected {len(axes)} ({', '.join(axes) if any(' ' in axis for axis in axes) else ' '.join(axes)})",
            f"{why}: it is another model, or a damaged copy",
        )
        for name in grouped(names)
    ]


def dtype_problems(source: Source, runtime: str) -> list[Problem]:
    """Arrays that are not weights: of another dtype, or without elements."""
    by_spec: dict[Spec, list[str]] = {}
    for name, spec in source.specs.items():
        by_spec.setdefault(spec, []).append(name)
    by_dtype: dict[str, list[str]] = {}
    for spec, names in by_spec.items():
        if spec.dtype.name not in WEIGHT_DTYPES:
            by_dtype.setdefault(spec.dtype.name, []).extend(names)
    return [
        Problem(
            f"{source.location}: {name} has dtype {dtype}",
            f"weights of {runtime} are {', '.join(WEIGHT_DTYPES)}: save the checkpoint in one of them",
        )
        for dtype, names in by_dtype.items()
        for name in grouped(names)
    ] + [
        Problem(f"{source.location}: {name} has shape {list(spec.shape)}, which has no elements", RECOPY)
        for spec, names in by_spec.items()
        if spec.size == 0
        for name in grouped(names)
    ]


def factor_problems(source: Source, fit: Fit, sizes: Mapping[str, int]) -> list[Problem]:
    """Factors without their twin, and leaves left without factors where their group has them."""
    stored = fit.leaves.stored
    apart: list[tuple[str, str]] = []
    groups: dict[tuple[str, str], dict[bool, list[str]]] = {}
    for part, rule in fit.model.leaves(sizes):
        if rule.factor_leaves is None or rule.lora is None:
            continue
        there = [leaf in stored for leaf in rule.factor_leaves]
        if any(there) and not all(there):
            a, b = rule.factor_leaves
            apart.append((a, b) if there[0] else (b, a))
        elif rule.leaf in stored:
            groups.setdefault((part.name, rule.lora.rank), {}).setdefault(all(there), []).append(rule.leaf)
    # both of a pair differ from those of other layers in the same numbers
    pairs = zip(grouped(have for have, _ in apart), grouped(lack for _, lack in apart), strict=True)
    problems = [
        Problem(f"{source.location}: {have} is there, but its counterpart {lack} is missing", RECOPY)
        for have, lack in pairs
    ]
    for group in groups.values():
        if len(group) == 2:
            problems += [
                Problem(
                    f"{source.location}: {leaf} has no LoRA factors, but {group[True][0]} has",
                    f"{fit.family.runtime} gives factors to all of them or none: a damaged copy, or changed since",
                )
                for leaf in grouped(group[False])
            ]
    return problems


def count_problems(source: Source, model: Model, sizes: Mapping[str, int]) -> list[Problem]:
    """Rules of so many weights that nothing but their names would fill the memory."""
    counts = {
        rule.leaf: math.prod(sizes.get(model.qualified(part.name, axis), 1) for axis in rule.template.axes)
        for part in model.parts
        for rule in part.rules
    }
    return [
        Problem(
            f"{source.location}: {leaf} would be {count} weights, more than {MAX_TENSORS}",
            f"no {model.name} has so many layers: it is another model, or a damaged copy",
        )
        for leaf, count in counts.items()
        if count > MAX_TENSORS
    ]


def absent_leaves(
    source: Source, model: Model, stored: Mapping[str, str], sizes: Mapping[str, int]
) -> list[Problem]:
    """Leaves of single layers that are missing, once the number of layers is known.

    Not those of rules that have no leaf at all: their names are missing already.
    """
    absent: list[str] = []
    for part in model.parts:
        local = model.local_sizes(part, sizes)
        for rule in part.rules:
            if all(axis in local for axis in rule.path.axes):
                leaves = [each.leaf for each in rule.bind(local)]
                lacking = [leaf for leaf in leaves if leaf not in stored]
                absent += lacking if len(lacking) < len(leaves) else []
    return [Problem(f"{source.location}: {name} is missing", RECOPY) for name in grouped(absent)]


def absence_problems(
    source: Source,
    model: Model,
    stored: Mapping[str, str],
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
) -> list[Problem]:
    """Weights of single layers that are missing, once the number of layers is known.

    Not those that are missing in all layers: their names are missing already.

    Args:
        source: the state_dict.
        model: which it is.
        stored: name in the rules -> name in the source.
        sizes: of all axes that are known.
        counts: how many weights of each rule there are, by the rule's own name for them.
    """

    parts = {rule.weight: part.name for part in model.parts for rule in part.rules}

    def lacks_some(rule: Rule) -> bool:
        axes = (model.qualified(parts[rule.weight], axis) for axis in rule.template.axes)
        return 0 < counts.get(rule.weight, 0) != math.prod(sizes.get(axis, 0) for axis in axes)

    absent = [
        name for bound in model.bind(sizes, lacks_some) for name in bound.names.values() if name not in stored
    ]
    known = Names.of(stored if absent else ()).kinds
    return [
        Problem(f"{source.location}: {name} is missing", RECOPY)
        for name in grouped(name for name in absent if skeleton(name)[0] in known)
    ]
