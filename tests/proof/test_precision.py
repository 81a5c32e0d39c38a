"""What bfloat16 costs, measured against what openpi's own runtime returned in float32.

A merge rounds weight and product together. An adapter beside its base rounds neither of its factors,
and the base only where it was wider than bfloat16: on a base that training kept in bfloat16, as
openpi's LoRA runs may, it costs nothing at all.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch

from bridge.proof.verify import verify
from tests.kit import golden
from tests.kit.forms import Forms
from tests.kit.golden import TOLERANCE, State
from tests.kit.record import Record

#: bfloat16 keeps eight bits: rounding a weight is off by 2⁻⁹ of it, the feed-forward is three weights deep
ROUNDED = (5e-4, 5e-3)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forms]:
    home = tmp_path_factory.mktemp("forms")
    return {name: Forms(golden.golden(name), home) for name in golden.WITH_LORA}


def with_adapter(base: State, adapter: Path) -> State:
    """What PEFT computes with a base in its own dtype and factors in float32, as one float32 weight."""
    factors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    state = dict(base)
    for name in factors:
        if name.endswith(".lora_A.weight"):
            weight = re.sub(r"^base_model\.model\.|\.lora_A", "", name)
            product = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
            state[weight] = base[weight].double() + product
    return state


@pytest.mark.parametrize(("name", "on_base"), [("pi0_lora", ROUNDED), ("pi05_lora", (0.0, TOLERANCE))])
def test_drift_of_a_merge_and_of_an_adapter(
    name: str, on_base: tuple[float, float], forms: dict[str, Forms], record_property: Record
) -> None:
    """float32 arithmetic, relative to each module's largest recorded output; pi05_lora's base is bfloat16."""
    of, recorded = forms[name], golden.golden(name).runtime
    base = golden.read(of["base-bfloat16"].path)
    states = {
        "merged, float32": (golden.read(of["merged"].path), (0.0, TOLERANCE)),
        "merged, bfloat16": (golden.read(of["merged-bfloat16"].path), ROUNDED),
        "adapter on a bfloat16 base": (with_adapter(base, of["adapter"].path), on_base),
    }
    for form, (state, (least, most)) in states.items():
        errors = golden.runtime_errors(recorded, state)
        worst, middle = max(errors.values()), sorted(errors.values())[len(errors) // 2]
        record_property(f"{name}, {form}: largest and median relative error", (worst, middle))
        print(f"{name}, {form}: off by {worst:.2g} at most, {middle:.2g} in the middle")
        assert least <= worst <= most, form


@pytest.mark.parametrize("name", golden.WITH_LORA)
def test_verify_shows_the_drift(name: str, forms: dict[str, Forms]) -> None:
    """The same from `bridge verify`: it holds, by what rounding is allowed, and the figure is there."""
    of = forms[name]
    wide, narrow, beside = (
        verify(of["orbax"].path, of[form].path, base=of[form].base, **of.golden.options)
        for form in ("merged", "merged-bfloat16", "adapter-on-bfloat16")
    )
    assert wide.holds and narrow.holds and beside.holds
    worst = {
        form: each.worst("runtime") for form, each in (("wide", wide), ("narrow", narrow), ("beside", beside))
    }
    assert worst["wide"].relative <= TOLERANCE
    assert ROUNDED[0] <= worst["narrow"].relative <= worst["narrow"].allowed <= ROUNDED[1]
    if name == "pi05_lora":
        assert worst["beside"].relative <= TOLERANCE
    else:
        assert ROUNDED[0] <= worst["beside"].relative <= ROUNDED[1]
    # computed in bfloat16, as policies run, activations round too, merged or not
    for verdict in (wide, narrow):
        found = [check.bfloat16 for check in verdict.checks if check.bfloat16 is not None]
        assert len(found) == 42 and 1e-3 < max(found) < 2e-2
