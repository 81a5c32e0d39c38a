"""`bridge verify` on everything that bridge makes of the golden checkpoints: it holds, and says by how much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import bridge
from bridge.checkpoint.open import open_source, understand
from bridge.cli.main import cli
from bridge.formats.contract import states
from bridge.formats.disk.location import Location
from bridge.graph import State
from bridge.proof.verify import Verdict
from bridge.proof.verify import verify as prove
from tests.kit import checkpoints, golden
from tests.kit.forms import Form, Forms
from tests.kit.golden import TOLERANCE, Golden

#: one of each state, in every direction among them
STATES = {
    "pi0_lora": ("orbax", "merged", "adapter", "folded", "joined"),
    "pi05_lora": ("orbax", "merged", "adapter", "folded", "joined"),
    "pi0_base": ("orbax", "merged", "folded"),
}
#: other forms of these states, against what openpi saved, there and back
OTHERS = {
    "pi0_lora": (
        "merged-bfloat16",
        "merged-float16",
        "lerobot",
        "transformers",
        "remerged",
        "folded-at-once",
        "adapter-kept-alpha",
        "adapter-lerobot",
        "adapter-on-orbax",
    ),
    "pi05_lora": (
        "merged-bfloat16",
        "lerobot",
        "folded-at-once",
        "adapter-kept-alpha",
        "adapter-on-orbax",
        "adapter-on-bfloat16",
    ),
    "pi0_base": ("merged-bfloat16", "lerobot", "transformers"),
}
DIRECTIONS = [
    *((name, a, b) for name, states in STATES.items() for a in states for b in states),
    *((name, "orbax", other) for name, others in OTHERS.items() for other in others),
    *((name, other, "orbax") for name, others in OTHERS.items() for other in others),
    ("pi0_lora", "merged", "remerged"),
    ("pi0_lora", "lerobot", "transformers"),
    ("pi0_lora", "adapter", "adapter-kept-alpha"),
    ("pi0_lora", "merged-bfloat16", "adapter"),
    ("pi05_lora", "base", "base-orbax"),
    ("pi05_lora", "base-orbax", "base"),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forms]:
    home = tmp_path_factory.mktemp("forms")
    return {name: Forms(golden.golden(name), home) for name in golden.NAMES}


def verify(forms: Forms, a: Form, b: Form, **options: object) -> Verdict:
    return prove(a.path, b.path, base=a.base or b.base, **forms.golden.options, **options)


@pytest.mark.parametrize(("name", "a", "b"), DIRECTIONS)
def test_holds_in_every_direction(name: str, a: str, b: str, forms: dict[str, Forms]) -> None:
    """No weight is left out, and what is run agrees as well as float32 can."""
    verdict = verify(forms[name], forms[name][a], forms[name][b])
    assert verdict.holds, verdict.problems
    assert set(verdict.files.values()) == {True}
    source = golden.golden(name)
    by_hand = golden.by_hand(source.leaves).keys()
    assert [check.name for check in verdict.checks] == list(dict.fromkeys(c.name for c in verdict.checks))
    assert {check.name for check in verdict.checks} == by_hand - {golden.DEAD_HEAD}
    narrow = any("float16" in each for each in (a, b))
    for check in verdict.checks:
        assert check.relative <= check.allowed <= (4e-3 if narrow else TOLERANCE)
    run = {check.name for check in verdict.checks if check.kind == "runtime"}
    if is_jax(a) != is_jax(b) or has_factors(source, a) or has_factors(source, b):
        assert len(run) == 2 * 7 * source.facts["dims"]["expert"]["depth"]
        assert run >= golden.merged_names(source.leaves)
    else:
        assert not run


def is_jax(form: str) -> bool:
    return form in ("base-orbax", "orbax", "folded", "folded-at-once", "joined", "adapter-on-orbax")


def has_factors(source: Golden, form: str) -> bool:
    return form == "joined" or form.startswith("adapter") or (form == "orbax" and bool(source.scales))


def test_no_direction_is_left_out(forms: dict[str, Forms]) -> None:
    """Every two states of the graph that can be one policy are verified, in both orders."""
    tried = {(state(forms[name][a]), state(forms[name][b])) for name, a, b in DIRECTIONS}
    # the base of an adapter is no policy of its own; its files tell themselves as torch-merged
    policies = {state for state in states() if not state.stripped}
    assert tried >= {(a, b) for a in policies for b in policies}


def state(form: Form) -> State:
    return understand(open_source(Location.parse(form.path))).state


# Two merges of one LoRA.


def test_merges_that_round_differently_need_a_tolerance(forms: dict[str, Forms]) -> None:
    """A scale of 3, once applied to the product and once kept in lora_B: last bits differ, and no more."""
    of = forms["pi05_lora"]
    verdict = verify(of, of["merged"], of["remerged"])
    assert not verdict.holds
    named = {problem.cause.split(": ")[0] for problem in verdict.problems}
    assert named and named <= golden.merged_names(of.golden.leaves)
    assert "--rtol 1e-6" in verdict.problems[0].fix
    assert max(check.relative for check in verdict.checks) < TOLERANCE
    assert verify(of, of["merged"], of["remerged"], rtol=1e-6).holds


def test_rtol_tightens_and_loosens(forms: dict[str, Forms]) -> None:
    of = forms["pi0_lora"]
    tight = verify(of, of["orbax"], of["merged"], rtol=1e-8)
    assert {problem.cause.split(": ")[0] for problem in tight.problems} <= golden.merged_names(
        of.golden.leaves
    )
    assert len(tight.problems) > 30
    wrong = prove(of["orbax"].path, of["merged"].path, lora_alpha={"paligemma": 8.0, "expert": 8.0})
    assert not wrong.holds
    loose = prove(of["orbax"].path, of["merged"].path, lora_alpha={"paligemma": 8.0, "expert": 8.0}, rtol=0.9)
    assert loose.holds and {check.allowed for check in loose.checks if check.kind == "runtime"} == {0.9}


# What it takes and what it says.


def test_numbers_do_not_change_from_run_to_run(forms: dict[str, Forms]) -> None:
    of = forms["pi0_lora"]
    first, again, other = (verify(of, of["orbax"], of["merged"], seed=seed).as_json() for seed in (0, 0, 1))
    assert first == again
    assert first["checks"] != other["checks"] and other["holds"]


def test_base_alone_is_another_policy(forms: dict[str, Forms]) -> None:
    """LoRA left out, openpi's own bug (#958): every module it trained is named, the worst first."""
    of = forms["pi0_lora"]
    verdict = verify(of, of["orbax"], of["base"])
    assert {problem.cause.split(": ")[0] for problem in verdict.problems} == golden.merged_names(
        of.golden.leaves
    )
    worst = max(verdict.checks, key=lambda check: check.relative)
    assert worst.relative > 0.1 and verdict.problems[0].cause.startswith(worst.name)


