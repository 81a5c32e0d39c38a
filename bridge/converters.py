"""The states and converters bridge has. The graph is exactly this table."""

from __future__ import annotations

from bridge.graph import Converter, Loss, State

ORBAX_BASE = State("orbax", "base", format="orbax")
ORBAX_LORA = State("orbax", "base+lora", format="orbax")
TORCH_MERGED = State("torch-merged", "base", format="torch")
TORCH_BASE = State("torch-base", "base", format="torch")
PEFT = State("peft-adapter", "lora", format="peft")

_BASE = frozenset({"base"})

CONVERTERS = (
    Converter("export", ORBAX_BASE, TORCH_MERGED, Loss.EXACT, "rename, transpose, reshape"),
    Converter("fold", ORBAX_LORA, TORCH_MERGED, Loss.DROP, "sum LoRA factors into the weights", fold=True),
    Converter("split", ORBAX_LORA, PEFT, Loss.GAUGE, "LoRA factors as PEFT tensors, unmerged"),
    Converter(
        "strip", ORBAX_LORA, TORCH_BASE, Loss.DROP, "leave LoRA out: the base of an adapter", last=True
    ),
    Converter("import", TORCH_MERGED, ORBAX_BASE, Loss.EXACT, "stack, transpose, reshape"),
    Converter("import", TORCH_BASE, ORBAX_BASE, Loss.EXACT, "stack, transpose, reshape"),
    Converter("join", PEFT, ORBAX_LORA, Loss.GAUGE, "an adapter beside its base, unmerged", needs=_BASE),
    Converter("merge", PEFT, TORCH_MERGED, Loss.DROP, "sum an adapter into its base", fold=True, needs=_BASE),
)

STATES = tuple(dict.fromkeys(state for edge in CONVERTERS for state in (edge.source, edge.target)))
TARGETS = tuple(dict.fromkeys(edge.target.name for edge in CONVERTERS))
"""What ``--to`` accepts."""
