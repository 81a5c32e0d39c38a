"""Which model an adapter is of, where its base lies, and what of it is missing; files are made by hand."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bridge
from bridge.errors import Refusal
from tests.kit import checkpoints, golden

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
LANGUAGE = f"{golden.PALIGEMMA}.model.language_model"
EXPERT = f"{golden.EXPERT}.model"
LAYERS, RANK = 3, 5


def attention(stack: str) -> list[str]:
    return [f"{stack}.layers.{i}.self_attn.{name}_proj" for i in range(LAYERS) for name in "qv"]


def size(module: str) -> tuple[int, int]:
    """Rows and columns of a weight of the synthetic model."""
    dims = checkpoints.DIMS
    width = dims["expert_width" if golden.EXPERT in module else "width"]
    rows = dims["heads"] * dims["head_dim"] if "q_proj" in module else dims["head_dim"]
    return (rows, width) if "proj" in module else (width, dims["action_dim"])


def write(directory: Path, modules: Iterable[str], prefix: str = "", **config: Any) -> Path:
    """An adapter as PEFT saves it, of these modules behind a layout's prefix."""
    directory.mkdir(parents=True)
    chance = np.random.default_rng(0)
    tensors, names = {}, [prefix + module for module in modules]
    for name in names:
        rows, columns = size(name)
        for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            values = chance.standard_normal(shape).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = values
    save_file(tensors, directory / FILE, {"format": "pt"})
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": names, **config}
    (directory / CONFIG).write_text(json.dumps(described))
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of both models, by name."""
    home = tmp_path_factory.mktemp("bases")
    for model in ("pi0", "pi05"):
        tree = checkpoints.pi0_tree(model=model, lora={}, layers=LAYERS)
        checkpoints.save(tree, home / model, quick=True)
    return home


def refused(adapter: Path, says: str, **options: Any) -> None:
    """Refused by conversion, verification and comparison alike."""
    before = golden.files(adapter)
    for verb in (
        lambda: bridge.convert(adapter, adapter.parent / "out", to="torch-merged", **options),
        lambda: bridge.diff(adapter, adapter, **options),
        lambda: bridge.verify(adapter, adapter, **options),
    ):
        with pytest.raises(Refusal) as caught:
            verb()
        problems = caught.value.problems
        assert [problem for problem in problems if says in problem.cause and problem.fix], problems
        assert not [problem for problem in problems if "\n" in problem.cause + problem.fix]
    assert golden.files(adapter) == before and not (adapter.parent / "out").exists()


# Which model.


def test_names_that_two_models_have_decide_nothing(home: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", attention(EXPERT))
    described = bridge.describe(adapter)
    assert described.model == "pi0 or pi05" and not described.problems
    refused(adapter, "base")
    for model in ("pi0", "pi05"):
        plan = bridge.plan(adapter, None, to="torch-merged", base=home / model)
        assert plan.inputs.model.name == model


def test_a_language_model_alone_may_be_pi0_fast(tmp_path: Path) -> None:
    """LeRobot names the PaliGemma of all three alike."""
    modules = [module.removeprefix(f"{golden.PALIGEMMA}.") for module in attention(LANGUAGE)]
    adapter = write(tmp_path / "a", modules, "model.paligemma_with_expert.paligemma.")
    assert bridge.describe(adapter).model == "pi0 or pi05 or pi0_fast"
    for kind in ("pi0", "pi05", "pi0_fast"):
        (adapter / "config.json").write_text(json.dumps({"type": kind, "use_peft": True}))
        assert bridge.describe(adapter).model == kind
    (adapter / "config.json").write_text(json.dumps({"type": "smolvla"}))
    assert bridge.describe(adapter).model == "pi0 or pi05 or pi0_fast"


@pytest.mark.parametrize(("own", "model"), [("time_mlp_in", "pi05"), ("state_proj", "pi0")])
def test_a_name_that_one_model_has_decides(home: Path, own: str, model: str, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", [*attention(EXPERT), own])
    assert bridge.describe(adapter).model == model
    other = "pi0" if model == "pi05" else "pi05"
    says = f"is an adapter of {model} ({other} has no {own}.weight)"
    for options in ({}, {"base_differs": True}):
        refused(adapter, says, base=home / other, **options)


def test_a_config_beside_the_adapter_decides(home: Path, tmp_path: Path) -> None:
    """No base of another model, whatever the flag: neither names nor shapes would show it."""
    adapter = write(tmp_path / "a", attention(EXPERT))
    (adapter / "config.json").write_text('{"type": "pi05"}')
    assert bridge.describe(adapter).model == "pi05"
    for options in ({}, {"base_differs": True}):
        refused(adapter, "is an adapter of pi05 (config.json says so)", base=home / "pi0", **options)
    assert bridge.plan(adapter, None, to="torch-merged", base=home / "pi05").inputs.model.name == "pi05"


def test_a_config_of_another_model_than_the_names(home: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", [*attention(EXPERT), "state_proj"])
    (adapter / "config.json").write_text('{"type": "pi05"}')
    refused(adapter, "config.json says pi05, but the modules are those of pi0", base=home / "pi0")


# Where its base lies.


def test_base_in_the_directory_is_used_and_named(home: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", attention(EXPERT), base_model_name_or_path=str(home / "pi05"))
    shutil.copytree(home / "pi0", adapter / "base")
    plan = bridge.plan(adapter, None, to="torch-merged")
    assert plan.inputs.model.name == "pi0"
    assert f"its base is {adapter}/base, base/ in the adapter's directory" in plan.notes
    described = bridge.describe(adapter)
    assert described.model == "pi0" and described.base.startswith(f"{adapter}/base, ")
    assert not bridge.diff(adapter, adapter).changed
    assert bridge.verify(adapter, adapter).notes[0].endswith("base/ in the adapter's directory")
    # what is given wins
    given = bridge.plan(adapter, None, to="torch-merged", base=home / "pi05")
    assert given.inputs.model.name == "pi05" and not [note for note in given.notes if "its base" in note]


@pytest.mark.parametrize("name", ["absolute", "../pi0", "./../pi0", "link"])
def test_a_local_name_is_followed(home: Path, name: str, tmp_path: Path) -> None:
    """A relative one from the adapter's folder, wherever bridge runs."""
    shutil.copytree(home / "pi0", tmp_path / "pi0")
    (tmp_path / "a").parent.mkdir(exist_ok=True)
    path = str(tmp_path / "pi0") if name == "absolute" else name
    adapter = write(tmp_path / "a", attention(EXPERT), base_model_name_or_path=path)
    if name == "link":
        (adapter / "link").symlink_to(tmp_path / "pi0")
    plan = bridge.plan(adapter, None, to="orbax", rank=RANK, lora_alpha=3.0)
    assert plan.inputs.base is not None and plan.inputs.base.source.root.local is not None
    assert plan.inputs.base.source.root.local.resolve() == tmp_path / "pi0"
    assert any("base_model_name_or_path in adapter_config.json" in note for note in plan.notes)


