"""Made-up results for the HTML reports, and a page of each kind."""

from bridge.compare.diff import Comparison, Difference
from bridge.errors import Problem
from bridge.proof.checks import Check
from bridge.proof.verify import Verdict
from bridge.report.pages import diff_report, verify_report

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
STACK = "model.language_model"
SPECTRUM = (0.5, 0.2, 0.01, 0.0)


def check(name: str, relative: float, kind: str = "runtime", part: str = "paligemma") -> Check:
    runtime = kind == "runtime"
    allowed, narrow = (2e-6, 5e-3) if runtime else (0.0, None)
    return Check(
        name=name,
        part=part,
        leaf="leaf",
        kind=kind,
        index=(0,),
        max_abs=relative,
        mean_abs=relative / 5,
        relative=relative,
        allowed=allowed,
        bfloat16=narrow,
    )


def verdict(worst: float = 4e-7, *problems: Problem) -> Verdict:
    runtime = [
        check(f"{STACK}.layers.{layer}.{module}.weight", worst if layer == n == 1 else 2e-7)
        for n, module in enumerate(MODULES)
        for layer in range(3)
    ]
    equal = [
        check(f"{STACK}.norm.weight", 0, "equal"),
        check("action_in_proj.bias", 0, "equal", "projections"),
    ]
    files = {"bridge.json": not problems}
    return Verdict(
        source="/run/100/params",
        destination="/out",
        model="pi0",
        checks=(*runtime, *equal),
        files=files,
        problems=tuple(problems),
    )


def difference(name: str, gap: float, lora: str = "", part: str = "expert") -> Difference:
    spectrum = SPECTRUM if lora else ()
    return Difference(
        name=name,
        part=part,
        leaf="leaf",
        index=(0,),
        dtype_a="bfloat16",
        dtype_b="float32",
        gap=gap,
        norm=2.0,
        max_abs=gap / 3,
        lora=lora,
        spectrum=spectrum,
    )


def comparison(*more: Difference) -> Comparison:
    found = [
        difference(f"{STACK}.layers.{layer}.{module}.weight", 0.1 * (n + 1), "b")
        for n, module in enumerate(MODULES)
        for layer in range(3)
    ]
    found += [difference(f"{STACK}.layers.{layer}.input_layernorm.weight", 0.0) for layer in range(3)]
    found += [difference("state_proj.weight", 0.3, part="projections")]
    return Comparison(
        a="/a",
        b="/b",
        model="pi0",
        states=("orbax[base]", "orbax[base+lora]"),
        differences=(*found, *more),
    )


PAGES = {
    "passing": lambda: verify_report(verdict()),
    "failing": lambda: verify_report(
        verdict(0.5, Problem("layers.1.self_attn.k_proj: differs", "convert again"))
    ),
    "comparison": lambda: diff_report(comparison()),
}
