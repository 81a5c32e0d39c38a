"""A source, understood: which model it holds, in which dimensions, with which LoRA factors.

Everything is found from names and shapes. What is wrong is collected, not raised, so that
``inspect`` can describe a faulty checkpoint and ``plan`` can refuse with every fault at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge import converters
from bridge.checkpoint.leaves import read_tree
from bridge.checkpoint.match import Fit, fit_leaves, fit_weights, place_weights
from bridge.checkpoint.problems import (
    absence_problems,
    count_problems,
    dtype_problems,
    factor_problems,
    fit_problems,
)
from bridge.checkpoint.sizes import Seen, solve
from bridge.errors import CheckpointRefused, Problem, SourceRefused
from bridge.formats.contract import Format, Source
from bridge.formats.disk.location import Location
from bridge.formats.safetensors.header import pickle_problem
from bridge.formats.safetensors.torch import pickles
from bridge.graph import State
from bridge.plugins import adapters, formats
from bridge.publish.record import read_record
from bridge.rules.model import Adapter, Layout, Model, Part
from bridge.rules.names import grouped
from bridge.rules.rule import Rule

#: layers that may be missing below the highest before the number itself is taken for the fault
MAX_GAP = 1000


@dataclass(frozen=True)
class Module:
    """The factors of one module of an adapter: tensor names, rank, and PEFT's runtime scale."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Checkpoint:
    """A source and the model it holds."""

    source: Source
    adapter: Adapter
    model: Model
    layout: Layout | None
    """How its PyTorch names are prefixed; None for a JAX pytree."""
    stored: Mapping[str, str]
    """Leaf path, or PyTorch name in openpi's layout -> name in the source."""
    value_suffix: bool
    sizes: Mapping[str, int]
    problems: tuple[Problem, ...]
    modules: Mapping[str, Module] = field(default_factory=dict)
    """For an adapter: PyTorch name of a weight, in openpi's layout -> the factors it gets."""

    @property
    def state(self) -> State:
        """The node of the graph that this is."""
        if self.source.format == converters.PEFT.format:
            return converters.PEFT
        if self.layout is not None:
            return converters.TORCH_MERGED
        return converters.ORBAX_LORA if any(self.lora_rules()) else converters.ORBAX_BASE

    def has_lora(self, rule: Rule) -> bool:
        """Whether both factors of a rule's leaf are stored."""
        return rule.factor_leaves is not None and all(leaf in self.stored for leaf in rule.factor_leaves)

    def lora_rules(self) -> Iterator[tuple[Part, Rule]]:
        """The rules whose leaves carry factors, with their part."""
        return ((part, rule) for part in self.model.parts for rule in part.rules if self.has_lora(rule))

    def rank(self, part: str, rule: Rule) -> int:
        """The rank of a rule's factors."""
        assert rule.lora is not None
        return self.sizes[self.model.qualified(part, rule.lora.rank)]


def open_source(path: str | Path | Location, format: str | None = None) -> Source:
    """Open whatever lies at a path; formats recognise themselves unless one is named.

    Raises:
        SourceRefused: nothing is there, no format claims it, or several do.
    """
    location = Location.parse(path)
    known = {known.name: known for known in formats()}
    if format is not None:
        name = next((state.format for state in converters.STATES if state.name == format), format)
        if name not in known:
            raise SourceRefused(
                Problem(f"no format is named {format}", f"use one of {', '.join(sorted(known))}")
            )
        return known[name].open(location)
    if not location.exists():
        raise SourceRefused(Problem(f"{location} does not exist", "check the path"))
    claiming: list[Format] = [format for format in known.values() if format.claims(location)]
    if len(claiming) > 1:
        names = " and ".join(format.name for format in claiming)
        raise SourceRefused(
            Problem(f"{location} looks like {names}", f"say which with --from {claiming[0].name}")
        )
    if not claiming:
        if found := pickles(location):
            raise SourceRefused(
                pickle_problem(str(location if found[0] == location.name else location / found[0]))
            )
        inside = ", ".join(location.names()[:6]) or "nothing"
        raise SourceRefused(
            Problem(
                f"{location} is no checkpoint that bridge knows (it holds {inside})",
                "give a step directory, its params/, or a directory with model.safetensors",
            )
        )
    return claiming[0].open(location)