def test_a_name_from_the_working_directory_is_followed_as_peft_does(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write(tmp_path / "a", attention(EXPERT), base_model_name_or_path="pi05")
    assert bridge.describe(adapter).base == "pi05, which is not here"
    monkeypatch.chdir(home)
    assert bridge.describe(adapter).model == "pi05"
    # the adapter's own folder comes first
    shutil.copytree(home / "pi0", adapter / "pi05")
    assert bridge.describe(adapter).model == "pi0"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lerobot/pi0_base", "its base is lerobot/pi0_base, on the hub"),
        ("/nowhere/pi0", "its base is /nowhere/pi0, which is not here"),
        ("pi0_base", "its base is pi0_base, which is not here"),
        ("a\x00b", r"its base is a\x00b, which is not here"),
        ("x" * 5000, "which is not here"),
        (".", "its base is ., which is not here"),
        ("", "base"),
        (None, "base"),
        (7, "base"),
    ],
)
def test_a_base_that_is_elsewhere_is_named(name: object, says: str, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", attention(EXPERT), base_model_name_or_path=name)
    refused(adapter, says)
    assert "base" in bridge.describe(adapter).as_json()


def test_a_base_that_cannot_be_opened_is_named_with_its_origin(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    adapter = write(tmp_path / "a", attention(EXPERT), base_model_name_or_path="../b")
    refused(adapter, "is the base, base_model_name_or_path in")
    assert "cannot be opened" in bridge.describe(adapter).base


# What is missing.


def lose(adapter: Path, wanted: str) -> None:
    tensors = load_file(adapter / FILE)
    save_file({name: value for name, value in tensors.items() if wanted not in name}, adapter / FILE)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], rf"{golden.EXPERT}\..*(q|v)_proj", "listed"])
