"""Options of a verb, declared once: the command's flags and help, the library's keywords and every check
come from the declaration.

A verb's options are a ``TypedDict`` whose fields are ``Annotated[type, Option(...)]``, in the order in which
they are shown; a family declares its own by keyword.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

from bridge.errors import Problem, Refusal, refuse_if
from bridge.graph import State

T = TypeVar("T")

GENERAL = "General"
"""Heading of options that every verb has."""


@dataclass(frozen=True)
class Kind(ABC):
    """What the value of an option is: how it is written, and which values are allowed."""

    metavar: str
    """The value's place in ``--help``."""
    flag: ClassVar[bool] = False
    """Whether the command's flag takes no value."""
    repeatable: ClassVar[bool] = False
    """Whether the command's flag may be repeated; its values are joined by commas then."""
    absent: ClassVar[Any] = None
    """The default of an option that declares none."""

    @property
    @abstractmethod
    def expects(self) -> str:
        """The values allowed, as a noun phrase."""

    @abstractmethod
    def convert(self, value: Any) -> Any:
        """A value given to the library, in its usual type. Raises TypeError with what is expected."""

    def read(self, text: str) -> Any:
        """A value given to the command. Raises ValueError with the reason."""
        return text

    def wrong(self, value: Any) -> list[str]:
        """What of a value is not allowed, as text."""
        return []


