"""Policy facts through the graph: LeRobot's own policies, openpi's, and everything in between."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bridge
from bridge import Refusal
from tests.kit.policies import (
    ALPHAS,
    BASE,
    OPENPI,
    POST,
    PRE,
    SIZES,
    TRAINED,
    copied,
    edit,
    equal_in_float32,
    norm_stats,
    restate,
    statistics,
    trained,
)


def base_of(name: str) -> dict[str, Any]:
    return {} if name == "full_pi0" else {"base": BASE}


def planned(source: Path, to: str, **options: Any) -> dict[str, bytes]:
    """The files that a conversion writes beside the weights. No weight is read for that."""
    return dict(bridge.plan(source, None, to=to, **options).output.files)


def written(files: dict[str, bytes], home: Path) -> Path:
    for name, data in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return home


def test_an_adapter_alone_goes_to_lerobot_in_its_default_resolution(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    checkpoint = Path(__file__).parents[1] / "data" / "golden" / "pi05_lora" / "checkpoint" / "100"
    bridge.convert(checkpoint, adapter, to="peft-adapter", lora_alpha={"paligemma": 6, "expert": 2})
    (adapter / "bridge.json").unlink()
    steps = json.loads(planned(adapter, "peft-adapter", layout="lerobot")["policy_preprocessor.json"])[
        "steps"
    ]
    features = [step["config"]["features"] for step in steps if "features" in step["config"]]
    # lerobot, policies/pi05/configuration_pi05.py: image_resolution is (224, 224)
    assert features[0]["observation.images.base_0_rgb"]["shape"] == [3, 224, 224]


# LeRobot's own policies.


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("to", ["orbax", "openpi", "transformers", "lerobot"])
def test_statistics_are_those_that_lerobot_used(name: str, to: str, tmp_path: Path) -> None:
    target: dict[str, Any] = (
        {"to": "orbax", "fold": True, **SIZES} if to == "orbax" else {"to": "torch-merged", "layout": to}
    )
    if target.get("fold") and name == "full_pi0":
        del target["fold"]
    out = written(planned(trained(name), **target, **base_of(name)), tmp_path)
    assert equal_in_float32(norm_stats(out), statistics(name))
    # the data set's name, which openpi takes for the asset id by default as well
    assert (out / "assets/tiny/robot/norm_stats.json").is_file()


@pytest.mark.parametrize("name", TRAINED)
def test_config_and_processors_stay_as_they_are(name: str, tmp_path: Path) -> None:
    source = trained(name)
    out = written(planned(source, "torch-merged", layout="lerobot", **base_of(name)), tmp_path)
    for path in source.glob("policy_*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (out, source))
    assert ours == theirs | {"use_peft": False}
    if name == "full_pi0":
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_unknown_fields_and_steps_travel_within_lerobot(tmp_path: Path) -> None:
    source = copied(trained("full_pi0"), tmp_path / "source")
    edit(source / "config.json", lambda tree: tree.update(my_field={"x": 1}))
    edit(
        source / f"{PRE}.json",
        lambda tree: tree["steps"].insert(0, {"registry_name": "my_step", "config": {}}),
    )
    files = planned(source, "torch-merged", layout="lerobot")
    assert json.loads(files["config.json"])["my_field"] == {"x": 1}
    assert json.loads(files[f"{PRE}.json"])["steps"][0]["registry_name"] == "my_step"
    with pytest.raises(
        Refusal, match=r"policy_preprocessor\.json has the step my_step, which openpi does not"
    ) as refused:
        planned(source, "torch-merged", layout="openpi")
    assert "--layout lerobot" in refused.value.problems[0].fix


@pytest.mark.parametrize(
    ("file", "change", "cause"),
    [
        ("config", lambda tree: tree.update(use_relative_actions=True), "config.json has use_relative_actions"),
        ("config", lambda tree: tree.update(max_period=8.0), "max_period 8.0; openpi has 4.0 built in"),
        (PRE, lambda tree: tree["steps"][5]["config"].update(enabled=True), "relative_actions_processor is enabled"),
        (POST, lambda tree: tree["steps"][1]["config"].update(enabled=True), "absolute_actions_processor is enabled"),
        (POST, lambda tree: tree["steps"].append({"class": "me.Clip"}), "postprocessor.json has the step me.Clip"),
        (PRE, lambda tree: tree["steps"][6]["config"]["norm_map"].update(ACTION="MIN_MAX"), "ACTION by MIN_MAX"),
        (PRE, lambda tree: tree["steps"][6]["config"]["norm_map"].update(ACTION="QUANTILES"), "by another method"),
    ],
)  # fmt: skip
def test_what_openpi_does_not_have_is_refused_by_name(
    file: str, change: Callable[[Any], None], cause: str, tmp_path: Path
) -> None:
    source = copied(trained("full_pi0"), tmp_path / "source")
    edit(source / f"{file}.json", change)
    for layout in ("openpi", "transformers"):
        with pytest.raises(Refusal, match=cause):
            bridge.convert(source, tmp_path / "out", to="torch-merged", layout=layout)
    assert not (tmp_path / "out").exists()
    assert (
        planned(source, "torch-merged", layout="lerobot")[f"{file}.json"]
        == (source / f"{file}.json").read_bytes()
    )


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config", lambda tree: tree.update(n_action_steps=5), "executes 5 of 10 actions"),
        ("config", lambda tree: tree.update(empty_cameras=1), "adds 1 empty cameras"),
        ("config", lambda tree: tree.update(num_inference_steps=4), "samples in 4 steps, openpi in 10"),
        (PRE, lambda tree: tree["steps"][0]["config"].update(rename_map={"top": "base"}), "(top to base)"),
    ],
)
def test_what_is_harmless_is_reported(
    file: str, change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    source = copied(trained("full_pi0"), tmp_path / "source")
    edit(source / f"{file}.json", change)
    plans = {
        layout: bridge.plan(source, None, to="torch-merged", layout=layout)
        for layout in ("openpi", "lerobot")
    }
    assert [said in note for note in plans["openpi"].notes].count(True) == 1
    assert not [note for note in plans["lerobot"].notes if said in note]


# The nearest wins.


def test_an_adapters_own_processors_outrank_its_bases() -> None:
    plan = bridge.plan(trained("peft_pi0"), None, to="torch-merged", base=BASE)
    fact = plan.facts["norm_stats"]
    assert fact.origin == f"{PRE}.json"
    assert equal_in_float32(fact.value, statistics("peft_pi0"))
    (note,) = (note for note in plan.notes if note.startswith("norm stats: "))
    assert note.endswith(f"({BASE}/assets/tiny_robot/norm_stats.json)") and "is used, not" in note
    assert "assets/tiny_robot/norm_stats.json" not in plan.output.files
    assert "policy       norm stats: state 8, actions 7 (policy_preprocessor.json)" in str(plan)


def test_an_adapter_without_any_has_its_bases(tmp_path: Path) -> None:
    source = copied(trained("peft_pi0"), tmp_path / "source")
    for path in (*source.glob("policy_*"), source / "train_config.json", source / "config.json"):
        path.unlink()
    plan = bridge.plan(source, None, to="torch-merged", base=BASE, layout="lerobot")
    assert plan.facts["norm_stats"].origin == "assets/tiny_robot/norm_stats.json"
    assert plan.facts["action_horizon"].value == 10
    for path in BASE.glob("policy_*"):
        assert plan.output.files[path.name] == path.read_bytes()
    assert plan.output.files["config.json"] == (BASE / "config.json").read_bytes()
    assert (
        plan.output.files["assets/tiny_robot/norm_stats.json"]
        == (BASE / "assets/tiny_robot/norm_stats.json").read_bytes()
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
STATE_FILE = f"{PRE}_step_6_normalizer_processor.safetensors"


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda path: (path / STATE_FILE).write_bytes(b""), f"{STATE_FILE} is damaged"),
        (lambda path: (path / STATE_FILE).write_bytes((path / STATE_FILE).read_bytes()[:-7]), "is damaged"),
        (lambda path: (path / STATE_FILE).unlink(), "processors are missing"),
        (lambda path: (path / f"{PRE}.json").write_text("{"), "policy_preprocessor.json is not JSON"),
        (lambda path: (path / f"{PRE}.json").write_text("[]"), "is not JSON: it is not an object"),
        (lambda path: restate(path, lambda tensors: tensors.pop("action.std")), "no action.std"),
        (lambda path: restate(path, lambda tensors: tensors["action.std"].fill(np.nan)), "not finite"),
        (lambda path: restate(path, lambda t: t.update({"action.std": np.ones(6, np.float32)})), "7 mean and 6 std"),
        (lambda path: (path / STATE_FILE).write_text(POINTER), "git-lfs pointer"),
    ],
)  # fmt: skip
def test_processors_that_cannot_be_read_are_never_replaced_by_the_bases(
    damage: Callable[[Path], object], cause: str, tmp_path: Path
) -> None:
    source = copied(trained("peft_pi0"), tmp_path / "source")
    damage(source)
    for layout in ("openpi", "lerobot"):
        with pytest.raises(Refusal, match=cause):
            bridge.convert(source, tmp_path / "out", to="torch-merged", base=BASE, layout=layout)
    assert not (tmp_path / "out").exists()


# Origins that disagree.


def test_processors_that_disagree_with_each_other_are_refused(tmp_path: Path) -> None:
    source = copied(trained("full_pi0"), tmp_path / "source")
    (path,) = source.glob(f"{POST}_step_*")
    tensors = load_file(path)
    tensors["action.mean"][2] += 1
    save_file(tensors, path)
    with pytest.raises(
        Refusal,
        match=r"norm stats is actions mean\[2\] .* in policy_preprocessor.json, but .* in policy_post",
    ):
        planned(source, "torch-merged")


def test_assets_that_disagree_with_processors_are_refused(tmp_path: Path) -> None:
    """The base's files, as somebody might copy them into a trained policy."""
    source = copied(trained("full_pi0"), tmp_path / "source")
    shutil.copytree(BASE / "assets", source / "assets")
    with pytest.raises(
        Refusal, match=r"norm stats is .*tiny_robot/norm_stats\.json, but .*policy_preprocessor\.json"
    ) as refused:
        planned(source, "torch-merged")
    assert "--norm-stats" in refused.value.problems[0].fix
    chosen = planned(source, "torch-merged", norm_stats=BASE / "assets/tiny_robot/norm_stats.json")
    assert (
        chosen["assets/tiny_robot/norm_stats.json"]
        == (BASE / "assets/tiny_robot/norm_stats.json").read_bytes()
    )


