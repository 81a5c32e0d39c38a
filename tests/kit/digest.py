"""Fingerprints of a directory, to compare two, or one before and after."""

import hashlib
import os
from pathlib import Path
from typing import Any


def digest(directory: Path) -> dict[str, str]:
    """Path to hash, of every file below."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def snapshot(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a directory: kind, mode, links, contents."""
    found: dict[str, tuple[Any, ...]] = {}
    for root, directories, files in os.walk(directory):
        for name in [*directories, *files]:
            path = os.path.join(root, name)
            state = os.lstat(path)
            content: Any = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
            found[os.path.relpath(path, directory)] = (state.st_mode, state.st_uid, content)
    return found
