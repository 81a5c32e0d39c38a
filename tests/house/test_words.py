"""The core knows no family: its words, files and facts are in the plug-ins."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "bridge"

#: of families of models and what belongs to them
FAMILIES = re.compile(
    r"openpi(?!-bridge)|pi0|paligemma|gemma|siglip|lerobot|\bexperts?\b|horizon|norm.?stats|feed.?forward",
    re.IGNORECASE,
)
#: sources of facts may be cited where nothing is printed, in comments and docstrings: "openpi, models/lora.py"
CITED = re.compile(r"openpi|google-deepmind/gemma|gemma/peft|FeedForward", re.IGNORECASE)


def docstrings(text: str) -> set[tuple[int, int]]:
    """Where they begin: strings that are statements, of modules, classes, functions and attributes."""
    return {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def violations(text: str) -> Iterator[tuple[int, str]]:
    """Line and word of every name of a family."""
    prose = docstrings(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        cites = token.type == tokenize.COMMENT or token.start in prose
        found = FAMILIES.search(CITED.sub("", token.string) if cites else token.string)
        if found:
            yield token.start[0], found[0]


def test_nothing_in_the_core_names_a_family() -> None:
    named = [
        f"{file.relative_to(CORE.parent)}:{line}: {word}"
        for file in sorted(CORE.rglob("*.py"))
        for line, word in violations(file.read_text())
    ]
    assert named == []


@pytest.mark.parametrize(
    "text",
    [
        'print("a policy of openpi")',
        'print("""a policy of openpi""")',
        'print(f"""a policy of openpi, {1}""")',
        "action_horizon = 50",
        '"""The expert\'s own."""',
        '"""As openpi\'s norm_stats.json."""',
        "# pi0's",
        "class Gemma: ...",
        'CARD = """\nfrom lerobot import PI0Policy\n"""',
    ],
)
def test_a_name_is_seen(text: str) -> None:
    assert list(violations(text))


@pytest.mark.parametrize(
    "text",
    [
        '"""As openpi has it (openpi, models/lora.py)."""',
        "x = 1  # as google-deepmind/gemma names it",
        'def f():\n    """openpi, models/lora.py."""',
        'DISTRIBUTION = "openpi-bridge"',
        "unexpected = expertise = 1",
    ],
)
def test_a_source_may_be_cited(text: str) -> None:
    assert not list(violations(text))
