"""Which modules a config gives LoRA, against PEFT itself; and factors of others, which are refused."""

import json
import random
import shutil
import string
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import bridge
from bridge.checkpoint.checkpoint import Checkpoint
from bridge.checkpoint.open import adapter_of, open_checkpoint
from bridge.errors import CheckpointRefused
from bridge.peft.config import AdapterConfig, read_config
from bridge.rules.names import grouped
from tests.kit import checkpoints, golden
from tests.kit.peft import CONFIG, WEIGHTS, load_adapter, lora_modules, tree_of

LANGUAGE = f"{golden.PALIGEMMA}.model.language_model"
SIGLIP = f"{golden.PALIGEMMA}.model.vision_tower.vision_model.encoder"
SEVEN = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
#: Every linear layer of a pi0 of twelve layers, so that some numbers have two digits.
PATHS = (
    *(f"{stack}.layers.{i}.{name}" for stack in (LANGUAGE, f"{golden.EXPERT}.model") for i in range(12)
      for name in SEVEN),
    *(f"{SIGLIP}.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in ("q", "k", "v", "out")),
    *(f"{SIGLIP}.layers.{i}.mlp.fc{n}" for i in range(3) for n in (1, 2)),
    f"{golden.PALIGEMMA}.model.multi_modal_projector.linear",
    f"{golden.PALIGEMMA}.lm_head",
    "action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out",
)  # fmt: skip


def linears(paths: Iterable[str]) -> torch.nn.Module:
    """Linear layers of one weight each, at these paths."""
    root = torch.nn.Module()
    for path in paths:
        parent = root
        *parents, last = path.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, torch.nn.Linear(1, 1))
    return root


def by_peft(config: dict[str, Any]) -> set[str]:
    """The linear layers that PEFT gives LoRA."""
    model = get_peft_model(linears(PATHS), LoraConfig(r=1, **config))  # type: ignore[arg-type]
    return set(lora_modules(model))


def by_bridge(config: dict[str, Any]) -> set[str]:
    read = reading(config)
    return {path for path in PATHS if read.applies(path)}


def reading(config: dict[str, Any]) -> AdapterConfig:
    read, problems = read_config(json.loads(json.dumps({"peft_type": "LORA", **config})), "here")
    assert read is not None, problems
    return read