@pytest.mark.parametrize("statistic", ["std", "q99"])
def test_the_form_of_bridges_own_processors_is_known(statistic: str, tmp_path: Path) -> None:
    """1e-6 on q99, and on the unnormaliser's std, are bridge's own, and no other statistics."""
    out = tmp_path / "out"
    bridge.convert(OPENPI / "pi0/checkpoint/3", out, to="torch-merged", layout="lerobot", lora_alpha=ALPHAS)
    before, after = (
        load_file(next(out.glob(f"{name}_step_*")))[f"action.{statistic}"] for name in (PRE, POST)
    )
    want = norm_stats(out)["actions"][statistic]
    assert np.array_equal(before, np.float32(want + (1e-6 if statistic == "q99" else 0)))
    assert np.array_equal(after, np.float32(want + 1e-6))
    assert bridge.plan(out, None, to="torch-merged").facts["norm_stats"].origin.startswith("assets/")
    (out / "bridge.json").unlink()
    assert not bridge.describe(out).problems


# The action horizon.


@pytest.mark.parametrize("name", ["qv_pi0", "full_pi0"])
def test_horizon_comes_from_the_config(name: str, tmp_path: Path) -> None:
    for to, options in (("torch-merged", {}), ("orbax", SIZES)):
        plan = bridge.plan(trained(name), None, to=to, **base_of(name), **options)
        assert (plan.facts["action_horizon"].value, plan.facts["action_horizon"].origin) == (
            10,
            "config.json",
        )
        assert not [note for note in plan.notes if "does not record the action horizon" in note]


