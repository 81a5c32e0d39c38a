"""Settings that hold for every test."""

import os

import pytest

# Before any test module imports them: JAX stays on the CPU, and nothing asks a model hub.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def old_orbax_python() -> str:
    """The interpreter that has openpi's pinned Orbax; tests that take it carry the marker old_orbax."""
    python = os.environ.get("BRIDGE_OLD_ORBAX_PYTHON")
    if not python:
        pytest.skip("BRIDGE_OLD_ORBAX_PYTHON names no interpreter with openpi's pinned Orbax")
    return python
