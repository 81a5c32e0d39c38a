"""The states and converters bridge has. The graph is exactly this table."""

from __future__ import annotations

from bridge.graph import Converter, Loss, State

ORBAX_BASE = State("orbax", "base", format="orbax")
ORBAX_LORA = State("orbax", "base+lora", format="orbax")
TORCH_MERGED = State("torch-merged", "base", format="torch")
TORCH_BASE = State("torch-base", "base", format="torch")

CONVERTERS = (
    Converter("export", ORBAX_BASE, TORCH_MERGED, Loss.EXACT, "rename, transpose, reshape"),
    Converter(
        "fold",
        ORBAX_LORA,
        TORCH_MERGED,
        Loss.DROP,
        "sum LoRA factors into the weights, then export",
        fold=True,
    ),
    Converter(
        "strip",
        ORBAX_LORA,
        TORCH_BASE,
        Loss.DROP,
        "leave LoRA out: the base an adapter applies to",
        last=True,
    ),
)

STATES = tuple(dict.fromkeys(state for edge in CONVERTERS for state in (edge.source, edge.target)))
TARGETS = tuple(dict.fromkeys(edge.target.name for edge in CONVERTERS))
"""What ``--to`` accepts."""