@dataclass(frozen=True)
class Text(Kind):
    """Any text."""

    metavar: str = "TEXT"

    @property
    def expects(self) -> str:
        return "text"

    def convert(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(self.expects)
        return value


@dataclass(frozen=True)
class Flag(Kind):
    """Yes or no."""

    metavar: str = ""
    flag: ClassVar[bool] = True
    absent: ClassVar[Any] = False

    @property
    def expects(self) -> str:
        return "True or False"

    def convert(self, value: Any) -> bool:
        # numpy's booleans are equal to Python's, and of another type
        if value not in (True, False):
            raise TypeError(self.expects)
        return bool(value)


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    words: tuple[str, ...]

    def __init__(self, *words: str) -> None:
        object.__setattr__(self, "metavar", f"[{'|'.join(words)}]")
        object.__setattr__(self, "words", words)

    @property
    def expects(self) -> str:
        return f"one of {', '.join(self.words)}"

    def convert(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(self.expects)
        return value

    def wrong(self, value: Any) -> list[str]:
        return [] if value in self.words else [value]


@dataclass(frozen=True)
class PathOrUrl(Kind):
    """A path, or the URL of a bucket."""

    metavar: str = "PATH"

    @property
    def expects(self) -> str:
        return "a path"

    def convert(self, value: Any) -> str | PathLike[str]:
        if not isinstance(value, str | PathLike):
            raise TypeError(self.expects)
        return value


@dataclass(frozen=True)
class File(PathOrUrl):
    """A local file that exists."""

    metavar: str = "FILE"

    @property
    def expects(self) -> str:
        return "an existing file"

    def wrong(self, value: Any) -> list[str]:
        return [] if Path(value).is_file() else [str(value)]


@dataclass(frozen=True)
class Number(Kind):
    """A finite number: by default, a positive whole number."""

    metavar: str = "N"
    whole: bool = True
    positive: bool = True

    @property
    def expects(self) -> str:
        return " ".join(("a", *["positive"] * self.positive, *["whole"] * self.whole, "number"))

    def convert(self, value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(self.expects)
        if self.whole and isinstance(value, Integral):
            return int(value)
        try:
            number = float(value)
        except OverflowError:
            return math.inf
        return int(number) if self.whole and number.is_integer() else number

    def read(self, text: str) -> int | float:
        try:
            return self.convert(int(text) if text.strip().isdecimal() else float(text))
        except ValueError:
            raise ValueError(f"{text!r} is not {self.expects}") from None

    def wrong(self, value: Any) -> list[str]:
        allowed = math.isfinite(value) and (value > 0 or not self.positive)
        return [] if allowed and (not self.whole or value == int(value)) else [str(value)]


@dataclass(frozen=True)
class ByPart(Kind):
    """A positive number for all parts of a model, or numbers for some of its parts, by name.

    The command reads ``4``, or ``encoder=8,decoder=4``; the library takes ``4``, or
    ``{"encoder": 8, "decoder": 4}``. The key ``""`` is all parts that are not named.
    """

    whole: bool = False
    exclusive: bool = False
    """Whether a number for all parts rules out others beside it."""
    repeatable: ClassVar[bool] = True

    @property
    def number(self) -> Number:
        """The kind of each number."""
        return Number(whole=self.whole)

    @property
    def expects(self) -> str:
        return self.number.expects

    def convert(self, value: Any) -> Any:
        try:
            if isinstance(value, Mapping):
                return {part: self.number.convert(number) for part, number in value.items()}
            return self.number.convert(value)
        except TypeError:
            raise TypeError(f"{self.expects}, or a mapping of part to {self.expects}") from None

    def read(self, text: str) -> Any:
        numbers: dict[str, int | float] = {}
        for each in text.split(","):
            part, _, number = each.strip().rpartition("=")
            if part in numbers:
                raise ValueError(f"two numbers for {part or 'all parts'}")
            numbers[part] = self.number.read(number)
        if self.exclusive and "" in numbers and len(numbers) > 1:
            raise ValueError("give one number for all parts, or one for each part")
        return numbers[""] if list(numbers) == [""] else numbers

    def wrong(self, value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return self.number.wrong(value)
        return [
            f"{text} for {part}" if part else text
            for part, number in value.items()
            for text in self.number.wrong(number)
        ]


@dataclass(frozen=True)
class ByName(ByPart):
    """Positive whole numbers by name, and none without a name.

    The command reads ``encoder.head=8,decoder.head=4``; the library takes ``{"encoder.head": 8}``.
    """

    whole: bool = True

    @property
    def expects(self) -> str:
        return f"NAME={super().expects}"

    def convert(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"a mapping of name to {self.number.expects}")
        return super().convert(value)

    def read(self, text: str) -> Any:
        numbers = super().read(text)
        if not isinstance(numbers, Mapping) or "" in numbers:
            raise ValueError(f"{text!r} is not {self.metavar}")
        return numbers


@dataclass(frozen=True)
class Texts(Kind):
    """Any number of texts."""

    metavar: str = "TEXT"
    repeatable: ClassVar[bool] = True
    absent: ClassVar[Any] = ()

    @property
    def expects(self) -> str:
        return "texts"

    def convert(self, value: Any) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise TypeError("a list of texts")
        return tuple(texts)

    def read(self, text: str) -> tuple[str, ...]:
        return tuple(each.strip() for each in text.split(","))

    def wrong(self, value: Any) -> list[str]:
        return [] if all(value) else ["empty"]


def always(source: State, target: State) -> bool:
    """The ``fits`` of an option that has an effect on every conversion."""
    return True


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: of a verb, as the annotation of its keyword, or of a family.

    Example:
        >>> depth = Option(kind=Number(), help="Number of layers to take.")
        >>> depth.problems("layer_count", 0)
        [Problem(cause='--layer-count is 0', fix='give a positive whole number')]
    """

    help: str
    """One or two sentences for ``--help``."""
    kind: Kind = Text()
    default: Any = None
    """Its value where it is not given; a flag's is False."""
    group: str = GENERAL
    """Heading that ``--help`` lists it under."""
    fix: str = ""
    """What to do about a value that is not allowed, where "give" and what the kind expects is too little."""
    aliases: tuple[str, ...] = ()
    """Earlier spellings of the flag, such as ``--threads``: they work, and ``--help`` omits them."""
    fits: Callable[[State, State], bool] = always
    """Whether it has an effect on a conversion from one state to another; where it has none, it is refused."""

    def __post_init__(self) -> None:
        if self.default is None:
            object.__setattr__(self, "default", self.kind.absent)

    def convert(self, keyword: str, value: Any) -> Any:
        """A value given to the library; None stands for the default.

        Raises:
            TypeError: the value is of another type.
        """
        if value is None:
            return self.default
        try:
            return self.kind.convert(value)
        except TypeError as error:
            raise TypeError(f"{keyword} must be {error}, not {value!r}") from None

    def problems(self, keyword: str, value: Any) -> list[Problem]:
        """What is wrong with a value of the right type."""
        wrong = [] if value is None else self.kind.wrong(value)
        fix = self.fix or f"give {self.kind.expects}"
        return [Problem(f"{flag(keyword)} is {text}", fix) for text in wrong]


def flag(keyword: str) -> str:
    """How the command spells a keyword of the library: ``from_`` is ``--from``."""
    return f"--{keyword.rstrip('_').replace('_', '-')}"


def declared(options: type) -> Mapping[str, Option]:
    """The options that a TypedDict declares: keyword -> option, in the order of its fields."""
    return {
        keyword: note
        for keyword, hint in get_type_hints(options, include_extras=True).items()
        for note in getattr(hint, "__metadata__", ())
        if isinstance(note, Option)
    }


def with_defaults(options: type[T], given: Mapping[str, Any]) -> T:
    """All options of a TypedDict: the values given, and defaults for the others.

    Args:
        options: the TypedDict that declares them.
        given: values by keyword; None stands for the default.

    Raises:
        TypeError: a keyword is not an option, or a value is of another type.
    """
    known = declared(options)
    for keyword in given:
        if keyword not in known:
            raise unknown(keyword, known)
    return cast(
        T, {keyword: option.convert(keyword, given.get(keyword)) for keyword, option in known.items()}
    )


def value_problems(known: Mapping[str, Option], values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the values of options, by keyword."""
    for keyword, option in known.items():
        yield from option.problems(keyword, values.get(keyword))


def complete(options: type[T], given: Mapping[str, Any]) -> T:
    """All options of a TypedDict, as :func:`with_defaults`, refusing values that are not allowed.

    Raises:
        TypeError: a keyword is not an option, or a value is of another type.
        Refusal: values that are not allowed, all at once.
    """
    values = with_defaults(options, given)
    refuse_if(value_problems(declared(options), cast(Mapping[str, Any], values)), Refusal)
    return values


def documented(options: type) -> str:
    """The docstring of a TypedDict, with a line for each option that it declares."""
    lines = (f"    {keyword}: {option.help}" for keyword, option in declared(options).items())
    return "\n".join((f"{options.__doc__}", "", "Options:", *lines))


def unknown(keyword: str, known: Iterable[str]) -> TypeError:
    """What to raise for a keyword that is not an option."""
    close = get_close_matches(keyword, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return TypeError(f"{keyword!r} is not an option{hint}")
