"""The type of a fixture of pytest."""

from typing import Protocol


class Record(Protocol):
    """pytest's `record_property`."""

    def __call__(self, name: str, value: object) -> None: ...