def understand(source: Source) -> Checkpoint:
    """Find the model a source holds.

    Raises:
        CheckpointRefused: no adapter's model fits even half of its names.
    """
    if source.format == converters.PEFT.format:
        from bridge.checkpoint.peft_set import understand_adapter

        return understand_adapter(source)
    return _from_weights(source) if source.format == "torch" else _from_leaves(source)


def _from_leaves(source: Source) -> Checkpoint:
    tree, problems = read_tree(source.specs)
    fit = fit_leaves(tree.stored)
    if fit is None:
        raise unknown(source, tree.stored)
    problems += fit_problems(source, fit, "leaf")
    problems += dtype_problems(source)
    problems += factor_problems(source, fit.model, tree)
    seen: list[Seen] = []
    for part in fit.model.parts:
        for rule in part.rules:
            for leaf, axes in _leaf_axes(rule):
                if leaf not in tree.stored:
                    continue
                shape = source.specs[tree.stored[leaf]].shape
                if len(shape) != len(axes):
                    problems.append(
                        Problem(
                            f"{source.location}: {leaf} has {len(shape)} axes {list(shape)}, "
                            f"and must have {len(axes)} ({' '.join(axes)})",
                            f"this is not how openpi stores {fit.model.name}: take it from its source again",
                        )
                    )
                    continue
                seen += _seen(fit.model, part, zip(((a,) for a in axes), shape, strict=True), leaf)
    sizes, disagreements = solve(_with_choices(fit.model, seen), fit.model)
    problems += [Problem(f"{source.location}: {p.cause}", p.fix) for p in disagreements]
    problems += count_problems(source, fit.model, sizes)
    return Checkpoint(
        source, fit.adapter, fit.model, None, tree.stored, tree.value_suffix, sizes, tuple(problems)
    )


def _from_weights(source: Source) -> Checkpoint:
    fits = fit_weights(source.specs)
    if not fits:
        raise unknown(source, source.specs)
    # models whose PyTorch names are the same differ in shapes; the one of fewer leaves is the special case
    read = [_as_weights(source, fit) for fit in fits]
    return min(read, key=lambda found: (len(found.problems), len(list(found.model.rules))))


def _as_weights(source: Source, fit: Fit) -> Checkpoint:
    assert fit.layout is not None
    problems = fit_problems(source, fit, "tensor") + dtype_problems(source)
    # a tied weight may be stored under its alias, or under both names
    renamed: dict[str, str] = {}
    stored: dict[str, str] = {}
    for alias, of in fit.model.tied.items():
        name, kept = fit.layout.rename(alias), fit.layout.rename(of)
        if name in source.specs and name != kept:
            if kept in source.specs:
                stored[alias] = name
            else:
                renamed[kept] = name
    places = place_weights(fit.model, fit.layout, (*source.specs, *renamed))
    seen: list[Seen] = []
    counts: dict[tuple[str, str], set[int]] = {}
    for effective, place in places.items():
        name = renamed.get(effective, effective)
        stored[place.rule.template.format(place.at)] = name
        groups = place.rule.equation.right
        shape = source.specs[name].shape
        if len(shape) != len(groups):
            problems.append(
                Problem(
                    f"{source.location}: {name} has {len(shape)} axes {list(shape)}, and must have {len(groups)}",
                    f"this is not a {fit.model.name} checkpoint: take it from its source again",
                )
            )
            continue
        seen += _seen(fit.model, place.part, zip(groups, shape, strict=True), name)
        for axis in place.rule.template.numbered:
            counts.setdefault((place.part.name, axis), set()).add(place.at[axis])
    for (part, axis), numbers in counts.items():
        if max(numbers) > len(numbers) + MAX_GAP:
            problems.append(
                Problem(
                    f"{source.location}: {part} has a {axis} {max(numbers)}, and {len(numbers)} of them in all",
                    "the names are damaged: take the checkpoint from its source again",
                )
            )
            continue
        seen.append(Seen((fit.model.qualified(part, axis),), max(numbers) + 1, f"{part}: the highest {axis}"))
    sizes, disagreements = _solve_weights(source, fit, _with_choices(fit.model, seen))
    problems += [Problem(f"{source.location}: {p.cause}", p.fix) for p in disagreements]
    problems += count_problems(source, fit.model, sizes)
    if not problems:
        problems += absence_problems(source, fit, stored, sizes)
    return Checkpoint(source, fit.adapter, fit.model, fit.layout, stored, False, sizes, tuple(problems))


