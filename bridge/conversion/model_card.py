"""The README that is written beside an adapter: what it is and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.scales import Scale
from bridge.conversion.outputs import Output
from bridge.peft.config import A

if TYPE_CHECKING:
    from bridge.conversion.options import Options

_LOADING = {
    "openpi": """\
from safetensors.torch import load_model
from peft import PeftModel

policy = PI0Pytorch(config)  # openpi, models_pytorch/pi0_pytorch.py
load_model(policy, "BASE/model.safetensors")
policy = PeftModel.from_pretrained(policy, "ADAPTER")""",
    "transformers": """\
from transformers import PI0ForConditionalGeneration
from peft import PeftModel

policy = PI0ForConditionalGeneration.from_pretrained("BASE")
policy = PeftModel.from_pretrained(policy, "ADAPTER")""",
    "lerobot": """\
from lerobot.policies.pi0.modeling_pi0 import PI0Policy  # pi05: PI05Policy
from peft import PeftModel

policy = PI0Policy.from_pretrained("BASE")
policy = PeftModel.from_pretrained(policy, "ADAPTER")""",
}


def model_card(
    checkpoint: Checkpoint, adapter: Output, scales: Mapping[str, Scale], options: Options
) -> bytes:
    """The card, as Markdown."""
    modules = sum(name.endswith(A) for name in adapter.specs)
    parameters = sum(spec.size for spec in adapter.specs.values())
    alpha = (
        "Factors are as openpi trained them; alpha / rank in `adapter_config.json` is openpi's scale."
        if options.keep_alpha
        else "openpi's scale is folded into `lora_B`, so alpha equals the rank everywhere."
    )
    base = (
        "Its base is in `base/`."
        if options.with_base
        else "Apply it to the base it was trained on: a LoRA run of openpi trains vision tower, projector and "
        "projections in full, and on another base it is another policy."
    )
    loading = _LOADING.get(adapter.layout.name, "")
    lines = [
        "---",
        "library_name: peft",
        "---",
        "",
        f"# LoRA adapter of an openpi {checkpoint.model.name} policy",
        "",
        f"{modules} modules, {parameters} parameters, module paths of {adapter.layout.name}. {base}",
        "",
        "| expert | rank | alpha | scale |",
        "|---|---|---|---|",
        *(f"| {s.part} | {s.rank} | {s.alpha:g} | {s.value:g} |" for s in scales.values()),
        "",
        f"{alpha} The feed-forward has scale 1, as in openpi's runtime. In PEFT, `q_proj` has openpi's rank times "
        "the number of heads, because every head has factors of its own.",
        "",
        *(("```python", loading, "```", "") if loading else ()),
        "Written by bridge (openpi-bridge); `bridge.json` says from what.",
        "",
    ]
    return "\n".join(lines).encode()
