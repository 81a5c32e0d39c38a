"""Settings that hold for every test."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any test module imports them: JAX stays on the CPU, and nothing asks a model hub.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Asserts in what tests share show what they compared, as those of the tests do.
pytest.register_assert_rewrite("tests.kit", "tests.faults")

# Under nohup a hang-up is ignored, and an interrupt in the background of a shell (`make test &`); so they would be in
# every process that the tests start and signal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """The command, run in this process, leaves handlers that would end it at the next test's interrupt."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def old_orbax_python() -> str:
    """The interpreter that has openpi's pinned Orbax; tests that take it carry the marker old_orbax.

    `make old-orbax` makes it, and CI does; where it cannot be installed these tests are skipped.
    """
    made = Path(__file__).resolve().parents[1] / ".venv-old-orbax" / "bin" / "python"
    python = os.environ.get("BRIDGE_OLD_ORBAX_PYTHON") or (str(made) if made.is_file() else "")
    if not python:
        pytest.skip("no environment with openpi's pinned Orbax: `make old-orbax` makes one")
    return python


@pytest.fixture(scope="session")
def lerobot_python() -> str:
    """The interpreter that has LeRobot; tests that take it carry the marker lerobot.

    `make lerobot` makes it, and CI does; where it cannot be installed these tests are skipped.
    """
    home = Path(__file__).resolve().parents[1] / ".venv-lerobot"
    made = home / "bin" / "python"
    python = os.environ.get("BRIDGE_LEROBOT_PYTHON") or (str(made) if (home / ".installed").is_file() else "")
    if not python:
        pytest.skip("no environment with LeRobot: `make lerobot` makes one, from Python 3.12 or 3.13")
    return python