CONFIGS: dict[str, dict[str, Any]] = {
    "endings": {"target_modules": ["q_proj", "v_proj"]},
    "longer endings": {"target_modules": ["self_attn.q_proj", "mlp.fc1", "layers.1.mlp.up_proj"]},
    "an ending inside a word": {"target_modules": ["proj", "_proj", "q_proj"]},
    "whole paths": {"target_modules": [PATHS[0], PATHS[25], "action_in_proj"]},
    "a path and endings": {"target_modules": [PATHS[3], "gate_proj"]},
    "a pattern": {"target_modules": rf"{LANGUAGE}\.layers\.\d+\..*(q|gate)_proj"},
    "a pattern that must match whole": {"target_modules": r".*\.layers\.1\.mlp\.(up|down)_proj"},
    "dots that are any letter": {"target_modules": rf"{LANGUAGE}.layers.1.+_proj"},
    "anchors": {"target_modules": r"^.*expert\.gemma_expert.*\.k_proj$"},
    "letters of either case": {"target_modules": r"(?i).*\.Q_PROJ"},
    "a look ahead": {"target_modules": r"(?!.*vision_tower).*\.(q|k)_proj"},
    "all linear layers, without some": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "lm_head"]},
    "All-Linear, without SigLIP": {"target_modules": "All-Linear", "exclude_modules": r".*vision_tower.*"},
    "some layers": {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [0, 2, 11]},
    "one layer": {"target_modules": ["q_proj", "fc1"], "layers_to_transform": 1},
    "no layers, which is all": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers of a list": {"target_modules": ["o_proj"], "layers_to_transform": [1, 10], "layers_pattern": "layers"},
    "layers of two lists": {
        "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]
    },
    "layers of a pattern": {
        "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": r"language_model\.\w+"
    },
    "layers by a path of their own": {"target_modules": [PATHS[7], "k_proj"], "layers_to_transform": [5]},
    "layers, and a module outside any": {"target_modules": ["q_proj", "state_proj"], "layers_to_transform": [0]},
    "endings excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "a path excluded": {"target_modules": ["q_proj"], "exclude_modules": [PATHS[0]]},
    "a pattern excluded": {"target_modules": ["q_proj"], "exclude_modules": r".*\.layers\.\d\..*"},
    "an ending of a pattern, which excludes nothing": {"target_modules": ["q_proj"], "exclude_modules": r"q_proj"},
    "nothing excluded": {"target_modules": ["up_proj"], "exclude_modules": []},
    "modules saved whole": {"target_modules": ["linear", "q_proj"], "modules_to_save": ["multi_modal_projector"]},
    "parts of names saved": {"target_modules": ["fc1", "q_proj"], "modules_to_save": ["tate_proj", "layers.1.mlp.fc1"]},
    "a name saved with a dot for any letter": {
        "target_modules": ["action_in_proj", "q_proj"], "modules_to_save": ["action.in.proj", "state_proj"]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_bridge_reads_targets_as_peft_does(name: str) -> None:
    expected = by_peft(CONFIGS[name])
    assert by_bridge(CONFIGS[name]) == expected
    assert 0 < len(expected) < len(PATHS)


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_any_names_are_read_as_peft_does() -> None:
    """Names of every length, cut from the paths at any place."""
    chance = random.Random(0)
    for _ in range(40):
        names = []
        for path in chance.sample(PATHS, 4):
            start = chance.choice([0, *(i + 1 for i, letter in enumerate(path) if letter in "._")])
            names.append(path[start:])
        config: dict[str, Any] = {"target_modules": [*names, "o_proj"]}
        if chance.random() < 0.5:
            config["exclude_modules"] = [path[-chance.randrange(6, 40) :] for path in chance.sample(PATHS, 3)]
        if chance.random() < 0.3:
            config["layers_to_transform"] = chance.sample(range(12), 3)
        assert by_bridge(config) == by_peft(config), config


#: What PEFT refuses to load.
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "layers beside a pattern": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
    "a list's name beside a pattern": ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "PEFT rejects"),
    "a list's name without layers": ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "without layers"),
    "no targets": ({}, "target_modules is missing"),
    "targets that are null": ({"target_modules": None}, "target_modules is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_peft_refuses_is_refused(name: str) -> None:
    config, says = IMPOSSIBLE[name]
    with pytest.raises(ValueError):
        by_peft(config)
    read, problems = read_config({"peft_type": "LORA", **config}, "here")
    assert read is None
    assert [problem for problem in problems if says in problem.cause]


#: What PEFT takes, or fails on in other ways, and bridge does not read.
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "targets that are numbers": ({"target_modules": [1, 2]}, "target_modules is neither"),
    "targets that are an object": ({"target_modules": {"q_proj": 1}}, "target_modules is neither"),
    "targets that are true": ({"target_modules": True}, "target_modules is neither"),
    "an invalid pattern": ({"target_modules": "(q_proj"}, "target_modules has a pattern that is not a valid regular"),
    "a pattern too long": ({"target_modules": "q" * 20000}, "has 20000 characters"),
    "exclusions that are numbers": ({"target_modules": ["q_proj"], "exclude_modules": [1]}, "exclude_modules is"),
    "an invalid exclusion": ({"target_modules": ["q_proj"], "exclude_modules": "["}, "exclude_modules has"),
    "layers that are words": ({"target_modules": ["q_proj"], "layers_to_transform": ["0"]}, "layers_to_transform is"),
    "a layer that is true": ({"target_modules": ["q_proj"], "layers_to_transform": True}, "layers_to_transform is"),
    "lists that are numbers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": 3}, "layers_pattern is"
    ),
    "an invalid list": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(" }, "layers_pattern has"
    ),
    "a pattern to save": ({"target_modules": ["q_proj"], "modules_to_save": ["(a|b)"]}, "modules_to_save lists"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_fields_are_refused(name: str) -> None:
    config, says = ODD[name]
    read, problems = read_config({"peft_type": "LORA", **config}, "here")
    assert read is None
    for problem in problems:
        assert problem.cause.startswith("here: ") and "\n" not in problem.cause and len(problem.cause) < 700
    assert [problem for problem in problems if says in problem.cause], problems


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"paligemma_with_expert(\w|\w\w|\.)+\d\d\d"},
        {"target_modules": ["q_proj"], "exclude_modules": r"paligemma_with_expert(\w|\w\w|\.)+\d\d\d"},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": r"paligemma_with_expert(\w|\w\w|\.)+\d\d\d",
        },
    ],
    ids=["target_modules", "exclude_modules", "layers_pattern"],
)
@pytest.mark.slow
def test_slow_patterns_are_bounded(fields: dict[str, Any]) -> None:
    read = reading(fields)
    with pytest.raises(TimeoutError):
        for path in PATHS:
            read.applies(path)