LAYOUTS = ("openpi", "lerobot", "transformers")


@pytest.mark.parametrize("recorded", [True, False], ids=["with-record", "without"])
def test_horizon_survives_every_route(recorded: bool, tmp_path: Path) -> None:
    """LeRobot's 10 into the pytree, every layout and back, in turn; also where somebody drops `bridge.json`."""
    steps = [{"to": "orbax"}, *({"to": "torch-merged", "layout": layout} for layout in LAYOUTS)]
    order = [
        steps[0],
        steps[1],
        steps[2],
        steps[0],
        steps[2],
        steps[3],
        steps[0],
        steps[3],
        steps[1],
        steps[0],
    ]
    source = BASE
    for number, options in enumerate(order):
        out = tmp_path / str(number)
        sizes = SIZES if options["to"] == "orbax" else {}
        bridge.convert(source, out, dtype="keep", **options, **sizes)
        if not recorded:
            (out / "bridge.json").unlink()
        fact = bridge.describe(out).facts["action_horizon"]
        assert (fact["value"], "assumed" in fact) == (10, False), (number, options, fact)
        source = out
    facts = json.loads((source / "policy_facts.json").read_text())
    assert facts["action_horizon"] == 10 and facts["prompt_length"] == 48
    assert norm_stats(source).keys() == {"state", "actions"}
    assert equal_in_float32(norm_stats(source), norm_stats(BASE))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_horizon_of_an_adapter_survives(layout: str, tmp_path: Path) -> None:
    """Its own, in LoRA leaves and out of them, where no config lies beside the adapter."""
    joined, adapter, again = tmp_path / "joined", tmp_path / "adapter", tmp_path / "again"
    bridge.convert(trained("qv_pi0"), joined, to="orbax", base=BASE, **SIZES)
    bridge.convert(joined, adapter, to="peft-adapter", layout=layout, with_base=True)
    bridge.convert(adapter, again, to="orbax", base=adapter / "base", **SIZES)
    for out in (joined, adapter, adapter / "base", again):
        fact = bridge.describe(out).facts["action_horizon"]
        assert (fact["value"], "assumed" in fact) == (10, False), (out, fact)
        assert equal_in_float32(norm_stats(out), statistics("qv_pi0"))


