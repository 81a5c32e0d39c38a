"""Whatever bytes a reader is given, it reads them or refuses in one line: by hypothesis, without a fuzzer.

The targets are those of tests/fuzz, which atheris drives for longer; what was found there and
mended is kept in tests/fuzz/found and replayed here.
"""

from __future__ import annotations

import contextlib
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, refused

FOUND = Path(__file__).parents[1] / "fuzz" / "found"
#: bytes of address space that a run may take
MEMORY = 512 << 20


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Whoever asks for much more than there is gets a MemoryError, which is no refusal."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutated(seed: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    """A few of the changes that fuzzers make."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
        change = chance.randrange(7)
        if change == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif change == 1:
            del data[at : min(end, at + 16)]
        elif change == 2:
            data[at:at] = chance.randbytes(chance.randrange(1, 5))
        elif change == 3:
            data[at:at] = data[at : min(end, at + 64)]
        elif change == 4 and words:
            data[at : min(end, at + 8)] = chance.choice(words)
        elif change == 5:
            digits = [n for n, byte in enumerate(data) if chr(byte).isdigit()]
            if digits:
                where = chance.choice(digits)
                data[where : where + 1] = chance.choice((b"-1", b"0", b"9" * 20, b"1e400", b"[]", b"true"))
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_any_change_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    # threads of TensorStore's take their address space once
    refused(target, seeds[0], tmp_path)

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(seeds), st.integers(0, 1 << 32))
    def run(seed: bytes, chance: int) -> None:
        refused(target, mutated(seed, target.words, random.Random(chance)), tmp_path)

    with little_memory():
        run()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.binary(max_size=400))
    def run(data: bytes) -> None:
        refused(TARGETS[name], data, tmp_path)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_a_valid_input_is_read(name: str, tmp_path: Path) -> None:
    """Or the fuzzing above would find nothing behind the first check."""
    assert any(refused(TARGETS[name], seed, tmp_path) is None for seed in TARGETS[name].seeds())


@pytest.mark.parametrize(
    "file", sorted(FOUND.glob("*/*")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_what_was_found_stays_mended(file: Path, tmp_path: Path) -> None:
    refused(TARGETS[file.parent.name], file.read_bytes(), tmp_path)
