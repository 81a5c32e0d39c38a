"""The options of a verification."""

from pathlib import Path
from typing import Annotated

from bridge.checkpoint.options import SourceOptions
from bridge.rules.option import File, Number, Option, documented

CHECKS = "Checks"


class VerifyOptions(SourceOptions, total=False):
    """Options of :func:`bridge.verify`."""

    rtol: Annotated[
        float | None,
        Option(
            kind=Number("RTOL", whole=False),
            group=CHECKS,
            help="Relative difference allowed; the default depends on dtype and size.",
        ),
    ]
    seed: Annotated[
        int,
        Option(kind=Number(positive=False), default=0, group=CHECKS, help="Seed for the random inputs."),
    ]
    reference: Annotated[
        str | Path | None,
        Option(
            kind=File(),
            group=CHECKS,
            help="Recorded input and output of the JAX runtime (.npz), for --full-model.",
        ),
    ]


VerifyOptions.__doc__ = documented(VerifyOptions)
