"""Made-up results for the HTML reports, and a page of each kind."""

from bridge.compare.diff import Comparison, Difference
from bridge.errors import Problem
from bridge.proof.verify import Check, Verdict
from bridge.report.pages import diff_report, verify_report

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
STACK = "model.language_model"
SPECTRUM = (0.5, 0.2, 0.01, 0.0)


def check(name: str, relative: float, kind: str = "runtime", part: str = "paligemma") -> Check:
    runtime = kind == "runtime"
    allowed, narrow = (2e-6, 5e-3) if runtime else (0.0, None)
    return Check(name, part, "leaf", kind, (0,), relative, relative / 5, relative, allowed, narrow)


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
    return Verdict("/run/100/params", "/out", "pi0", (*runtime, *equal), files, tuple(problems))


def difference(name: str, gap: float, lora: str = "", part: str = "expert") -> Difference:
    spectrum = SPECTRUM if lora else ()
    return Difference(name, part, "leaf", (0,), "bfloat16", "float32", gap, 2.0, gap / 3, lora, spectrum)


def comparison(*more: Difference) -> Comparison:
    found = [
        difference(f"{STACK}.layers.{layer}.{module}.weight", 0.1 * (n + 1), "b")
        for n, module in enumerate(MODULES)
        for layer in range(3)
    ]
    found += [difference(f"{STACK}.layers.{layer}.input_layernorm.weight", 0.0) for layer in range(3)]
    found += [difference("state_proj.weight", 0.3, part="projections")]
    return Comparison("/a", "/b", "pi0", ("orbax[base]", "orbax[base+lora]"), (*found, *more))


PAGES = {
    "passing": lambda: verify_report(verdict()),
    "failing": lambda: verify_report(
        verdict(0.5, Problem("layers.1.self_attn.k_proj: differs", "convert again"))
    ),
    "comparison": lambda: diff_report(comparison()),
}