def test_a_horizon_that_is_assumed_stays_assumed(tmp_path: Path) -> None:
    source = OPENPI / "pi05/checkpoint/3"
    bridge.convert(source, tmp_path / "1", to="torch-merged", lora_alpha=ALPHAS)
    fact = bridge.describe(tmp_path / "1").facts["action_horizon"]
    assert (fact["value"], fact["assumed"]) == (50, True)
    plan = bridge.plan(tmp_path / "1", None, to="orbax")
    assert plan.facts["action_horizon"].assumed and "policy_facts.json" not in plan.output.files
    plan = bridge.plan(tmp_path / "1", None, to="orbax", action_horizon=10)
    assert json.loads(plan.output.files["policy_facts.json"]) == {"action_horizon": 10}


def test_verify_compares_the_horizon(tmp_path: Path) -> None:
    source = OPENPI / "pi0/checkpoint/3"
    for horizon in (None, 10, 50):
        bridge.convert(
            source, tmp_path / str(horizon), to="torch-merged", lora_alpha=ALPHAS, action_horizon=horizon
        )
    # a default proves nothing, and disproves nothing
    assert bridge.verify(tmp_path / "10", tmp_path / "None").holds
    verdict = bridge.verify(tmp_path / "10", tmp_path / "50")
    assert verdict.facts == {"norm_stats": True, "norm_method": True, "action_horizon": False}
    (problem,) = verdict.problems
    assert problem.cause == (
        f"the action horizon is 10 in {tmp_path}/10/config.json, but 50 in {tmp_path}/50/config.json"
    )


def test_verify_compares_statistics_wherever_they_are(tmp_path: Path) -> None:
    """Of a policy in LeRobot's files against openpi's assets."""
    shutil.copytree(BASE, tmp_path / "lerobot")
    shutil.rmtree(tmp_path / "lerobot/assets")
    assert bridge.verify(BASE, tmp_path / "lerobot").holds
    restate(tmp_path / "lerobot", lambda tensors: tensors["action.mean"].__iadd__(np.float32(1e-3)))
    verdict = bridge.verify(BASE, tmp_path / "lerobot")
    assert (verdict.holds, verdict.facts["norm_stats"]) == (False, False)
    assert "the norm stats is actions mean[0]" in verdict.problems[0].cause


