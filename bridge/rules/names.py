"""Names of PyTorch weights, with placeholders, and how a list of names is shortened for people.

A template such as ``"model.layers.{layer}.self_attn.{kv:k_proj|v_proj}.weight"`` names one weight
for each index. A placeholder is a whole dotted segment: a number, or one of the choices given.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

Skeleton = tuple[str | None, ...]
"""A name by its dotted segments, ``None`` where a number stands."""

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([\w|]+))?\}")


@dataclass(frozen=True)
class Segment:
    """One dotted segment: literal ``text``, or the placeholder ``axis`` (with its choices)."""

    text: str
    axis: str | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """A weight's name with placeholders."""

    text: str

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(_segment(part, self.text) for part in self.text.split("."))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The placeholders' axes, in the order in which they stand in the name."""
        return tuple(segment.axis for segment in self.segments if segment.axis)

    @cached_property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Axes whose segment is one of a few words; such an axis has that many entries."""
        return {s.axis: s.choices for s in self.segments if s.axis and s.choices}

    def format(self, at: Mapping[str, int]) -> str:
        """The name at one index, given by axis."""
        return ".".join(
            segment.text
            if segment.axis is None
            else segment.choices[at[segment.axis]]
            if segment.choices
            else str(at[segment.axis])
            for segment in self.segments
        )

    def skeletons(self) -> Iterator[tuple[Skeleton, dict[str, int]]]:
        """Each form the name can take with its numbers left open, and the choices it stands for.

        Looking a name's own :func:`skeleton` up among these reads it back without a search.
        """
        for picks in itertools.product(*(range(len(words)) for words in self.choices.values())):
            chosen = dict(zip(self.choices, picks, strict=True))
            yield (
                tuple(
                    segment.text
                    if segment.axis is None
                    else segment.choices[chosen[segment.axis]]
                    if segment.choices
                    else None
                    for segment in self.segments
                ),
                chosen,
            )

    @cached_property
    def numbered(self) -> tuple[str, ...]:
        """The axes whose segment is a number, in the order in which they stand in the name."""
        return tuple(s.axis for s in self.segments if s.axis and not s.choices)


def _segment(part: str, template: str) -> Segment:
    match = _PLACEHOLDER.fullmatch(part)
    if match is None:
        if "{" in part or "}" in part:
            raise ValueError(f"weight name {template!r}: a placeholder must be a whole segment")
        return Segment(part)
    axis, choices = match.groups()
    return Segment("", axis, tuple(choices.split("|")) if choices else ())


def skeleton(name: str) -> tuple[Skeleton, tuple[int, ...]]:
    """``name`` by segments, its all-digit segments left open, and those numbers in order."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if _is_number(part))
    return tuple(None if _is_number(part) else part for part in parts), numbers


def _is_number(part: str) -> bool:
    # "007" is not how a layer is named: reading it as 7 would make two names one.
    return part.isascii() and part.isdigit() and len(part) < 10 and (part == "0" or part[0] != "0")


def grouped(names: Iterable[str]) -> list[str]:
    """Shorten names that differ in their numbers alone: ``layers.{0..17}.mlp.up_proj.weight``."""
    families: dict[Skeleton, dict[tuple[int, ...], None]] = {}
    for name in names:
        key, numbers = skeleton(name)
        families.setdefault(key, {})[numbers] = None
    lines: list[str] = []
    for key, members in families.items():
        columns = [sorted(set(column)) for column in zip(*members, strict=True)]
        if len(members) == math.prod(len(column) for column in columns):
            lines.append(_fill(key, [_range(column) for column in columns]))
        else:
            lines.extend(_fill(key, [str(number) for number in numbers]) for numbers in members)
    return lines


def _fill(key: Skeleton, numbers: list[str]) -> str:
    rest = iter(numbers)
    return ".".join(next(rest) if part is None else part for part in key)


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    # they are sorted and no two alike
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
