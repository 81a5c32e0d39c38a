"""Names with placeholders: paths of leaves and names of weights, and how lists of them are shortened.

A template such as ``"model.layers.{layer}.self_attn.{kv:k_proj|v_proj}.weight"`` names one weight
for each index. A placeholder is a number, or one of the words given. In a weight's name it is a
whole dotted segment; in a leaf's path it may follow text, as in ``"layer_{layer}/attn/q_einsum/w"``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Generic, TypeVar

V = TypeVar("V")

Skeleton = tuple[str, ...]
"""The text of a name around its numbers: equal for names that differ in those alone."""

Form = tuple[str | tuple[str], ...]
"""A name by its segments; where a number is left open, the text before it in a tuple of its own."""

_PLACEHOLDER = re.compile(r"([^{}]*)\{(\w+)(?::([\w|]+))?\}")
# "007" is not how a layer is named: reading it as 7 would make two names the same
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_NUMBERED = re.compile(rf"(|.*\D)({_NUMBER})")
#: a number that is a whole dotted segment
_WHOLE = re.compile(rf"(?<![^.])({_NUMBER})(?![^.])")
#: segments of a name that may be read both as they stand and as a number
MAX_NUMBERS = 6
#: a number that is a whole segment, or ends one after an underscore
_NUMBERS = re.compile(rf"(?:(?<![^./])|(?<=_))({_NUMBER})(?![^./])")


@dataclass(frozen=True)
class Segment:
    """One segment: literal ``text``, or the placeholder ``axis`` after it (with its choices)."""

    text: str
    axis: str | None = None
    choices: tuple[str, ...] = ()

    def format(self, at: Mapping[str, int]) -> str:
        """The segment where its axis is at an index; as it stands where the index is not given."""
        if self.axis is None:
            return self.text
        if self.axis not in at:
            return f"{self.text}{{{self.axis}{':' if self.choices else ''}{'|'.join(self.choices)}}}"
        return self.text + (self.choices[at[self.axis]] if self.choices else str(at[self.axis]))


@dataclass(frozen=True)
class Template:
    """A name with placeholders.

    >>> template = Template("layers.{layer}.{kv:k_proj|v_proj}.weight")
    >>> template.axes, template.format({"layer": 3, "kv": 1})
    (('layer', 'kv'), 'layers.3.v_proj.weight')
    >>> Template("layer_{layer}/mlp/linear", "/").format({"layer": 3})
    'layer_3/mlp/linear'
    """

    text: str
    separator: str = "."

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        return _segments(self.text, self.separator)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The placeholders' axes, in the order in which they stand in the name."""
        return tuple(segment.axis for segment in self.segments if segment.axis)

    @cached_property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Axes whose segment is one of a few words; such an axis has that many entries."""
        return {s.axis: s.choices for s in self.segments if s.axis and s.choices}

    def format(self, at: Mapping[str, int]) -> str:
        """The name at an index, given by axis; placeholders whose axis is not given stay."""
        if all(axis in at for axis in self.axes):
            words = {axis: words[at[axis]] for axis, words in self.choices.items()}
            return self._pattern.format_map({**at, **words} if words else at)
        return self.separator.join(segment.format(at) for segment in self.segments)

    @cached_property
    def _pattern(self) -> str:
        """The name as a format string of Python."""
        return self.separator.join(
            segment.text if segment.axis is None else f"{segment.text}{{{segment.axis}}}"
            for segment in self.segments
        )

    def forms(self) -> Iterator[tuple[Form, dict[str, int]]]:
        """Each form the name can take with its numbers left open, and the choices it stands for."""
        for picks in itertools.product(*(range(len(words)) for words in self.choices.values())):
            chosen = dict(zip(self.choices, picks, strict=True))
            yield (
                tuple(
                    (segment.text,)
                    if segment.axis is not None and not segment.choices
                    else segment.format(chosen)
                    for segment in self.segments
                ),
                chosen,
            )

    def patterns(self) -> Iterator[tuple[Form, str]]:
        """Each form, and the pattern of its names as the flags take one, with ``*`` for a number.

        >>> [pattern for _, pattern in Template("layers.{layer}.{kv:k_proj|v_proj}.weight").patterns()]
        ['layers.*.k_proj.weight', 'layers.*.v_proj.weight']
        """
        for form, _ in self.forms():
            yield form, self.separator.join(part if isinstance(part, str) else f"{part[0]}*" for part in form)

    @cached_property
    def kinds(self) -> frozenset[Skeleton]:
        """What its names are but for their numbers."""
        names = (
            self.separator.join(segment if isinstance(segment, str) else f"{segment[0]}0" for segment in form)
            for form, _ in self.forms()
        )
        return frozenset(skeleton(name)[0] for name in names)

    @cached_property
    def numbered(self) -> tuple[str, ...]:
        """The axes whose placeholder is a number, in the order in which they stand in the name."""
        return tuple(s.axis for s in self.segments if s.axis and not s.choices)


@lru_cache(maxsize=10_000)  # models share most of their names
def _segments(text: str, separator: str) -> tuple[Segment, ...]:
    return tuple(_segment(part, text, dotted=separator == ".") for part in text.split(separator))


def _segment(part: str, name: str, *, dotted: bool) -> Segment:
    match = _PLACEHOLDER.fullmatch(part)
    if match is None and not {"{", "}"} & set(part):
        return Segment(part)
    if match is None or (match[1] and dotted):
        rule = "be a whole segment" if dotted else "end its segment"
        raise ValueError(f"{'weight name' if dotted else 'path'} {name!r}: a placeholder must {rule}")
    text, axis, choices = match.groups()
    return Segment(text, axis, tuple(choices.split("|")) if choices else ())


@dataclass(frozen=True)
class Names:
    """Dotted names, taken apart once for all the models that they are compared with."""

    apart: Mapping[str, tuple[Skeleton, tuple[int, ...]]]
    """Name -> its text around numbers, and those numbers, in the order of the names."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        return cls({name: skeleton(name) for name in names})

    def without(self, prefix: str) -> Names:
        """The names without a prefix that all of them have."""
        if skeleton(prefix)[1]:
            return Names.of(name.removeprefix(prefix) for name in self.apart)
        rest = len(prefix)
        return Names(
            {
                name[rest:]: ((kind[0][rest:], *kind[1:]), numbers)
                for name, (kind, numbers) in self.apart.items()
            }
        )

    def and_of(self, names: Iterable[str]) -> Names:
        """These names and others."""
        others = Names.of(names)
        return Names({**self.apart, **others.apart}) if others.apart else self

    @cached_property
    def kinds(self) -> Mapping[Skeleton, str]:
        """A name of each kind."""
        return {kind: name for name, (kind, _) in self.apart.items()}

    @cached_property
    def by_head(self) -> Mapping[str, Mapping[Skeleton, str]]:
        """The kinds by the first segment of their names."""
        by_head: dict[str, dict[Skeleton, str]] = {}
        for kind, name in self.kinds.items():
            by_head.setdefault(name.partition(".")[0], {})[kind] = name
        return by_head