# Options.


def test_given_statistics_replace_the_sources_everywhere(tmp_path: Path) -> None:
    stats = tmp_path / "mine.json"
    stats.write_bytes((BASE / "assets/tiny_robot/norm_stats.json").read_bytes())
    for name, layout in (("full_pi0", "lerobot"), ("peft_pi0", "lerobot"), ("full_pi0", "openpi")):
        plan = bridge.plan(
            trained(name), None, to="torch-merged", layout=layout, norm_stats=stats, asset_id="a/b", **base_of(name)
        )  # fmt: skip
        out = written(dict(plan.output.files), tmp_path / f"{name}-{layout}")
        assert plan.facts["norm_stats"].origin == "--norm-stats"
        assert equal_in_float32(norm_stats(out), norm_stats(BASE)) and (out / "assets/a/b").is_dir()
        if layout == "lerobot":
            for pipeline, shift in ((PRE, 0), (POST, 1e-6)):
                tensors = load_file(next(out.glob(f"{pipeline}_step_*")))
                want = norm_stats(BASE)["actions"]["std"]
                assert np.array_equal(tensors["action.std"], np.float32(want + shift))
                # what is not the policy's own stays
                assert "frame_index.mean" in tensors
            assert (out / f"{PRE}.json").read_bytes() == (trained(name) / f"{PRE}.json").read_bytes()


def test_a_given_horizon_goes_into_the_config_that_is_kept() -> None:
    files = planned(trained("full_pi0"), "torch-merged", layout="lerobot", action_horizon=7)
    theirs = json.loads((trained("full_pi0") / "config.json").read_text())
    assert json.loads(files["config.json"]) == theirs | {"chunk_size": 7, "n_action_steps": 7}


def test_an_asset_id_is_chosen_and_reported(tmp_path: Path) -> None:
    source = copied(trained("full_pi0"), tmp_path / "source")
    (source / "train_config.json").unlink()
    plan = bridge.plan(source, None, to="torch-merged")
    assert "assets/my_robot/norm_stats.json" in plan.output.files
    assert [note for note in plan.notes if "assets/my_robot" in note and "--asset-id" in note]
    named = bridge.plan(source, None, to="torch-merged", asset_id="droid")
    assert "assets/droid/norm_stats.json" in named.output.files
    assert not [note for note in named.notes if "--asset-id" in note]


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/etc", "a//b", "a/.", "a\nb", "x" * 300])
def test_an_asset_id_is_a_folder_below_assets(name: str) -> None:
    with pytest.raises(Refusal, match="cannot be a folder below assets/"):
        planned(trained("full_pi0"), "torch-merged", asset_id=name)


def test_of_several_assets_one_is_chosen(tmp_path: Path) -> None:
    source = copied(OPENPI / "pi0/checkpoint/3", tmp_path / "source")
    (source / "assets/tiny_robot").rename(source / "assets/one")
    (source / "assets/two").mkdir()
    other = json.loads((source / "assets/one/norm_stats.json").read_text())
    other["norm_stats"]["state"]["mean"][0] = 5.0
    (source / "assets/two/norm_stats.json").write_text(json.dumps(other))
    options: dict[str, Any] = {"layout": "lerobot", "lora_alpha": ALPHAS}
    plan = bridge.plan(source, None, to="torch-merged", **options)
    assert "norm_stats" not in plan.facts and f"{PRE}.json" not in plan.output.files
    plan = bridge.plan(source, None, to="torch-merged", asset_id="two", **options)
    assert plan.facts["norm_stats"].value["state"]["mean"][0] == 5.0
    assert {
        "assets/one/norm_stats.json",
        "assets/two/norm_stats.json",
        f"{PRE}.json",
    } <= plan.output.files.keys()
    with pytest.raises(Refusal, match="assets/ has one, two, and no three"):
        bridge.plan(source, None, to="torch-merged", asset_id="three", **options)


# Damaged norm stats, for every output.


def without_actions(text: str) -> str:
    tree = json.loads(text)
    del tree["norm_stats"]["actions"]
    return json.dumps(tree)