def test_alphas_come_from_the_record_and_are_said(forms: dict[str, Forms]) -> None:
    of = forms["pi0_lora"]
    verdict = prove(of["orbax"].path, of["merged"].path)
    assert verdict.holds
    assert verdict.scales == (
        "paligemma: rank 4, alpha 8 (from bridge.json), alpha/rank = 2",
        "expert: rank 8, alpha 4 (from bridge.json), alpha/rank = 0.5",
    )
    given = verify(of, of["orbax"], of["merged"])
    assert [scale.replace("from bridge.json", "given") for scale in verdict.scales] == list(given.scales)


def bridge_verify(*arguments: object) -> Result:
    run = CliRunner().invoke(cli, ["verify", *map(str, arguments)])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run


def test_an_output_is_checked_against_its_own_record(forms: dict[str, Forms], tmp_path: Path) -> None:
    merged = forms["pi0_base"]["merged"].path
    assert "matches its bridge.json" in (run := bridge_verify(merged)).stdout and run.exit_code == 0
    bare = checkpoints.save({"x": golden.golden("pi0_base").leaves["action_in_proj/bias"]}, tmp_path / "100")
    run = bridge_verify(bare)
    assert run.exit_code == 1 and "has no bridge.json to check" in run.stdout


def test_what_the_terminal_says(forms: dict[str, Forms]) -> None:
    of = forms["pi0_lora"]
    run = bridge_verify(of["orbax"].path, of["merged"].path)
    assert run.exit_code == 0
    for said in (
        "106 weights of pi0: 42 run by both runtimes, 64 compared after the cast; none unchecked",
        "lora scale   expert: rank 8, alpha 4 (from bridge.json), alpha/rank = 0.5",
        "lm_head.weight: the action expert predicts no tokens",
        "in bfloat16",
        "file         verified: ",
        "the same policy",
    ):
        assert said in run.stdout
    run = bridge_verify("--lora-alpha", 8, of["orbax"].path, of["merged"].path)
    assert run.exit_code == 1
    lines = run.stdout.splitlines()
    assert lines[-1] == "not the same policy"
    failing = [line for line in lines if line.startswith("fails")]
    assert "gemma_expert.model.layers" in failing[0] and "o_proj" in failing[0]
    assert len(failing) == 12 and "and 0 more" not in run.stdout
    assert any("--lora-alpha" in line for line in lines if line.startswith("fix"))


def test_json_has_every_check(forms: dict[str, Forms], tmp_path: Path) -> None:
    of, report = forms["pi0_base"], tmp_path / "report.html"
    run = bridge_verify("--json", "--report", report, of["orbax"].path, of["merged"].path)
    said = json.loads(run.stdout)
    assert said["holds"] is True and said["counts"] == {"equal": 64, "runtime": 42}
    assert len(said["checks"]) == 106 and all(check["holds"] for check in said["checks"])
    assert "The same policy" in report.read_text()


# Refusals.


def test_an_adapter_needs_its_base(forms: dict[str, Forms]) -> None:
    of = forms["pi0_lora"]
    with pytest.raises(bridge.Refusal, match="is an adapter and needs its base") as refused:
        prove(of["orbax"].path, of["adapter"].path)
    assert "--base" in refused.value.problems[0].fix


def test_different_models_and_dimensions_are_refused(forms: dict[str, Forms], tmp_path: Path) -> None:
    pi0, pi05 = forms["pi0_base"]["orbax"].path, forms["pi05_lora"]["base"].path
    with pytest.raises(bridge.Refusal, match=r"is pi0 but .* is pi05"):
        prove(pi0, pi05)
    other = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "100", quick=True)
    with pytest.raises(bridge.Refusal, match=r"paligemma\.width is 64 in .* but 13 in"):
        prove(pi0, other)


def test_unknown_alpha_is_refused(forms: dict[str, Forms]) -> None:
    of = forms["pi0_lora"]
    with pytest.raises(bridge.Refusal, match="unknown alpha") as refused:
        prove(of["orbax"].path, of["base"].path)
    assert "--lora-alpha" in refused.value.problems[0].fix
