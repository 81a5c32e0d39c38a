"""Every fault has a row."""

import importlib
from pathlib import Path

from tests.faults.table import FAULTS, Fault
from tests.faults.test_filesystem import ROWS as FILE_SYSTEM


def rows() -> list[Fault]:
    found = list(FILE_SYSTEM)
    if (Path(__file__).parent / "test_sources.py").is_file():
        found += importlib.import_module("tests.faults.test_sources").ROWS
    return found


def test_every_number_has_a_row() -> None:
    have = {fault.number for fault in rows()}
    wanted = set(FAULTS) if len(rows()) > len(FILE_SYSTEM) else {13, 16, *range(33, 51)}
    assert wanted - have == set()


def test_what_cannot_be_provoked_says_why() -> None:
    for fault in rows():
        assert fault.provoke is not None or len(fault.why_not) > 20, fault.name


def test_no_row_stands_twice() -> None:
    names = [fault.name for fault in rows()]
    assert sorted(names) == sorted(set(names))