def shortened(text: str) -> str:
    tree = json.loads(text)
    tree["norm_stats"]["actions"]["std"].pop()
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda text: "", "norm_stats.json is empty"),
        (lambda text: "\n", "norm_stats.json is empty"),
        (lambda text: text[:-9], "norm_stats.json is not JSON"),
        (lambda text: "PK\x03\x04", "norm_stats.json is not JSON"),
        (lambda text: "[" * 100_000, "norm_stats.json is not JSON"),
        (lambda text: "{}", r"norm_stats.state of .* has no list of finite numbers mean and std"),
        (lambda text: text.replace("-", "NaN,-", 1), "norm_stats.state of .* no list of finite numbers mean"),
        (lambda text: without_actions(text), "norm_stats.actions of .* has no list of finite numbers mean and std"),
        (lambda text: shortened(text), "norm_stats.actions of .* has 7 mean and 6 std"),
        (lambda text: POINTER, "is a git-lfs pointer"),
    ],
    ids=["empty", "blank", "truncated", "not JSON", "nested", "no stats", "NaN", "no actions", "lengths", "lfs"],
)  # fmt: skip
@pytest.mark.parametrize("to", ["torch-merged", "torch-base", "peft-adapter"])
def test_damaged_norm_stats_are_refused_for_every_output(
    to: str, damage: Callable[[str], str], cause: str, tmp_path: Path
) -> None:
    source = copied(OPENPI / "pi0/checkpoint/3", tmp_path / "source")
    path = source / "assets/tiny_robot/norm_stats.json"
    path.write_text(damage(path.read_text()))
    options = {"lora_alpha": ALPHAS} if to != "torch-base" else {}
    with pytest.raises(Refusal, match=cause) as refused:
        bridge.convert(source, tmp_path / "out", to=to, **options)
    assert all(str(problem.fix) and "\n" not in problem.cause for problem in refused.value.problems)
    assert not (tmp_path / "out").exists()
    assert bridge.describe(source).problems


def test_damaged_norm_stats_are_refused_on_the_way_to_a_pytree(tmp_path: Path) -> None:
    source = copied(BASE, tmp_path / "source")
    (source / "assets/tiny_robot/norm_stats.json").write_text("")
    with pytest.raises(Refusal, match=r"norm_stats\.json is empty"):
        bridge.convert(source, tmp_path / "out", to="orbax", **SIZES)
    assert not (tmp_path / "out").exists()
    stats = BASE / "assets/tiny_robot/norm_stats.json"
    bridge.convert(source, tmp_path / "out", to="orbax", norm_stats=stats, **SIZES)


# openpi's own policies, in LeRobot's processors.


def lerobots(step: dict[str, Any], tensors: dict[str, np.ndarray], feature: str, x: np.ndarray) -> np.ndarray:
    """What LeRobot's (un)normalizer makes of `x` in float32 (lerobot 0.6.1, processor/normalize_processor.py)."""
    inverse = step["registry_name"].startswith("un")
    config = step["config"]
    mode = config["norm_map"][config["features"][feature]["type"]]
    mean, std, low, high = (tensors.get(f"{feature}.{name}") for name in ("mean", "std", "q01", "q99"))
    x, eps = np.float32(x), np.float32(config["eps"])
    if mode == "MEAN_STD":
        return np.asarray(x * std + mean if inverse else (x - mean) / (std + eps))
    assert mode == "QUANTILES" and low is not None and high is not None
    width = np.where(high == low, eps, high - low)
    return np.asarray((x + 1) * width / 2 + low if inverse else 2 * (x - low) / width - 1)