def _solve_weights(source: Source, fit: Fit, seen: list[Seen]) -> tuple[dict[str, int], list[Problem]]:
    """Sizes from tensors, and what they leave open (heads) from a config or the stock models."""
    model, config = fit.model, source.metadata.get("config.json")
    sizes, problems = solve(seen, model)
    told = fit.adapter.known_sizes(config) if fit.adapter.known_sizes and isinstance(config, dict) else {}
    axes = {
        model.qualified(part.name, a) for part in model.parts for r in part.rules for a in r.equation.left
    }
    carried: dict[str, int] = {}
    for known in (_recorded_sizes(source), told, model.stock):
        named = {model.canonical.get(axis, axis): size for axis, size in known.items()}
        more = carried | {axis: size for axis, size in named.items() if axis in axes - sizes.keys()}
        found, trouble = solve(seen, model, more)
        # what contradicts the tensors is not theirs: a config of another model, no stock one
        if not trouble and not problems:
            sizes, carried = found, more
    return sizes, problems


def _recorded_sizes(source: Source) -> dict[str, int]:
    """The sizes that bridge itself wrote beside the weights, if it did."""
    sizes = read_record(source.root).get("sizes")
    if not isinstance(sizes, dict):
        return {}
    return {axis: size for axis, size in sizes.items() if type(size) is int and size > 0}


def _leaf_axes(rule: Rule) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The leaf and its factors, each with its axes."""
    left = rule.equation.left
    yield rule.leaf, left
    if rule.lora is not None and rule.factor_leaves is not None:
        lora_a, lora_b = rule.factor_leaves
        yield lora_a, (*left[:-1], rule.lora.rank)
        yield lora_b, (*left[:-2], rule.lora.rank, left[-1])


def _seen(
    model: Model, part: Part, dims: Iterable[tuple[tuple[str, ...], int]], where: str
) -> Iterator[Seen]:
    for axes, length in dims:
        # a literal 1 is checked like an axis whose size is known
        named = tuple(axis if axis == "1" else model.qualified(part.name, axis) for axis in axes)
        yield Seen(named, length, where)


def _with_choices(model: Model, seen: list[Seen]) -> list[Seen]:
    """Sizes that the declarations fix: a unit axis, and axes whose placeholder lists its words."""
    fixed = [Seen(("1",), 1, "openpi")] if any(one.axes == ("1",) for one in seen) else []
    for part in model.parts:
        for rule in part.rules:
            for axis, words in rule.template.choices.items():
                fixed.append(Seen((model.qualified(part.name, axis),), len(words), f"{rule.weight}"))
    return fixed + seen


def unknown(source: Source, names: Iterable[str]) -> CheckpointRefused:
    """What to raise when no adapter's model has a source's names."""
    known = ", ".join(model.name for adapter in adapters() for model in adapter.models)
    listed = grouped(names)
    return CheckpointRefused(
        Problem(
            f"{source.location}: these {len(listed)} names are no model that bridge knows (the first: {listed[0]})"
            if listed
            else f"{source.location} holds no array",
            f"installed adapters know {known}; another model needs an adapter of its own",
        )
    )
