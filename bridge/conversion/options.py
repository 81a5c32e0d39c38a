"""What a user chooses about a conversion, and what of it says nothing about the output asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bridge import converters
from bridge.arrays import WEIGHT_DTYPES
from bridge.errors import Problem
from bridge.graph import State

DTYPES = ("keep", *WEIGHT_DTYPES)


@dataclass(frozen=True)
class Options:
    """What the user chose, as given to :func:`bridge.plan`."""

    dtype: str | None = None
    layout: str = "openpi"
    action_horizon: int | None = None
    keep_alpha: bool = False
    rank: int | Mapping[str, int] | None = None
    with_base: bool = False
    base_name: str | None = None
    modules_to_save: bool = False
    fold: bool = False
    value_suffix: bool = False
    lossy: bool = False

    @property
    def compress_to(self) -> int | None:
        """The rank every module of an adapter is compressed to, if it is."""
        return self.rank if isinstance(self.rank, int) else None


def option_problems(options: Options, source: State, target: State, base: object) -> list[Problem]:
    """Options that say nothing about the target asked for: they would be ignored in silence."""
    problems = []
    if options.dtype is not None and options.dtype not in DTYPES:
        problems.append(
            Problem(f"{options.dtype} is no dtype for weights", f"use one of {', '.join(DTYPES)}")
        )
    is_adapter, is_tree = target is converters.PEFT, target.format == converters.ORBAX_BASE.format
    for flag, given, fits in (
        ("--keep-alpha", options.keep_alpha, is_adapter),
        ("--with-base", options.with_base, is_adapter),
        ("--base-name", options.base_name is not None, is_adapter),
        ("--modules-to-save", options.modules_to_save, is_adapter),
        ("--base", base is not None, is_adapter or source is converters.PEFT),
        ("--rank", options.rank is not None, is_adapter or target is converters.ORBAX_LORA),
        ("--lossy", options.lossy, target is converters.ORBAX_LORA),
        ("--fold", options.fold, is_tree),
        ("--value-suffix", options.value_suffix, is_tree),
        ("--layout", options.layout != "openpi", not is_tree),
        ("--action-horizon", options.action_horizon is not None, not is_tree),
    ):
        if given and not fits:
            problems.append(Problem(f"{flag} says nothing about {target}", f"leave {flag} out"))
    if options.modules_to_save and is_adapter and base is None:
        problems.append(
            Problem(
                "--modules-to-save needs the base whose other weights the adapter should carry",
                "add --base PATH",
            )
        )
    if is_adapter and isinstance(options.rank, Mapping):
        problems.append(Problem("--rank is given by expert, and compresses all modules", "give one number"))
    ranks = options.rank.values() if isinstance(options.rank, Mapping) else (options.rank,)
    problems += [
        Problem(f"--rank is {rank}", "give a positive whole number")
        for rank in ranks
        if rank is not None and (rank < 1 or rank != int(rank))
    ]
    return problems
