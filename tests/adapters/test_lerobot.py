"""What stands beside the weights in LeRobot's directory: its config, and openpi's norm stats in its form."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load

import bridge
from bridge.adapters import lerobot, policy_facts
from bridge.adapters.openpi import FAMILY
from tests.kit.checkpoints import pi0_tree, save

PRE, POST = "policy_preprocessor", "policy_postprocessor"
STATE_FILES = {
    "pi0": (f"{PRE}_step_6_normalizer_processor.safetensors", f"{POST}_step_0_unnormalizer_processor.safetensors"),
    "pi05": (f"{PRE}_step_3_normalizer_processor.safetensors", f"{POST}_step_0_unnormalizer_processor.safetensors"),
}  # fmt: skip
STATISTICS = ("mean", "std", "q01", "q99")
STATE, ACTION = 8, 7
CAMERAS = [f"observation.images.{name}_rgb" for name in ("base_0", "left_wrist_0", "right_wrist_0")]

#: every field of PI0Config and PI05Config in lerobot 0.6.1 beside `type`; it refuses any other
CONFIG_FIELDS = {
    "n_obs_steps", "input_features", "output_features", "device", "use_amp", "use_peft", "push_to_hub", "repo_id",
    "private", "tags", "license", "pretrained_path", "pretrained_revision", "paligemma_variant",
    "action_expert_variant", "dtype", "chunk_size", "n_action_steps", "max_state_dim", "max_action_dim",
    "num_inference_steps", "time_sampling_beta_alpha", "time_sampling_beta_beta", "time_sampling_scale",
    "time_sampling_offset", "min_period", "max_period", "use_relative_actions", "relative_exclude_joints",
    "action_feature_names", "rtc_config", "image_resolution", "empty_cameras", "tokenizer_max_length",
    "normalization_mapping", "gradient_checkpointing", "compile_model", "compile_mode", "freeze_vision_encoder",
    "train_expert_only", "optimizer_lr", "optimizer_betas", "optimizer_eps", "optimizer_weight_decay",
    "optimizer_grad_clip_norm", "scheduler_warmup_steps", "scheduler_decay_steps", "scheduler_decay_lr",
}  # fmt: skip


def norm_stats() -> dict[str, dict[str, list[float]]]:
    """A robot of 8 states and 7 actions. Dimension 0 never moves, and dimension 1 hardly."""
    rng = np.random.default_rng(0)

    def of(size: int) -> dict[str, list[float]]:
        low = -1 - rng.random(size)
        stats = {"mean": rng.normal(size=size), "std": 0.1 + rng.random(size), "q01": low, "q99": -low}
        stats["std"][0], stats["q99"][0] = 0.0, low[0]
        stats["std"][1], stats["q01"][1], stats["q99"][1] = 1e-3, -5e-4, 5e-4
        return {name: vector.astype(np.float32).tolist() for name, vector in stats.items()}

    return {"state": of(STATE), "actions": of(ACTION)}


def asset(stats: object, asset_id: str = "my_robot") -> dict[str, bytes]:
    return {f"assets/{asset_id}/norm_stats.json": json.dumps({"norm_stats": stats}).encode()}


def facts(model: str, assets: dict[str, bytes], **sizes: int) -> bridge.Facts:
    """Facts of a stock model, but for `sizes` (two underscores for a dot)."""
    found = next(each for each in FAMILY.models if each.name == model)
    layout = found.layout("lerobot")
    assert layout is not None
    changed = {axis.replace("__", "."): size for axis, size in sizes.items()}
    stock = {**lerobot.STOCK, "projections.action": 32, "siglip.token": 256, **changed}
    reading = policy_facts.read(found, assets, {})
    if reading.damaged:
        raise bridge.Refusal(*(damage.problem for damage in reading.damaged))
    known = {fact.kind.key: fact for fact in reading.facts}
    return bridge.Facts(
        model=found,
        sizes=stock,
        known=known | {fact.kind.key: fact for fact in policy_facts.complete(found, stock, known)},
        layout=layout,
        contents="base",
        dtype="bfloat16",
        settings={},
        assets=assets,
    )


def made(model: str, assets: dict[str, bytes], **sizes: int) -> bridge.Companions:
    return lerobot.companions(facts(model, assets, **sizes))


def steps(companions: bridge.Companions, pipeline: str) -> dict[str, dict[str, Any]]:
    """The steps of a pipeline by name, in order."""
    tree = json.loads(companions.files[f"{pipeline}.json"])
    assert tree.keys() == {"name", "steps"} and tree["name"] == pipeline
    return {step["registry_name"]: step for step in tree["steps"]}


def openpi(model: str, stats: dict[str, list[float]], x: np.ndarray, *, inverse: bool) -> np.ndarray:
    """openpi, transforms.py: Normalize and Unnormalize, in float64."""
    s = {name: np.array(vector) for name, vector in stats.items()}
    if model == "pi0":
        return x * (s["std"] + 1e-6) + s["mean"] if inverse else (x - s["mean"]) / (s["std"] + 1e-6)
    width = s["q99"] - s["q01"] + 1e-6
    return (x + 1) / 2 * width + s["q01"] if inverse else (x - s["q01"]) / width * 2 - 1


def normalized(
    step: dict[str, Any], tensors: dict[str, np.ndarray], feature: str, x: np.ndarray, *, inverse: bool
) -> np.ndarray:
    """LeRobot, normalize_processor.py: what its step does, in float32 as there."""
    config = step["config"]
    mode = config["norm_map"][config["features"][feature]["type"]]
    s = {name.removeprefix(f"{feature}."): t for name, t in tensors.items() if name.startswith(f"{feature}.")}
    x, eps = x.astype(np.float32), np.float32(config["eps"])
    if mode == "MEAN_STD":
        return x * s["std"] + s["mean"] if inverse else (x - s["mean"]) / (s["std"] + eps)
    assert mode == "QUANTILES"
    width = s["q99"] - s["q01"]
    width = np.where(width == 0, eps, width)
    return (x + 1) * width / 2 + s["q01"] if inverse else 2 * (x - s["q01"]) / width - 1


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_values_are_openpis(model: str) -> None:
    stats, companions = norm_stats(), made(model, asset(norm_stats()))
    rng = np.random.default_rng(1)
    for pipeline, kind, file in zip((PRE, POST), ("", "un"), STATE_FILES[model], strict=True):
        step, tensors = (
            steps(companions, pipeline)[f"{kind}normalizer_processor"],
            load(companions.files[file]),
        )
        for key, feature in lerobot.FEATURES.items():
            if feature not in step["config"]["features"]:
                continue
            x = rng.normal(size=(50, len(stats[key]["mean"]))).astype(np.float32)
            got = normalized(step, tensors, feature, x, inverse=bool(kind))
            want = openpi(model, stats[key], x.astype(np.float64), inverse=bool(kind))
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_lerobots_own_eps_would_not_do(model: str) -> None:
    """The test above sees the corrections: without them the dimension that never moves is far off."""
    stats, companions = norm_stats(), made(model, asset(norm_stats()))
    step = steps(companions, PRE)["normalizer_processor"]
    step["config"]["eps"] = 1e-8
    x = np.full(STATE, 0.5, np.float32)
    got = normalized(
        step, load(companions.files[STATE_FILES[model][0]]), "observation.state", x, inverse=False
    )
    want = openpi(model, stats["state"], x, inverse=False)
    assert abs(got[0] / want[0]) > 90


def test_steps_of_pi0() -> None:
    pre = steps(made("pi0", asset(norm_stats())), PRE)
    assert list(pre) == [
        "rename_observations_processor",
        "to_batch_processor",
        "pi0_new_line_processor",
        "tokenizer_processor",
        "device_processor",
        "relative_actions_processor",
        "normalizer_processor",
    ]
    assert pre["tokenizer_processor"]["config"]["max_length"] == 48


def test_steps_of_pi05() -> None:
    pre = steps(made("pi05", asset(norm_stats())), PRE)
    assert list(pre) == [
        "rename_observations_processor",
        "to_batch_processor",
        "relative_actions_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
    ]
    assert pre["tokenizer_processor"]["config"]["max_length"] == 200


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_processor_files(model: str) -> None:
    companions = made(model, asset(norm_stats()))
    pre, post = steps(companions, PRE), steps(companions, POST)
    assert set(companions.files) == {"config.json", f"{PRE}.json", f"{POST}.json", *STATE_FILES[model]}
    for step in (*pre.values(), *post.values()):
        stateful = step["registry_name"].endswith("normalizer_processor")
        assert step.keys() == {"registry_name", "config"} | ({"state_file"} if stateful else set())
    assert list(post) == ["unnormalizer_processor", "absolute_actions_processor", "device_processor"]
    assert pre["normalizer_processor"]["state_file"] == STATE_FILES[model][0]
    assert post["unnormalizer_processor"]["state_file"] == STATE_FILES[model][1]

    features = pre["normalizer_processor"]["config"]["features"]
    assert list(features) == [*CAMERAS, "observation.state", "action"]
    assert all(features[camera] == {"type": "VISUAL", "shape": [3, 224, 224]} for camera in CAMERAS)
    assert features["observation.state"] == {"type": "STATE", "shape": [STATE]}
    assert post["unnormalizer_processor"]["config"]["features"] == {
        "action": {"type": "ACTION", "shape": [ACTION]}
    }
    for file in STATE_FILES[model]:
        assert {
            name: (tensor.shape, tensor.dtype) for name, tensor in load(companions.files[file]).items()
        } == {
            f"{feature}.{statistic}": ((size,), np.float32)
            for feature, size in (("observation.state", STATE), ("action", ACTION))
            for statistic in STATISTICS
        }
    assert made(model, asset(norm_stats())) == companions


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_config_of_stock_dimensions(model: str) -> None:
    config = json.loads(made(model, asset(norm_stats())).files["config.json"])
    mode = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}[model]
    assert config.pop("type") == model
    assert config.keys() <= CONFIG_FIELDS
    assert list(config["input_features"]) == [*CAMERAS, "observation.state"]
    assert config["input_features"]["observation.state"] == {"type": "STATE", "shape": [STATE]}
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [ACTION]}}
    assert config["normalization_mapping"] == {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    assert config["image_resolution"] == [224, 224]
    assert (config["chunk_size"], config["n_action_steps"]) == (50, 50)
    assert (config["max_state_dim"], config["max_action_dim"]) == (32, 32)
    assert config["dtype"] == "bfloat16"


def test_config_knows_no_float16() -> None:
    half = dataclasses.replace(facts("pi0", {}), dtype="float16")
    assert json.loads(lerobot.companions(half).files["config.json"])["dtype"] == "float32"


def test_odd_dimensions_have_processors_and_no_config() -> None:
    companions = made("pi0", asset(norm_stats()), expert__width=17)
    assert set(companions.files) == {f"{PRE}.json", f"{POST}.json", *STATE_FILES["pi0"]}
    assert [note for note in companions.notes if "no config.json" in note and "expert.width 17" in note]


def test_without_stats_there_are_no_processors() -> None:
    companions = made("pi0", {"assets/my_robot/readme.txt": b"", "assets/norm_stats.json": b"no asset id"})
    assert set(companions.files) == {"config.json"}
    assert [note for note in companions.notes if f"no {PRE}.json" in note and "there are none" in note]
    config = json.loads(companions.files["config.json"])
    assert (list(config["input_features"]), config["output_features"]) == (CAMERAS, {})


def test_of_several_stats_none_is_chosen() -> None:
    assets = {**asset(norm_stats(), "droid"), **asset(norm_stats(), "physical-intelligence/libero")}
    companions = made("pi0", assets)
    assert set(companions.files) == {"config.json"}
    (note,) = (note for note in companions.notes if f"no {PRE}.json" in note)
    assert "droid, physical-intelligence/libero" in note and "--asset-id" in note


def test_an_asset_id_may_have_a_slash() -> None:
    companions = made("pi05", asset(norm_stats(), "physical-intelligence/libero"))
    assert f"{PRE}.json" in companions.files


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_what_cannot_travel_is_said(model: str) -> None:
    notes = made(model, asset(norm_stats())).notes
    said = ["delta actions", "google/paligemma-3b-pt-224", "discrete_state_input=False"][
        : 2 + (model == "pi05")
    ]
    assert len(notes) == len(said)
    assert all(word in note and "\n" not in note for word, note in zip(said, notes, strict=True))


def test_stats_as_wide_as_the_model_may_be_padded() -> None:
    (note,) = (
        note for note in made("pi0", asset(norm_stats()), projections__action=8).notes if "padded" in note
    )
    assert "of state are as wide as the model, 8" in note


def without(*keys: str) -> Callable[[Any], Any]:
    def change(stats: Any) -> Any:
        node = stats
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
        return stats

    return change


def setting(value: Any) -> Callable[[Any], Any]:
    def change(stats: Any) -> Any:
        stats["actions"]["std"] = stats["actions"]["q99"] = value
        return stats

    return change


@pytest.mark.parametrize("model", ["pi0", "pi05"])
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (without("actions"), "norm_stats.actions of assets/my_robot/norm_stats.json has no list"),
        (setting(None), "norm_stats.actions"),
        (setting([]), "norm_stats.actions"),
        (setting([[1.0] * ACTION]), "norm_stats.actions"),
        (setting(["1.0"] * ACTION), "norm_stats.actions"),
        (setting([float("nan")] * ACTION), "finite"),
        (setting([1e39] * ACTION), "finite"),
        (setting([10**400] * ACTION), "finite"),
        (setting([1.0] * 3), "7 mean and 3 std|7 q01 and 3 q99"),
        (lambda stats: [], "norm_stats.state"),
    ],
)
def test_malformed_stats_are_refused(model: str, change: Callable[[Any], Any], cause: str) -> None:
    with pytest.raises(bridge.Refusal, match=cause) as refused:
        made(model, asset(change(norm_stats())))
    assert all("\n" not in problem.cause and problem.fix for problem in refused.value.problems)


@pytest.mark.parametrize("text", [b"", b"[", b"\xff", b"[" * 100_000])
def test_stats_that_are_no_json_are_refused(text: bytes) -> None:
    with pytest.raises(bridge.Refusal, match="is not JSON" if text else "is empty"):
        made("pi0", {"assets/my_robot/norm_stats.json": text})


def test_all_that_stats_lack_is_said_at_once() -> None:
    with pytest.raises(bridge.Refusal) as refused:
        made("pi0", asset({}))
    assert len(refused.value.problems) == 2


def test_stats_without_quantiles_serve_pi0_alone() -> None:
    stats = {
        key: {**each, "q01": None, "q99": None} for key, each in norm_stats().items()
    }  # as openpi wrote them before it had quantiles
    assert f"{PRE}.json" in made("pi0", asset(stats)).files
    with pytest.raises(bridge.Refusal, match="q01 and q99"):
        made("pi05", asset(stats))


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_a_conversion_writes_them(model: Literal["pi0", "pi05"], tmp_path: Path) -> None:
    source = save(pi0_tree(model=model), tmp_path / "source", quick=True)
    out = tmp_path / "out"
    bridge.convert(source, out, to="torch-merged", layout="lerobot", lora_alpha=8)
    for file in (f"{PRE}.json", f"{POST}.json", *STATE_FILES[model]):
        assert (out / file).is_file()
    assert not (out / "config.json").exists()
    assert (out / "assets/my_robot/norm_stats.json").is_file()
