"""Arrays of numbers that no weight is converted from: what they are, by the names that containers give dtypes.

They are no damage: quantised weights, and what optimizers and other programs keep. Codes are those
of safetensors (tensor.rs, ``Dtype``), and of zarr as TensorStore writes it.
"""

from __future__ import annotations

import re

_FLOATS = "floats of {} bits"
#: pattern of a code -> what it stands for, with the number in it
_KINDS = (
    (r"F8_E8M0", "powers of two of 8 bits, the scales of quantised weights"),
    (r"F(4|6|8)(_\w+)?", _FLOATS),
    (r"float(4|6|8)_\w+", _FLOATS),
    (r"u?int(1|2|4)", "integers of {} bits"),
    (r"C(64|128)", "complex numbers of {} bits"),
    (r"complex(64|128)", "complex numbers of {} bits"),
    (r"[<>]c(8|16)", "complex numbers of {} bytes"),
)
DEQUANTISE = "save the weights in float32, bfloat16 or float16, dequantised where they are quantised"


class ForeignDtype(ValueError):
    """An array has a dtype that is valid, and that bridge does not read."""

    def __init__(self, code: str, kind: str) -> None:
        super().__init__(f"stored as {code} ({kind}), which bridge does not convert")


def check_foreign(code: object) -> None:
    """Raise ForeignDtype for the code of a dtype that is valid, and that bridge does not read."""
    for pattern, kind in _KINDS:
        if isinstance(code, str) and (match := re.fullmatch(pattern, code)):
            raise ForeignDtype(code, kind.format(*match.groups()[:1]))
