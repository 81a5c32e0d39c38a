"""Who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def imported(file: Path) -> Iterator[str]:
    """Dotted names, wherever in the file they are imported."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def test_no_test_file_is_imported() -> None:
    """What two files share belongs in tests/kit, so that any test file can be moved, split or renamed."""
    found = {
        f"{file.relative_to(TESTS)} imports {name}"
        for file in TESTS.rglob("*.py")
        for name in imported(file)
        if any(part.startswith("test_") for part in name.split("."))
    }
    assert found == set()
