"""Every row of the table: the fault is provoked, and the user sees what the row says. And every fault has a row."""

import os

import pytest

from tests.faults import filesystem, sources
from tests.faults.table import FAULTS, Fault, Scene, check, provoked, run_here

ROWS = (*filesystem.ROWS, *sources.ROWS)


@pytest.mark.parametrize("fault", provoked(filesystem.ROWS))
def test_fault_of_the_file_system(fault: Fault, scene: Scene) -> None:
    check(fault, scene)


@pytest.mark.parametrize("fault", provoked(sources.ROWS))
def test_fault_of_a_source(fault: Fault, scene: Scene) -> None:
    with sources.no_pickle(scene):
        check(fault, scene)


#: rows of the sample whose fault does not show in names, shapes and dtypes, which is all that inspect reads, or only
#: in a conversion -> exit status of inspect, verify and diff
SEEN_LATER = {
    "09 burst of damage in the data: of zeros": (0, 1, 1),
    "10 zstd stream too short, too long, or a bomb: too little, size not told": (0, 1, 1),
    "23 finite values that overflow a cast: bfloat16": (0, 1, 0),
}


@pytest.mark.parametrize(
    "fault", [fault for fault in provoked(sources.ROWS)[::9] if fault.values[0].expect.code]
)
def test_who_only_looks_is_told_as_well(fault: Fault, scene: Scene) -> None:
    """inspect, verify and diff read by the same readers, and end the same way: here, a sample of the rows."""
    assert fault.provoke is not None
    fault.provoke(scene)
    inspects, verifies, differs = SEEN_LATER.get(fault.name, (1, 1, 1))
    for arguments, code in (
        (["inspect"], inspects),
        (["inspect", "--json"], inspects),
        (["verify"], verifies),
        (["diff", os.fspath(scene.src)], differs),
    ):
        ran = run_here([*arguments, os.fspath(scene.src)])
        assert ran.code == code, (arguments, ran)
        assert "internal error in bridge" not in ran.err and "Traceback" not in ran.err, ran.err


def test_the_sample_has_the_rows_that_are_told_apart() -> None:
    assert SEEN_LATER.keys() <= {fault.values[0].name for fault in provoked(sources.ROWS)[::9]}


def test_every_number_has_a_row() -> None:
    assert {fault.number for fault in ROWS} == set(FAULTS)


def test_every_fault_of_a_source_has_a_row() -> None:
    # what changes while it is read is among the faults of the file system
    assert {fault.number for fault in sources.ROWS} == set(range(1, 33)) - {16}


def test_what_cannot_be_provoked_says_why() -> None:
    for fault in ROWS:
        assert fault.provoke is not None or len(fault.why_not) > 20, fault.name


def test_no_row_stands_twice() -> None:
    names = [fault.name for fault in ROWS]
    assert sorted(names) == sorted(set(names))