def test_factors_of_a_layer_that_are_gone(home: Path, targets: Any, tmp_path: Path) -> None:
    modules = attention(EXPERT)
    fields: dict[str, Any] = {"target_modules": targets}
    if targets == ["q_proj", "v_proj"]:
        fields["exclude_modules"] = r".*(vision_tower|language_model).*"
    if targets == "listed":
        fields = {}
    adapter = write(tmp_path / "a", modules, **fields)
    bridge.plan(adapter, None, to="torch-merged", base=home / "pi0")
    lose(adapter, "layers.1.")
    names = [f"{EXPERT}.layers.1.self_attn.{name}_proj" for name in "qv"]
    for name in names:
        refused(adapter, f"gives LoRA to {name}, but {FILE} has no factors of it", base=home / "pi0")


def test_factors_of_every_layer_are_grouped(home: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", attention(EXPERT))
    lose(adapter, "v_proj")
    says = f"gives LoRA to {EXPERT}.layers.{{0..2}}.self_attn.v_proj, but"
    refused(adapter, says, base=home / "pi0")
    # without a base, the layers are those that are numbered
    (adapter / "config.json").write_text('{"type": "pi0"}')
    assert [problem for problem in bridge.describe(adapter).problems if says in problem]


def test_layers_to_transform_select_what_must_be_there(home: Path, tmp_path: Path) -> None:
    modules = [module for module in attention(EXPERT) if ".1." not in module]
    fields = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*(vision|language).*"}
    whole = write(tmp_path / "a", modules, layers_to_transform=[0, 2], **fields)
    bridge.plan(whole, None, to="torch-merged", base=home / "pi0")
    partial = write(tmp_path / "b", modules, layers_to_transform=[0, 1, 2], **fields)
    refused(partial, f"gives LoRA to {EXPERT}.layers.1.self_attn.q_proj", base=home / "pi0")


def test_modules_to_save_that_are_gone(home: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", attention(EXPERT), modules_to_save=["state_proj", "action_out_proj"])
    tensors, dims = load_file(adapter / FILE), checkpoints.DIMS
    width, action = dims["expert_width"], dims["action_dim"]
    tensors["base_model.model.state_proj.weight"] = np.ones((width, action), np.float32)
    tensors["base_model.model.state_proj.bias"] = np.ones(width, np.float32)
    tensors["base_model.model.action_out_proj.weight"] = np.ones((action, width), np.float32)
    tensors["base_model.model.action_out_proj.bias"] = np.ones(action, np.float32)
    save_file(tensors, adapter / FILE)
    bridge.plan(adapter, None, to="torch-merged", base=home / "pi0")
    lose(adapter, "state_proj.bias")
    refused(adapter, "modules_to_save names state_proj.bias", base=home / "pi0")
    lose(adapter, "state_proj")
    refused(adapter, "modules_to_save names state_proj.weight", base=home / "pi0")


def test_a_saved_module_that_no_model_has(home: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", attention(EXPERT), modules_to_save=["value_head"])
    refused(adapter, "modules_to_save names value_head", base=home / "pi0")


def test_the_record_of_a_base_lists_no_factors(home: Path, tmp_path: Path) -> None:
    """A trainer saved base and adapter as one model over what bridge had written."""
    bridge.convert(home / "pi0", tmp_path / "a", to="torch-merged")
    module, weights = attention(EXPERT)[0], load_file(tmp_path / "a" / "model.safetensors")
    rows, columns = size(module)
    weights[f"{module}.lora_A.weight"] = np.ones((RANK, columns), np.float32)
    weights[f"{module}.lora_B.weight"] = np.ones((rows, RANK), np.float32)
    weights[f"{module}.base_layer.weight"] = weights.pop(f"{module}.weight")
    save_file(weights, tmp_path / "a" / "model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": [module]}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    described = bridge.describe(tmp_path / "a")
    assert described.state == "peft-adapter[lora]" and described.base == "saved with it, as one model"
    assert not [problem for problem in described.problems if "bridge.json lists" in problem]


def test_tensors_that_the_record_lists(home: Path, tmp_path: Path) -> None:
    """Config and file agree, and the record beside them knows more."""
    adapter = write(tmp_path / "a", attention(EXPERT))
    record = {"model": "pi0", "tensors": {name: {} for name in load_file(adapter / FILE)}}
    (adapter / "bridge.json").write_text(json.dumps(record))
    bridge.plan(adapter, None, to="torch-merged", base=home / "pi0")
    lose(adapter, "layers.2.")
    config = json.loads((adapter / CONFIG).read_text())
    config["target_modules"] = [name for name in config["target_modules"] if "layers.2." not in name]
    (adapter / CONFIG).write_text(json.dumps(config))
    name = f"base_model.model.{EXPERT}.layers.2.self_attn.q_proj.lora_A.weight"
    refused(adapter, f"bridge.json lists {name}, which is missing", base=home / "pi0")
