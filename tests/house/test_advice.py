"""No message tells people to destroy what they have."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DESTROYS = re.compile(r"\b(remove|delete|erase|rm -r\w*|discard)\b")
#: what may be removed: what bridge itself wrote and left, and one of several adapters of a copy
ALLOWED = ("left over, and safe to remove", "could not remove ", "delete_adapter in PEFT, on a copy")


def texts(path: Path) -> Iterator[str]:
    """The texts of a module that are no documentation."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def test_no_text_says_to_remove_a_file_or_a_tensor() -> None:
    said = [
        f"{path.relative_to(ROOT)}: {text}"
        for folder in ("bridge", "adapters", "cli")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for text in texts(path)
        if DESTROYS.search(text) and not any(allowed in text for allowed in ALLOWED)
    ]
    assert not said