def test_a_thousand_saved_names_are_read_in_time() -> None:
    """As many as an adapter has that carries a vision tower whole."""
    chance = random.Random(0)
    names = ["".join(chance.choices(string.ascii_lowercase, k=70)) for _ in range(1000)]
    read = reading({"target_modules": ["q_proj"], "modules_to_save": [*names, "gemma_expert"]})
    expected = {path for path in PATHS if path.endswith(".q_proj") and "gemma_expert" not in path.split(".")}
    assert {path for path in PATHS if read.applies(path)} == expected


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of both experts and its base, as Orbax and in PyTorch."""
    home = tmp_path_factory.mktemp("targets")
    tree = checkpoints.pi0_tree(lora={"paligemma": 5, "expert": 5}, layers=2)
    source = checkpoints.save(tree, home / "1", quick=True)
    bridge.convert(source, home / "adapter", to="peft-adapter", lora_alpha=5.0)
    bridge.convert(source, home / "base", to="torch-base", dtype="float32")
    return home


LINEARS = frozenset(PATHS) - {f"{golden.PALIGEMMA}.lm_head"}


def random_config(shape: int, chance: random.Random) -> dict[str, Any]:
    """A pattern, all linear layers, names of some layers, or names alone; with exclusions and saved modules."""
    kinds = [chance.choice(SEVEN), "fc1", "out_proj", "state_proj", PATHS[chance.randrange(len(PATHS))]]
    names = chance.sample(kinds, chance.randrange(1, 4))
    if shape == 0:
        stack = chance.choice(["language_model", "gemma_expert", "vision_model", ""])
        return {"target_modules": rf".*{stack}.*\.\d*{chance.randrange(3)}\..*({'|'.join(SEVEN)})"}
    if shape == 1:
        return {
            "target_modules": "all-linear",
            "exclude_modules": rf".*({'|'.join(names).replace('.', '[.]')})",
        }
    config: dict[str, Any] = {"target_modules": names}
    if shape == 2:
        config["layers_to_transform"] = chance.sample(range(12), 4)
        config["target_modules"] = [chance.choice(SEVEN)]
    if chance.random() < 0.5:
        config["modules_to_save"] = ["action_in_proj"]
    return config


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A base that has exactly the linear layers of PATHS."""
    tree = checkpoints.pi0_tree(lora={}, layers=12, image_layers=3)
    return open_checkpoint(checkpoints.save(tree, tmp_path_factory.mktemp("deep") / "1", quick=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_any_module_that_peft_selected_must_be_there(deep: Checkpoint, seed: int, tmp_path: Path) -> None:
    """PEFT saves an adapter of a random config, and one module is taken out of the file."""
    chance = random.Random(seed)
    model = get_peft_model(linears(PATHS), LoraConfig(r=1, **random_config(seed % 4, chance)))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=False)

    def lost(adapter: Path) -> set[str]:
        problems = adapter_of(deep, open_checkpoint(adapter)).problems
        assert all("adapter_config.json gives LoRA to " in problem.cause for problem in problems), problems
        return {problem.cause.split("gives LoRA to ")[1].split(", but")[0] for problem in problems}

    assert lost(tmp_path / "whole") == set()
    selected = sorted(set(lora_modules(model)) & LINEARS)
    state = load_file(tmp_path / "whole" / WEIGHTS)
    for gone in chance.sample(selected, min(2, len(selected) - 1)):
        adapter = shutil.copytree(tmp_path / "whole", tmp_path / gone)
        save_file(
            {name: value for name, value in state.items() if f".{gone}." not in name}, adapter / WEIGHTS
        )
        assert lost(adapter) == {gone}


EXPERT_ONLY = rf"{golden.EXPERT}\.model\.layers\.\d+\..*(q|k|v|o|gate|up|down)_proj"

#: Changes of the config -> the modules that PEFT then runs without their factors, as bridge names them.
NARROWED: dict[str, tuple[dict[str, Any], str]] = {
    "one expert": ({"target_modules": EXPERT_ONLY}, f"{LANGUAGE}.layers.{{0..1}}.self_attn.q_proj has factors"),
    "some layers": (
        {"target_modules": [name.rpartition(".")[2] for name in SEVEN], "layers_to_transform": [1]},
        f"{golden.EXPERT}.model.layers.0.mlp.up_proj has factors",
    ),
    "some excluded": (
        {"exclude_modules": rf"{LANGUAGE}\.layers\.1\.mlp\..*"}, f"{LANGUAGE}.layers.1.mlp.down_proj has factors"
    ),
    "one name missed": (
        {"target_modules": [name.rpartition(".")[2] for name in SEVEN if "v_proj" not in name]},
        f"{LANGUAGE}.layers.{{0..1}}.self_attn.v_proj has factors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NARROWED)
@pytest.mark.parametrize("to", ["torch-merged", "orbax"])
def test_factors_that_peft_would_ignore_are_refused(home: Path, name: str, to: str, tmp_path: Path) -> None:
    """PEFT loads such an adapter, gives the modules no LoRA, and says no more than a warning."""
    fields, says = NARROWED[name]
    adapter = shutil.copytree(home / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **fields}))
    before = golden.files(tmp_path)
    with pytest.raises(CheckpointRefused) as refused:
        bridge.convert(adapter, tmp_path / "out", to=to, base=home / "base")
    hits = [problem for problem in refused.value.problems if says in problem.cause]
    assert hits and all("target_modules" in problem.fix for problem in hits), refused.value
    assert golden.files(tmp_path) == before

    if to == "orbax":
        return
    base = golden.read(home / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        applied = lora_modules(PeftModel.from_pretrained(tree_of(base), adapter)).keys()
    ignored = lora_modules(load_adapter(base, home / "adapter")).keys() - applied
    assert ignored
    said = [problem.cause for problem in refused.value.problems if "has factors" in problem.cause]
    assert len(said) == len(grouped(ignored))
    for family in grouped(ignored):
        assert sum(f": {family} has factors" in cause for cause in said) == 1
