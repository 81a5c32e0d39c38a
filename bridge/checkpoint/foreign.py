"""What arrays are that no model of a family has: state of a quantiser, LoRA of another kind, statistics.

None of them may be left out without another thought, so no fix advises it. Endings of names are those of
bitsandbytes (functional.py, ``QuantState``; nn/modules.py, ``Linear8bitLt``), GPTQ and AWQ (``qweight``),
compressed-tensors (compressors/), transformers (integrations/finegrained_fp8.py) and peft 0.21
(tuners/lora/layer.py, dora.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from bridge.errors import Problem
from bridge.formats.contract import Source
from bridge.formats.dtypes import DEQUANTISE
from bridge.formats.safetensors.peft import CONFIG as ADAPTER
from bridge.formats.safetensors.torch import CONFIG

#: what quantised a weight -> the endings of what it keeps beside the weight; the first that fits is it
_QUANTISERS = {
    "bitsandbytes, 4 bits": r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)",
    "bitsandbytes, 8 bits": r"\.(SCB|weight_format)",
    "GPTQ": r"\.g_idx",
    "AWQ or GPTQ": r"\.(qweight|qzeros)",
    "compressed-tensors": r"\.weight_(packed|shape|zero_point|g_idx)",
    "with scales beside the weights": r"[._](weight|input)_scale(_inv|_2)?",
}
#: endings of tensors of LoRA of other kinds -> the field of the config that makes PEFT apply them, what they are
_KINDS = {
    r"\.lora_magnitude_vector(\.weight)?": ("use_dora", "DoRA's magnitudes"),
    r"\.lora_B\.bias": ("lora_bias", "a bias of LoRA"),
    r"\.lora_embedding_[AB]": ("", "LoRA of an embedding"),
}
_LORA = re.compile(r"(?:^|[./_])lora_?(?:[abAB]|[A-Z]\w*|embedding_[AB]|magnitude_vector)(?![a-z])")
_STATISTICS = re.compile(
    r"(?:^|[./])(?:(?:un)?normali[sz]e\w*|running_(?:mean|var)|num_batches_tracked)(?![^./])"
)


def quantised(where: object, names: Iterable[str]) -> list[Problem]:
    """That what lies somewhere is quantised, where some of the names that a model does not have say so."""
    listed = list(names)
    for by, ending in _QUANTISERS.items():
        mark = next((name for name in listed if re.search(f"{ending}$", name)), None)
        if mark is not None:
            return [Problem(f"{where} is quantised ({by}: {mark})", DEQUANTISE)]
    return []


def lora_kind(name: str) -> tuple[str, str]:
    """Of a tensor of LoRA of another kind: the field of PEFT's config that applies it, if any, and what it is."""
    return next((kind for ending, kind in _KINDS.items() if re.search(f"{ending}$", name)), ("", ""))


def never_left_out(name: str) -> str:
    """What to do about an array that carries training or state; empty for any other."""
    if _LORA.search(name):
        return (
            "it is LoRA, of a weight or of a kind that bridge does not know here: merge it where it was trained, "
            "or declare it in a plug-in"
        )
    if _STATISTICS.search(name):
        return (
            "it is what the model normalises by: convert the checkpoint in the layout that it was saved in, "
            "or declare it in a plug-in"
        )
    return ""


def says_config(source: Source) -> str:
    """What the config beside weights or an adapter says they are, as an end of a cause; empty where it says nothing."""
    for file, field, word in (
        (CONFIG, "model_type", "says"),
        (ADAPTER, "base_model_name_or_path", "names the base"),
    ):
        config = source.metadata.get(file)
        said = config.get(field) if isinstance(config, Mapping) else None
        if isinstance(said, str) and said:
            return f"; {file} {word} {said!r:.80}"
    return ""