@pytest.mark.parametrize(("model", "mode"), [("pi0", "MEAN_STD"), ("pi05", "QUANTILES")])
def test_openpis_policies_keep_their_arithmetic(model: str, mode: str, tmp_path: Path) -> None:
    """The state that openpi's own `infer` fed its model, and the actions that it returned."""
    source = OPENPI / model / "checkpoint/3"
    out = written(
        planned(source, "torch-merged", layout="lerobot", lora_alpha=ALPHAS, action_horizon=10), tmp_path
    )
    recorded = np.load(OPENPI / model / "infer.npz")
    steps, tensors = {}, {}
    for pipeline in (PRE, POST):
        for step in json.loads((out / f"{pipeline}.json").read_text())["steps"]:
            if "state_file" in step:
                steps[pipeline], tensors[pipeline] = step, load_file(out / step["state_file"])
    assert steps[PRE]["config"]["norm_map"]["ACTION"] == mode
    state = lerobots(steps[PRE], tensors[PRE], "observation.state", recorded["ex/observation/state"])
    np.testing.assert_allclose(state, recorded["state"][: len(state)], rtol=2e-6, atol=2e-6)
    # openpi, transforms.py, Normalize: what the model must have predicted
    stats, actions = norm_stats(source)["actions"], recorded["actions"]
    if mode == "MEAN_STD":
        predicted = (actions - stats["mean"]) / (stats["std"] + 1e-6)
    else:
        predicted = (actions - stats["q01"]) / (stats["q99"] - stats["q01"] + 1e-6) * 2 - 1
    again = lerobots(steps[POST], tensors[POST], "action", predicted)
    np.testing.assert_allclose(again, actions, rtol=2e-6, atol=2e-6)


def test_another_method_is_kept_and_reported(tmp_path: Path) -> None:
    """A policy that LeRobot trained by quantiles, which openpi's pi0 is not normalised by."""
    source = copied(BASE, tmp_path / "source")
    shutil.rmtree(source / "assets")

    def quantiles(tensors: dict[str, np.ndarray]) -> None:
        for feature in ("observation.state", "action"):
            tensors[f"{feature}.q01"] = tensors[f"{feature}.mean"] - 1
            tensors[f"{feature}.q99"] = tensors[f"{feature}.mean"] + 1

    restate(source, quantiles)
    for pipeline in (PRE, POST):
        step = {PRE: 6, POST: 0}[pipeline]
        edit(
            source / f"{pipeline}.json",
            lambda tree, step=step: tree["steps"][step]["config"]["norm_map"].update(
                STATE="QUANTILES", ACTION="QUANTILES"
            ),
        )
    plan = bridge.plan(source, None, to="torch-merged", layout="openpi")
    assert plan.facts["norm_method"].value == "quantiles"
    assert [note for note in plan.notes if "set use_quantile_norm=True in its data config" in note]
    assert json.loads(plan.output.files["policy_facts.json"])["norm_method"] == "quantiles"
    assert not bridge.verify(BASE, source).facts["norm_method"]


# What `inspect` says.


def test_a_description_has_every_fact_with_its_origin() -> None:
    facts = bridge.describe(trained("peft_pi0")).facts
    assert {key: (fact["text"], fact["origin"]) for key, fact in facts.items()} == {
        "norm_stats": ("state 8, actions 7", "policy_preprocessor.json"),
        "norm_method": ("mean and std", "policy_preprocessor.json"),
        "asset_id": ("tiny/robot", "train_config.json"),
        "action_horizon": ("10", "config.json"),
        "state_width": ("8", "config.json"),
        "action_width": ("7", "config.json"),
        "cameras": ("base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb", "config.json"),
        "resolution": ("224x224", "config.json"),
        "tokenizer": ("google/paligemma-3b-pt-224", "policy_preprocessor.json"),
        "prompt_length": ("48", "config.json"),
    }


def test_a_description_looks_at_the_norm_stats(tmp_path: Path) -> None:
    source = copied(trained("full_pi0"), tmp_path / "source")

    def change(tensors: dict[str, np.ndarray]) -> None:
        for each in ("mean", "std", "q01", "q99"):
            tensors[f"action.{each}"] = np.ones(14, np.float32)
        tensors["action.std"][[2, 5]] = 0

    assert bridge.describe(source).remarks == ()
    restate(source, change)
    description = bridge.describe(source)
    assert description.facts["norm_stats"]["text"] == "state 8, actions 14 (constant: 2 5)"
    said = "\n".join(description.remarks)
    assert "actions never moved in dimension 2, 5" in said
    assert "norm stats have 14 actions, but config.json has 7" in said
    assert "norm stats of actions are as wide as the model, 14" in said
