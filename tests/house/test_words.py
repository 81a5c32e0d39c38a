"""The core knows no family: its words, files and facts are in the plug-ins."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

CORE = Path(__file__).resolve().parents[2] / "bridge"

#: of families of models and what belongs to them
FAMILIES = re.compile(
    r"openpi(?!-bridge)|pi0|paligemma|gemma|siglip|lerobot|\bexperts?\b|horizon|norm.?stats|feed.?forward",
    re.IGNORECASE,
)
#: sources of facts may be cited, in comments and docstrings: "openpi, models/lora.py"
CITED = re.compile(r"openpi|google-deepmind/gemma|gemma/peft|FeedForward", re.IGNORECASE)
DOCSTRING = re.compile(r'[rR]?"""')


def violations(file: Path) -> Iterator[str]:
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
    for token in tokens:
        prose = token.type == tokenize.COMMENT or bool(DOCSTRING.match(token.string))
        text = CITED.sub("", token.string) if prose else token.string
        if found := FAMILIES.search(text):
            yield f"{file.relative_to(CORE.parent)}:{token.start[0]}: {found[0]}"


def test_nothing_in_the_core_names_a_family() -> None:
    assert [each for file in sorted(CORE.rglob("*.py")) for each in violations(file)] == []


def test_a_name_is_seen(tmp_path: Path) -> None:
    """The check itself: in a string, in a name, in a docstring that cites nothing."""
    for text in ('print("of openpi")', "action_horizon = 50", '"""The expert\'s own."""', "# pi0's"):
        file = CORE / "planted.py"
        assert FAMILIES.search(CITED.sub("", text) if text.startswith(('"""', "#")) else text), (file, text)
