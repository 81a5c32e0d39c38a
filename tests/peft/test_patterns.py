"""Patterns that are looked up, against the search for them that PEFT makes."""

import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from bridge.peft.config import read_config
from bridge.peft.patterns import Clock, Patterns

#: so few characters that patterns and paths often meet, dots where others have letters among them
PIECES = st.text("ab.-1", min_size=1, max_size=6).filter(lambda text: text.strip("."))
OTHERS = st.sampled_from(["a|b", "a\\.b", "^a", "b$", "(a|b)+", "[ab].1", "a.*", "\\d"])


@given(st.lists(PIECES | OTHERS, max_size=8, unique=True), PIECES)
def test_the_first_that_matches_is_that_of_peft(patterns: list[str], module: str) -> None:
    found = Patterns(patterns, Clock())
    # where none matches, PEFT gives the module back
    matching = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
    assert found.all(module) == matching
    assert found.first(module) == (get_pattern_key(patterns, module) if matching else None)


@given(st.lists(PIECES, max_size=5), PIECES)
def test_modules_saved_whole_are_told_by_the_ends_of_paths(names: list[str], module: str) -> None:
    config, problems = read_config(
        {"peft_type": "LORA", "target_modules": ["q"], "modules_to_save": names}, "here"
    )
    assert config is not None, problems
    assert config.saves(module) == any(path.endswith(tuple(names)) for path in _paths(module))


def _paths(module: str) -> Iterable[str]:
    segments = module.split(".")
    return (".".join(segments[: n + 1]) for n in range(len(segments)))


def test_the_budget_grows_with_the_modules() -> None:
    spent = Clock(0.0)
    with pytest.raises(TimeoutError):
        Patterns(["a.b"], spent).first("a.b")
    assert Patterns(["a.b"], Clock(0.0, modules=1000)).first("a.b") == "a.b"
    assert (
        Clock(2.0).spent == "takes longer than 2 s" and Clock(2.0, 45_000).spent == "takes longer than 6.5 s"
    )