@dataclass(frozen=True)
class NameIndex(Generic[V]):
    """Templates by the names they stand for, so that a name is read back without a search.

    >>> index = NameIndex({Template("layers.{layer}.weight"): "a layer", Template("norm.weight"): "the norm"})
    >>> index.find("layers.12.weight"), index.find("bias")
    (('a layer', {'layer': 12}), None)
    """

    templates: Mapping[Template, V]
    separator: str = "."
    _by_form: dict[Form, tuple[Template, V, dict[str, int]]] = field(default_factory=dict, repr=False)
    _segments: set[str | tuple[str]] = field(default_factory=set, repr=False)
    """Of all forms: with any other segment a name is unknown, which most names of most models are."""

    def __post_init__(self) -> None:
        for template, value in self.templates.items():
            for form, chosen in template.forms():
                self._by_form[form] = template, value, chosen
                self._segments.update(form)

    def find(self, name: str) -> tuple[V, dict[str, int]] | None:
        """What a name stands for, and its index by axis."""
        form = self.form_of(name)
        if form is None:
            return None
        template, value, chosen = self._by_form[form]
        opened = (
            part for part, kind in zip(name.split(self.separator), form, strict=True) if type(kind) is tuple
        )
        numbers = (int(match[2]) for part in opened if (match := _NUMBERED.fullmatch(part)))
        return value, {**chosen, **dict(zip(template.numbered, numbers, strict=True))}

    def find_all(self, names: Names) -> dict[str, tuple[V, dict[str, int]]]:
        """What each name stands for that is known, in the order of the names: as :meth:`find`."""
        if self._literal:
            return {name: place for name in names.apart if (place := self.find(name)) is not None}
        known = {kind: self._by_form[form] for kind, form in self._known_kinds(names)}
        if not known:
            return {}
        found = {}
        for name, (kind, numbers) in names.apart.items():
            if kind in known:
                template, value, chosen = known[kind]
                at = dict(zip(template.numbered, numbers, strict=True))
                found[name] = value, {**chosen, **at} if chosen else at
        return found

    def forms_of(self, names: Names) -> tuple[set[Form], Callable[[str], bool]]:
        """The forms of names, and whether one of the names has any."""
        if self._literal:
            forms = {name: form for name in names.apart if (form := self.form_of(name)) is not None}
            return set(forms.values()), forms.__contains__
        kinds = dict(self._known_kinds(names))
        return set(kinds.values()), lambda name: names.apart[name][0] in kinds

    def _known_kinds(self, names: Names) -> Iterator[tuple[Skeleton, Form]]:
        """The forms of kinds, one look for each: a hundred thousand names are of a few."""
        for head, kinds in names.by_head.items():
            if head in self._segments or head.isdigit():
                for kind, name in kinds.items():
                    if (form := self.form_of(name)) is not None:
                        yield kind, form

    @cached_property
    def _literal(self) -> bool:
        """Whether a number stands in a template as it is, so that names of one kind may have several forms."""
        return any(type(segment) is str and _WHOLE.fullmatch(segment) for segment in self._segments)

    def form_of(self, name: str) -> Form | None:
        """The form under which a name is known: equal for names that differ in their numbers alone."""
        ways: list[list[str | tuple[str]]] = []
        open_ways = 0
        for part in name.split(self.separator):
            way: list[str | tuple[str]] = [part] if part in self._segments else []
            match = _NUMBERED.fullmatch(part) if part[-1:].isdigit() else None
            if match is not None and (match[1],) in self._segments:
                way.append((match[1],))
            if not way:
                return None
            open_ways += len(way) > 1
            ways.append(way)
        # few segments are both a word and a number; of two templates, the more literal comes first
        if open_ways > MAX_NUMBERS:
            return None
        return next((form for form in itertools.product(*ways) if form in self._by_form), None)


