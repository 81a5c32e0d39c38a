"""Every fault has a row."""

from tests.faults.table import FAULTS
from tests.faults.test_filesystem import ROWS as FILE_SYSTEM
from tests.faults.test_sources import ROWS as SOURCES

ROWS = (*FILE_SYSTEM, *SOURCES)


def test_every_number_has_a_row() -> None:
    assert {fault.number for fault in ROWS} == set(FAULTS)


def test_what_cannot_be_provoked_says_why() -> None:
    for fault in ROWS:
        assert fault.provoke is not None or len(fault.why_not) > 20, fault.name


def test_no_row_stands_twice() -> None:
    names = [fault.name for fault in ROWS]
    assert sorted(names) == sorted(set(names))
