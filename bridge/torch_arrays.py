"""numpy arrays as torch tensors, and torch kept to a thread. Imports torch when something is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from bridge.arrays import BFLOAT16

if TYPE_CHECKING:
    import torch


def tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over an array's memory, where it lies in C order; bfloat16 stays bfloat16."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch kept to the thread that calls it: its own would only wait for those of the workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