def skeleton(name: str) -> tuple[Skeleton, tuple[int, ...]]:
    """``name`` by the text around the numbers that are whole dotted segments, and those numbers in order.

    >>> skeleton("layers.3.mlp.weight")
    (('layers.', '.mlp.weight'), (3,))
    """
    parts = _WHOLE.split(name)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def numberless(name: str) -> tuple[str, ...]:
    """The text of a name around its numbers, those after an underscore among them."""
    return tuple(_NUMBERS.split(name)[::2])


def grouped(names: Iterable[str]) -> list[str]:
    """Shorten names that differ in their numbers alone.

    >>> grouped(f"layers.{n}.mlp.{part}_proj.weight" for n in range(18) for part in ("up", "down"))
    ['layers.{0..17}.mlp.up_proj.weight', 'layers.{0..17}.mlp.down_proj.weight']
    >>> grouped(["layer_0/attn/w", "layer_2/attn/w"])
    ['layer_{0,2}/attn/w']
    """
    families: dict[tuple[str, ...], dict[tuple[int, ...], None]] = {}
    for name in names:
        # texts and the numbers between them, in turn
        parts = _NUMBERS.split(name)
        families.setdefault(tuple(parts[::2]), {})[tuple(map(int, parts[1::2]))] = None
    lines: list[str] = []
    for key, members in families.items():
        columns = [sorted(set(column)) for column in zip(*members, strict=True)]
        if len(members) == math.prod(len(column) for column in columns):
            lines.append(_fill(key, [_range(column) for column in columns]))
        else:
            lines.extend(_fill(key, [str(number) for number in numbers]) for numbers in members)
    return lines


def _fill(key: tuple[str, ...], numbers: list[str]) -> str:
    return "".join(text + number for text, number in itertools.zip_longest(key, numbers, fillvalue=""))


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    # sorted, and no two alike
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
