"""The direction of imports: from folder to folder one way, no circle between files, none hidden in a function."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: folders of bridge/ from the ground up; files directly in bridge/ that are not listed are ground
FLOORS = [
    {"rules", "formats", "peft"},
    {"lora"},
    {"stream", "publish"},
    {"facts"},
    {"checkpoint"},
    {"compare"},
    {"proof"},
    {"conversion"},
    {"report", "api", "nnx_arrays"},
    {"cli", "adapters"},
]
#: within a floor
BESIDE = {("peft", "rules"), ("api", "nnx_arrays")}
MAX_ROOMS = 24
VERBS = {"convert", "plan", "run", "open", "describe", "verify", "diff", "load_jax", "load_torch", "load_nnx"}


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    homes = {"bridge": "bridge", "adapters": "bridge.adapters", "cli": "bridge.cli"}
    return {
        ".".join((package, *file.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): file
        for folder, package in homes.items()
        for file in (ROOT / folder).rglob("*.py")
    }


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[tuple[str, ast.stmt, bool]]:
    """Modules of the project that a file imports, with the statement, and whether it stands in a function."""
    tree = ast.parse(file.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = (
                ".".join((*package.split(".")[: len(package.split(".")) - node.level + 1],))
                if node.level
                else ""
            )
            base = ".".join(filter(None, (home, node.module)))
            targets = [f"{base}.{alias.name}" for alias in node.names]
        for target in targets:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                assert isinstance(node, ast.stmt)
                yield target, node, id(node) in inside


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def floor(name: str) -> int:
    return next((number for number, rooms in enumerate(FLOORS, 1) if room(name) in rooms), 0)


def faults() -> Iterator[str]:
    known = modules()
    for name, file in known.items():
        if name == "bridge":
            continue  # the lazy public face
        for target, node, hidden in imports(name, file, known):
            where = f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
            if target == "bridge" and room(name) not in {"adapters", "cli"} and not hidden:
                yield f"{where}  (imports the package's face)"
            if hidden and target != "bridge" and room(name) != "cli":
                yield f"{where}  (inside a function)"
            if target != "bridge" and room(name) == "adapters" != room(target):
                yield f"{where}  (a family imports the public names of bridge alone)"
            same = (
                room(name) == room(target)
                or (room(name), room(target)) in BESIDE
                or floor(name) == 0 == floor(target)
            )
            if target != "bridge" and not same and floor(target) >= floor(name):
                yield f"{where}  (not downward)"


def test_imports_go_one_way() -> None:
    assert list(faults()) == []


def test_no_circle_between_files() -> None:
    known = modules()
    graph = {
        name: {target for target, _, _ in imports(name, file, known) if target != "bridge"}
        for name, file in known.items()
        if name != "bridge"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_rooms_directly_in_the_package() -> None:
    inside = (ROOT / "bridge").iterdir()
    rooms = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(rooms) <= MAX_ROOMS, sorted(rooms)
    assert not rooms & VERBS
