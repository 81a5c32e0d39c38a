"""Options: what each kind reads, accepts and refuses, and what a TypedDict of them declares."""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest

from bridge.errors import Refusal
from bridge.rules.option import (
    ByPart,
    Choice,
    File,
    Flag,
    Kind,
    Number,
    Option,
    PathOrUrl,
    Text,
    always,
    complete,
    declared,
    documented,
    flag,
)

ALPHA = ByPart("[PART=]ALPHA")
RANK = ByPart("[PART=]RANK", whole=True, exclusive=True)

READ: list[tuple[Kind, str, Any]] = [
    (Text(), "anything", "anything"),
    (PathOrUrl(), "gs://bucket/run", "gs://bucket/run"),
    (Number(), "3", 3),
    (Number(), "3.0", 3),
    (Number(whole=False), "1e-6", 1e-6),
    (Number(), str(2**70 + 1), 2**70 + 1),
    (ALPHA, "8", 8.0),
    (ALPHA, "paligemma=8,expert=4", {"paligemma": 8.0, "expert": 4.0}),
    (ALPHA, "8, expert=4.5", {"": 8.0, "expert": 4.5}),
    (RANK, "16", 16),
    (RANK, "paligemma=16,expert=32", {"paligemma": 16, "expert": 32}),
]


@pytest.mark.parametrize(("kind", "text", "value"), READ)
def test_text_is_read(kind: Kind, text: str, value: Any) -> None:
    read = kind.read(text)
    assert read == value and type(read) is type(value)
    assert kind.convert(read) == read and kind.wrong(read) == []


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (Number(), "many", "'many' is not a positive whole number"),
        (Number(whole=False), "", "'' is not a positive number"),
        (ALPHA, "expert=", "'' is not a positive number"),
        (ALPHA, "expert=1,expert=2", "two numbers for expert"),
        (ALPHA, "1,2", "two numbers for all parts"),
        (RANK, "8,expert=4", "one number for all parts, or one for each part"),
    ],
)
def test_other_text_is_refused(kind: Kind, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind.read(text)


@pytest.mark.parametrize(
    ("kind", "value", "converted"),
    [
        (Flag(), np.True_, True),
        (PathOrUrl(), Path("base"), Path("base")),
        (Number(), np.int64(4), 4),
        (Number(), 4.0, 4),
        (Number(whole=False), 8, 8.0),
        (Number(whole=False), 10**400, math.inf),
        (ALPHA, {"expert": np.float32(4)}, {"expert": 4.0}),
        (RANK, {"expert": 3.5}, {"expert": 3.5}),
    ],
)
def test_values_get_their_usual_type(kind: Kind, value: Any, converted: Any) -> None:
    given = kind.convert(value)
    assert given == converted and type(given) is type(converted)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Text(), 3),
        (Flag(), "no"),
        (Choice("a", "b"), None),
        (PathOrUrl(), 3),
        (Number(), "3"),
        (Number(), True),
        (ALPHA, "8"),
        (ALPHA, {"expert": "8"}),
    ],
)
def test_values_of_another_type_are_refused(kind: Kind, value: Any) -> None:
    with pytest.raises(TypeError):
        kind.convert(value)


@pytest.mark.parametrize(
    ("kind", "value", "wrong"),
    [
        (Choice("keep", "float32"), "float8", ["float8"]),
        (File(), "/nowhere.npz", ["/nowhere.npz"]),
        (Number(), 0, ["0"]),
        (Number(), 3.5, ["3.5"]),
        (Number(), math.inf, ["inf"]),
        (Number(positive=False), -1, []),
        (Number(whole=False), math.nan, ["nan"]),
        (ALPHA, -1.0, ["-1.0"]),
        (ALPHA, {"": 0.0, "expert": math.nan, "paligemma": 8.0}, ["0.0", "nan for expert"]),
    ],
)
def test_values_that_are_not_allowed(kind: Kind, value: Any, wrong: list[str]) -> None:
    assert kind.wrong(value) == wrong


class Common(TypedDict, total=False):
    """Of every verb."""

    verbose: Annotated[bool, Option(kind=Flag(), help="Print more.")]


class Bake(Common, total=False):
    """Of one verb."""

    from_: Annotated[str | None, Option(help="Where from.")]
    heat: Annotated[int, Option(kind=Number(), default=180, help="Degrees.", fix="read the packet")]
    parts: Annotated[Mapping[str, float] | None, Option(kind=ALPHA, help="Of each part.")]
    settings: Mapping[str, Any]


def test_a_typed_dict_declares_its_options_in_order() -> None:
    assert list(declared(Bake)) == ["verbose", "from_", "heat", "parts"]
    assert [flag(keyword) for keyword in declared(Bake)] == ["--verbose", "--from", "--heat", "--parts"]
    assert "    heat: Degrees." in documented(Bake).splitlines()


def test_defaults_are_filled_in() -> None:
    assert complete(Bake, {}) == {"verbose": False, "from_": None, "heat": 180, "parts": None}
    assert complete(Bake, {"heat": None, "verbose": True})["heat"] == 180


def test_an_unknown_keyword_names_the_closest_option() -> None:
    with pytest.raises(TypeError, match="'verbos' is not an option; did you mean 'verbose'"):
        complete(Bake, {"verbos": True})
    with pytest.raises(TypeError, match=r"'zzz' is not an option$"):
        complete(Bake, {"zzz": 1})


def test_a_value_of_another_type_names_its_keyword() -> None:
    with pytest.raises(TypeError, match="heat must be a positive whole number, not 'hot'"):
        complete(Bake, {"heat": "hot"})


def test_values_that_are_not_allowed_are_refused_together() -> None:
    with pytest.raises(Refusal) as refused:
        complete(Bake, {"heat": 0, "parts": {"crust": -1}})
    assert [(problem.cause, problem.fix) for problem in refused.value.problems] == [
        ("--heat is 0", "read the packet"),
        ("--parts is -1.0 for crust", "give a positive number"),
    ]


def test_a_declared_option_can_be_pickled() -> None:
    option = Option(kind=Choice("a", "b"), help="A letter.", fits=always)
    assert pickle.loads(pickle.dumps(option)) == option
