"""Adapters merged into a base: bridge's own, those that PEFT trained, and those that are refused."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import bridge
from bridge.errors import Refusal
from tests.kit import checkpoints, golden
from tests.kit.digest import snapshot
from tests.kit.golden import State
from tests.kit.peft import (
    CONFIG,
    GEMMAS,
    PREFIX,
    WEIGHTS,
    A,
    B,
    load_adapter,
    merged_by_peft,
    relative,
    train,
    tree_of,
)
from tests.kit.record import Record

ALPHA = {"paligemma": 8.0, "expert": 4.5}
LAYER = f"{PREFIX}{GEMMAS['openpi'][0]}.0"


def worst(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Largest relative error of any tensor; names and shapes must agree."""
    assert actual.keys() == expected.keys()
    assert all(actual[name].shape == expected[name].shape for name in expected)
    return max(relative(actual[name], expected[name]) for name in expected)


# There and back: peft -> torch-merged against orbax -> torch-merged.


def write_shards(state: State, directory: Path) -> Path:
    """A checkpoint in three files with an index, and nothing else beside them."""
    directory.mkdir()
    names = sorted(state)
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        part = {name: state[name] for name in names if weight_map[name] == file}
        safetensors.torch.save_file(part, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_file(state: State, path: Path) -> Path:
    """One file, wherever."""
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(state, path)
    return path


@dataclass(frozen=True)
class Sources:
    """One LoRA checkpoint: its adapters, every form of its base, and what merging must give."""

    home: Path
    adapters: tuple[str, ...]
    bases: tuple[str, ...]
    merged: State


def prepare(name: str, home: Path) -> Sources:
    source = golden.golden(name)
    layouts = ["openpi", "lerobot"] + (["transformers"] if source.facts["model"] == "pi0" else [])
    for layout in layouts:
        bridge.convert(
            source.checkpoint, home / f"adapter-{layout}", to="peft-adapter", layout=layout, **source.options
        )
        bridge.convert(source.checkpoint, home / f"base-{layout}", to="torch-base", layout=layout)
    bridge.convert(
        source.checkpoint, home / "adapter-kept", to="peft-adapter", keep_alpha=True, **source.options
    )
    state = golden.read(home / "base-openpi")
    write_shards(state, home / "base-shards")
    write_file(state, home / "base-file" / "anything.safetensors")
    bare = {leaf: array for leaf, array in source.leaves.items() if "lora" not in leaf}
    checkpoints.save(bare, home / "base-orbax", quick=True)
    merged = golden.convert(source.checkpoint, home / "merged", dtype="float32", **source.options)
    return Sources(
        home,
        (*(f"adapter-{layout}" for layout in layouts), "adapter-kept"),
        (
            *(f"base-{layout}" for layout in layouts),
            "base-shards",
            "base-file/anything.safetensors",
            "base-orbax",
        ),
        merged,
    )


@pytest.fixture(scope="module", params=golden.WITH_LORA)
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return prepare(request.param, tmp_path_factory.mktemp(request.param))


def test_merged_from_any_base_is_merged_from_orbax(
    sources: Sources, tmp_path: Path, record_property: Record
) -> None:
    """Whatever container and layout the base has: to a bit the same, and 1e-6 from the direct route."""
    states = [
        golden.convert(
            sources.home / "adapter-openpi", tmp_path / str(i), base=sources.home / base, dtype="float32"
        )
        for i, base in enumerate(sources.bases)
    ]
    for state in states[1:]:
        assert golden.differing(states[0], state) == set()
    error = worst(states[0], sources.merged)
    record_property(
        f"{sources.home.name}: peft to merged against orbax to merged, {len(states)} bases", error
    )
    print(f"{sources.home.name}: peft against orbax {error:.2g}, {len(states)} bases")
    assert error <= 1e-6


def test_any_layout_of_the_adapter_is_the_same_function(
    sources: Sources, tmp_path: Path, record_property: Record
) -> None:
    """Adapter and base need not be in one layout; `--keep-alpha` or not is the same."""
    for adapter in sources.adapters:
        state = golden.convert(
            sources.home / adapter, tmp_path / adapter, base=sources.home / "base-orbax", dtype="float32"
        )
        error = worst(state, sources.merged)
        record_property(f"{sources.home.name}: {adapter} merged", error)
        assert error <= 1e-6, adapter


def test_output_has_the_layout_asked_for(sources: Sources, tmp_path: Path) -> None:
    """And the dtype: float32 where factors are folded, unless another is asked for."""
    for layout in ("openpi", "lerobot"):
        options: dict[str, Any] = {"base": sources.home / "base-openpi", "layout": layout}
        state = golden.convert(sources.home / "adapter-lerobot", tmp_path / layout, **options)
        assert {weight.dtype for weight in state.values()} == {torch.float32}
        narrow = golden.convert(
            sources.home / "adapter-lerobot", tmp_path / f"{layout}16", dtype="bfloat16", **options
        )
        expected = {
            name: weight if golden.held_in_float32(name.removeprefix("model." * (layout == "lerobot")))
            else weight.to(torch.bfloat16)
            for name, weight in state.items()
        }  # fmt: skip
        assert golden.differing(expected, narrow) == set()


def test_assets_come_with_the_adapter_or_its_base(sources: Sources, tmp_path: Path) -> None:
    home = sources.home
    assets = golden.files(home / "adapter-openpi" / "assets")
    assert assets
    golden.convert(home / "adapter-openpi", tmp_path / "1", base=home / "base-shards")
    assert golden.files(tmp_path / "1" / "assets") == assets
    bare = shutil.copytree(home / "adapter-openpi", tmp_path / "bare")
    shutil.rmtree(bare / "assets")
    golden.convert(bare, tmp_path / "2", base=home / "base-openpi")
    assert golden.files(tmp_path / "2" / "assets") == golden.files(home / "base-openpi" / "assets")
    plan = bridge.plan(bare, tmp_path / "3", to="torch-merged", base=home / "base-shards")
    assert plan.facts["norm_stats"].origin == "bridge.json"
    (bare / "bridge.json").unlink()
    plan = bridge.plan(bare, tmp_path / "3", to="torch-merged", base=home / "base-shards")
    assert [note for note in plan.notes if "no norm stats are known" in note]


def test_record_names_both_sources(sources: Sources, tmp_path: Path) -> None:
    golden.convert(sources.home / "adapter-openpi", tmp_path / "out", base=sources.home / "base-orbax")
    record = json.loads((tmp_path / "out" / "bridge.json").read_text())
    assert record["route"] == ["merge"] and record["loss"] == "lossy"
    assert {key: source["format"] for key, source in record["sources"].items()} == {
        "source": "peft",
        "base": "orbax",
    }
    assert all(source["arrays"] for source in record["sources"].values())


def test_two_runs_write_the_same_bytes(sources: Sources, tmp_path: Path) -> None:
    for workers in (1, 4):
        golden.convert(
            sources.home / "adapter-openpi",
            tmp_path / str(workers),
            base=sources.home / "base-shards",
            workers=workers,
        )
    assert golden.files(tmp_path / "1") == golden.files(tmp_path / "4")


# As PEFT trains them.

GEMMA = r"paligemma_with_expert\.(paligemma\.model\.language_model|gemma_expert\.model)\.layers\.\d+\..*"
SEVEN = rf"{GEMMA}(q|k|v|o|gate|up|down)_proj"
TREE: dict[str, Any] = {"lora": {}, "layers": 3, "heads": 6, "kv_heads": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without LoRA, as Orbax and as float32 safetensors."""
    home = tmp_path_factory.mktemp("plain")
    checkpoints.save(checkpoints.pi0_tree(**TREE), home / "1", quick=True)
    for layout in ("openpi", "lerobot", "transformers"):
        golden.convert(home / "1", home / layout, dtype="float32", layout=layout)
    return home


TRAINED: dict[str, dict[str, Any]] = {
    "one rank for all": {"target_modules": SEVEN, "r": 5, "lora_alpha": 10},
    "rslora": {"target_modules": SEVEN, "r": 5, "lora_alpha": 10, "use_rslora": True},
    "rslora with patterns": {
        "target_modules": SEVEN,
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "patterns by suffix": {
        "target_modules": SEVEN,
        "r": 5,
        "lora_alpha": 7,
        "rank_pattern": {"q_proj": 9, "mlp.gate_proj": 2},
        "alpha_pattern": {"q_proj": 20, "o_proj": 3.5},
    },
    "patterns that overlap": {
        "target_modules": SEVEN,
        "r": 5,
        "lora_alpha": 7,
        "rank_pattern": {r".*self_attn\.[qk]_proj": 3, "q_proj": 9, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {r"gemma_expert.*": 2, "q_proj": 20},
    },
    "only q and v of the expert": {
        "target_modules": r".*\.gemma_expert\..*\.self_attn\.(q|v)_proj",
        "r": 3,
        "lora_alpha": 3,
    },
    "only some layers": {
        "target_modules": ["gate_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "r": 3,
        "lora_alpha": 3,
    },
    "a list of names, some excluded": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "exclude_modules": r".*vision_tower.*",
        "r": 2,
        "lora_alpha": 6,
    },
    "a rank above the width": {"target_modules": SEVEN, "r": 40, "lora_alpha": 10},
    "modules saved whole": {
        "target_modules": SEVEN,
        "r": 3,
        "lora_alpha": 3,
        "modules_to_save": ["action_in_proj", "action_out_proj", "state_proj", "post_layernorm"],
    },
    "a parent of modules saved whole": {
        "target_modules": SEVEN,
        "r": 3,
        "lora_alpha": 3,
        "modules_to_save": ["multi_modal_projector"],
    },
    "modules of a tower saved whole": {
        "target_modules": SEVEN,
        "r": 3,
        "lora_alpha": 3,
        "modules_to_save": ["fc1", "layers.0.self_attn.out_proj"],
    },
    "gaussian init": {"target_modules": SEVEN, "r": 3, "lora_alpha": 3, "init_lora_weights": "gaussian"},
    "no init": {"target_modules": SEVEN, "r": 3, "lora_alpha": 3, "init_lora_weights": False},
    "dropout, ready to train": {
        "target_modules": SEVEN,
        "r": 3,
        "lora_dropout": 0.3,
        "inference_mode": False,
    },
    # lerobot, policies/pi0/modeling_pi0.py, _get_default_peft_targets, in openpi's names
    "as LeRobot trains by default": {
        "target_modules": r"(.*\.gemma_expert\..*\.self_attn\.(q|v)_proj|"
        r"(state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out))",
        "r": 4,
        "lora_alpha": 8,
    },
    "SigLIP as well": {"target_modules": ["q_proj", "v_proj", "fc1"], "r": 3, "lora_alpha": 3},
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_peft_trained_merges_as_peft_merges(
    plain: Path, name: str, tmp_path: Path, record_property: Record
) -> None:
    """Through Orbax and through safetensors, `torch-merged` is PEFT's own `merge_and_unload`."""
    base = golden.read(plain / "openpi")
    expected = train(base, LoraConfig(**TRAINED[name]), tmp_path / "adapter")
    moved = golden.differing(base, expected)
    assert moved
    for form in ("1", "openpi"):
        state = golden.convert(
            tmp_path / "adapter", tmp_path / f"out{form}", base=plain / form, dtype="float32"
        )
        assert golden.differing({n: expected[n] for n in base.keys() - moved},
                                {n: state[n] for n in base.keys() - moved}) == set()  # fmt: skip
        error = worst(state, expected)
        record_property(f"{name}: bridge against merge_and_unload", error)
        print(f"{name}, {form}: {error:.2g}, {len(moved)} weights moved")
        assert error <= 1e-6


@pytest.mark.parametrize("layout", ["lerobot", "transformers"])
def test_what_peft_trained_in_another_layout(plain: Path, layout: str, tmp_path: Path) -> None:
    """Module paths of LeRobot's and transformers' models, onto a base in openpi's names."""
    base = golden.read(plain / layout)
    paths = "|".join(prefix.replace(".", r"\.") for prefix in GEMMAS[layout])
    config = LoraConfig(
        target_modules=rf"({paths})\.\d+\..*_proj", r=3, lora_alpha=5, modules_to_save=["action_in_proj"]
    )
    expected = train(base, config, tmp_path / "adapter")
    assert len(golden.differing(base, expected)) == 2 * 7 * TREE["layers"] + 2
    state = golden.convert(
        tmp_path / "adapter", tmp_path / "out", base=plain / "openpi", layout=layout, dtype="float32"
    )
    assert worst(state, expected) <= 1e-6


def test_defaults_that_the_config_leaves_out(plain: Path, tmp_path: Path) -> None:
    """PEFT's rank and alpha are 8 where a config has none; a minimal config is enough."""
    base = golden.read(plain / "openpi")
    train(base, LoraConfig(target_modules=SEVEN, r=8, lora_alpha=24), tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": SEVEN}))
    model = load_adapter(base, tmp_path / "adapter")
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)} == {1.0}
    state = golden.convert(tmp_path / "adapter", tmp_path / "out", base=plain / "1", dtype="float32")
    assert worst(state, merged_by_peft(model)) <= 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_adapters(plain: Path, dtype: str, tmp_path: Path, record_property: Record) -> None:
    """Factors in half precision are exact in float32, where both PEFT and bridge multiply them."""
    base = golden.read(plain / "openpi")
    config = LoraConfig(target_modules=SEVEN, r=4, lora_alpha=6, modules_to_save=["state_proj"])
    train(base, config, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    narrow = {name: t.to(getattr(torch, dtype)) for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(narrow, file, {"format": "pt"})
    expected = merged_by_peft(load_adapter(base, tmp_path / "adapter"))
    state = golden.convert(tmp_path / "adapter", tmp_path / "out", base=plain / "openpi", dtype="float32")
    error = worst(state, expected)
    record_property(f"adapter in {dtype}: bridge against merge_and_unload", error)
    assert error <= 1e-6


def test_a_narrow_base_is_summed_in_float32(plain: Path, tmp_path: Path) -> None:
    """A bfloat16 base and a float32 adapter: rounded once, at the end, and only when asked for."""
    narrow = golden.convert(plain / "1", tmp_path / "narrow", dtype="bfloat16")
    train(golden.read(plain / "openpi"), LoraConfig(target_modules=SEVEN, r=4), tmp_path / "adapter")
    wide = {name: weight.to(torch.float32) for name, weight in narrow.items()}
    expected = merged_by_peft(load_adapter(wide, tmp_path / "adapter"))
    state = golden.convert(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "narrow")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert worst(state, expected) <= 1e-6
    kept = golden.convert(tmp_path / "adapter", tmp_path / "kept", base=tmp_path / "narrow", dtype="keep")
    assert {name: weight.dtype for name, weight in kept.items()} == {
        name: weight.dtype for name, weight in narrow.items()
    }
    assert golden.differing({name: state[name].to(narrow[name].dtype) for name in state}, kept) == set()


def test_an_adapter_trained_further_in_peft(plain: Path, tmp_path: Path) -> None:
    """openpi's factors, then trained in PEFT: q's blocks off the diagonal have moved, and still merge."""
    tree = checkpoints.pi0_tree(**{**TREE, "lora": {"paligemma": 5, "expert": 3}})
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    bridge.convert(source, tmp_path / "adapter", to="peft-adapter", with_base=True, lora_alpha=ALPHA)
    base = golden.read(tmp_path / "adapter" / "base")
    torch.manual_seed(1)
    model = PeftModel.from_pretrained(tree_of(base), tmp_path / "adapter", is_trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "further")
    q = safetensors.torch.load_file(tmp_path / "further" / WEIGHTS)[f"{LAYER}.self_attn.q_proj{B}"]
    assert q.count_nonzero() == q.numel()
    state = golden.convert(tmp_path / "further", tmp_path / "out", base=tmp_path / "adapter" / "base")
    assert worst(state, merged_by_peft(model)) <= 1e-6


def test_a_fused_model(tmp_path: Path) -> None:
    """As many k/v heads as heads: openpi keeps q, k and v in one leaf, and an adapter may have any of them."""
    source = checkpoints.save(
        checkpoints.pi0_tree(lora={}, fused_qkv=True, layers=2), tmp_path / "1", quick=True
    )
    base = golden.convert(source, tmp_path / "base", dtype="float32")
    config = LoraConfig(target_modules=rf"{GEMMA}(q|v|o)_proj", r=4, lora_alpha=6, rank_pattern={"v_proj": 7})
    expected = train(base, config, tmp_path / "adapter")
    for form in ("1", "base"):
        state = golden.convert(
            tmp_path / "adapter", tmp_path / f"out{form}", base=tmp_path / form, dtype="float32"
        )
        assert worst(state, expected) <= 1e-6


def test_pi05(tmp_path: Path) -> None:
    """adaRMS norms are dense layers: saved whole, they replace the base's."""
    source = checkpoints.save(
        checkpoints.pi0_tree(lora={}, model="pi05", layers=2), tmp_path / "1", quick=True
    )
    base = golden.convert(source, tmp_path / "base", dtype="float32")
    config = LoraConfig(
        target_modules=SEVEN,
        r=4,
        lora_alpha=6,
        modules_to_save=["time_mlp_in", "gemma_expert.model.norm.dense"],
    )
    expected = train(base, config, tmp_path / "adapter")
    assert len(golden.differing(base, expected)) == 2 * 2 * 7 + 4
    for form in ("1", "base"):
        state = golden.convert(
            tmp_path / "adapter", tmp_path / f"out{form}", base=tmp_path / form, dtype="float32"
        )
        assert worst(state, expected) <= 1e-6


# What is refused.


@dataclass
class Scene:
    """An adapter and its base that would merge, until a row of the table spoils them."""

    home: Path
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.adapter, self.base, self.out = (
            self.home / "adapter",
            self.home / "base",
            self.home / "made" / "out",
        )
        self.options = {"to": "torch-merged", "base": self.base}

    def config(self, **changes: Any) -> None:
        file = self.adapter / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def tensors(self, change: Callable[[State], object]) -> None:
        tensors = safetensors.torch.load_file(self.adapter / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, self.adapter / WEIGHTS, {"format": "pt"})

    def rebase(self, **dims: Any) -> None:
        """Another base."""
        shutil.rmtree(self.base)
        checkpoints.save(checkpoints.pi0_tree(**{"lora": {}, "layers": 2, **dims}), self.base, quick=True)


Spoil = Callable[[Scene], object]


@dataclass(frozen=True)
class Row:
    """One bad input."""

    says: str
    """Regular expression, found in one of the causes."""
    spoil: Spoil
    fix: str = ""
    """Found in the fix of that cause."""
    slow: bool = False
    """Whether it takes the whole budget of patterns."""


def configure(**changes: Any) -> Spoil:
    return lambda scene: scene.config(**changes)


def tensors(change: Callable[[State], object]) -> Spoil:
    return lambda scene: scene.tensors(change)


def add(name: str, *shape: int) -> Spoil:
    return tensors(lambda state: state.update({name: torch.ones(shape)}))


def put(name: str, value: float) -> Spoil:
    def change(state: State) -> None:
        state[name][0, 0] = value

    return tensors(change)


def loha(scene: Scene) -> None:
    """A whole adapter of another method."""
    shutil.rmtree(scene.adapter)
    tree = checkpoints.pi0_tree(lora={}, layers=2)
    base = {name: weight.to(torch.float32) for name, weight in golden.by_hand(tree).items()}
    get_peft_model(tree_of(base), LoHaConfig(target_modules=SEVEN, r=2)).save_pretrained(scene.adapter)


def dora(scene: Scene) -> None:
    """A whole adapter with magnitudes."""
    shutil.rmtree(scene.adapter)
    tree = checkpoints.pi0_tree(lora={}, layers=2)
    base = {name: weight.to(torch.float32) for name, weight in golden.by_hand(tree).items()}
    train(base, LoraConfig(target_modules=SEVEN, r=2, use_dora=True), scene.adapter)


def pickled(scene: Scene) -> None:
    torch.save(safetensors.torch.load_file(scene.adapter / WEIGHTS), scene.adapter / "adapter_model.bin")
    (scene.adapter / WEIGHTS).unlink()


def own_lora(scene: Scene) -> None:
    scene.rebase(lora={"expert": 3})


def adapter_as_base(scene: Scene) -> None:
    scene.options["base"] = shutil.copytree(scene.adapter, scene.home / "second")


def transpose(name: str) -> Spoil:
    def change(state: State) -> None:
        state[name] = state[name].T.contiguous()

    return tensors(change)


def rename(old: str, new: str) -> Spoil:
    return tensors(lambda state: state.update({new: state.pop(old)}))


DOWN = f"{LAYER}.mlp.down_proj"
CONFIGS = {
    "DoRA": Row(r"it is DoRA \(use_dora is True\)", dora, "merge_and_unload"),
    "DoRA by its config alone": Row(r"use_dora is True", configure(use_dora=True)),
    "LoHa": Row(r"peft_type is 'LOHA', not LORA", loha),
    "no peft_type": Row(r"peft_type is None", configure(peft_type=None)),
    "bias": Row(r"bias is 'all'", configure(bias="all")),
    "bias of LoRA alone": Row(r"bias is 'lora_only'", configure(bias="lora_only")),
    "lora_bias": Row(r"lora_bias is True", configure(lora_bias=True)),
    "fan_in_fan_out": Row(r"fan_in_fan_out is set", configure(fan_in_fan_out=True)),
    "pissa": Row(r"init_lora_weights is 'pissa', which changes the base", configure(init_lora_weights="pissa")),
    "pissa with steps": Row(r"'pissa_niter_4'", configure(init_lora_weights="pissa_niter_4")),
    "olora": Row(r"'OLoRA'", configure(init_lora_weights="OLoRA")),
    "corda": Row(r"'corda'", configure(init_lora_weights="corda")),
    "loftq": Row(r"'loftq'", configure(init_lora_weights="loftq")),
    "lora_ga": Row(r"'lora_ga'", configure(init_lora_weights="lora_ga")),
    "layer_replication": Row(r"layer_replication is \[\[0, 2\]\]", configure(layer_replication=[[0, 2]])),
    "target_parameters": Row(
        r"target_parameters is \['experts.gate_up_proj'\]", configure(target_parameters=["experts.gate_up_proj"])
    ),
    "trainable_token_indices": Row(
        r"trainable_token_indices is \[1, 2\]", configure(trainable_token_indices=[1, 2])
    ),
    "activated LoRA": Row(
        r"alora_invocation_tokens is \[5\]", configure(alora_invocation_tokens=[5])
    ),
    "QALoRA": Row(r"use_qalora is True", configure(use_qalora=True)),
    "block-diagonal LoRA": Row(r"use_bdlora is ", configure(use_bdlora={"nblocks": 2})),
    # these change what a loaded adapter computes: peft, tuners/lora/variants.py
    "KaSA": Row(r"kasa_config is ", configure(kasa_config={"beta": 0.1})),
    "MonteCLoRA": Row(r"monteclora_config is ", configure(monteclora_config={"num_samples": 4})),
    "Arrow": Row(r"arrow_config is ", configure(arrow_config={"top_k": 2})),
    "an unknown field": Row(r"use_superlora is 'yes'", configure(use_superlora="yes")),
    "an unknown field, of any size": Row(r"superlora is ", configure(superlora=["x" * 1000] * 1000)),
    "r is no number": Row(r"r is 'many'", configure(r="many")),
    "r is a fraction": Row(r"r is 2\.5", configure(r=2.5)),
    "r is zero": Row(r"r is 0", configure(r=0)),
    "r is true": Row(r"r is True", configure(r=True)),
    "alpha is no number": Row(r"lora_alpha is 'high'", configure(lora_alpha="high")),
    "alpha is infinite": Row(r"lora_alpha is inf", configure(lora_alpha=float("inf"))),
    "alpha is null": Row(r"lora_alpha is None", configure(lora_alpha=None)),
    "a rank of zero in a pattern": Row(r"rank_pattern is ", configure(rank_pattern={"q_proj": 0})),
    "a fraction in a pattern": Row(r"rank_pattern is ", configure(rank_pattern={"q_proj": 2.5})),
    "a word in a pattern": Row(r"alpha_pattern is ", configure(alpha_pattern={"q_proj": "high"})),
    "patterns that are a list": Row(r"rank_pattern is \['q_proj'\]", configure(rank_pattern=["q_proj"])),
    "an invalid pattern": Row(
        r"rank_pattern has a pattern that is not a valid regular expression", configure(rank_pattern={"(q_proj": 3})
    ),
    "a pattern too long": Row(
        r"rank_pattern has a pattern that has 20000 characters",
        configure(rank_pattern={"q" * 20000: 3}),
    ),
    "a pattern that takes for ever": Row(
        r"takes? longer than", configure(rank_pattern={r"(\w|\w\w|\.)+\d\.\w\.": 3})
    ),
    "an alpha that takes for ever": Row(
        r"takes? longer than", configure(alpha_pattern={r"(?:\w|[a-z]|\.|\W)+\d\d\d": 3}), slow=True
    ),
    "a pattern that is slow on real names alone": Row(
        r"takes? longer than",
        configure(rank_pattern={r"paligemma_with_expert(\w|\w\w|\.)+\d\d\d": 3}),
        slow=True,
    ),
    "many patterns that take for ever": Row(
        r"takes? longer than",
        configure(rank_pattern={rf"(\w|\w\w|\.)+\d\.\w{{{i + 1}}}\.": 3 for i in range(40)}),
        slow=True,
    ),
    "very many patterns": Row(
        r"matching the patterns of rank_pattern takes longer than",
        configure(rank_pattern={rf"(a|b|.)*layer{i}": 3 for i in range(20000)}),
        slow=True,
    ),
    "modules_to_save that is a word": Row(r"modules_to_save is 'all'", configure(modules_to_save="all")),
}  # fmt: skip

FILES = {
    "pickled": Row(r"adapter_model\.bin is a pickle", pickled, "safe_serialization"),
    "no config": Row(r"adapter_config\.json is missing", lambda s: (s.adapter / CONFIG).unlink()),
    "no weights": Row(r"adapter_model\.safetensors is missing", lambda s: (s.adapter / WEIGHTS).unlink()),
    "a config cut short": Row(
        r"adapter_config\.json is damaged", lambda s: (s.adapter / CONFIG).write_text('{"peft_type": "LO')
    ),
    "a config that is no object": Row(
        r"not a JSON object", lambda s: (s.adapter / CONFIG).write_text("[1]")
    ),
    "a config of nested lists": Row(
        r"adapter_config\.json is damaged", lambda s: (s.adapter / CONFIG).write_text("[" * 100000)
    ),
    "a config too large": Row(
        r"exceeds the 1 MB limit", lambda s: (s.adapter / CONFIG).write_text(" " * (2 << 20) + "{}")
    ),
    "a config in latin-1": Row(
        r"adapter_config\.json is damaged", lambda s: (s.adapter / CONFIG).write_bytes(b'{"a": "\xe9"}')
    ),
    "an empty config": Row(r"adapter_config\.json is damaged", lambda s: (s.adapter / CONFIG).write_bytes(b"")),
    "weights cut short": Row(
        r"adapter_model\.safetensors",
        lambda s: (s.adapter / WEIGHTS).write_bytes((s.adapter / WEIGHTS).read_bytes()[:-4]),
    ),
    "weights that point to LFS": Row(
        r"adapter_model\.safetensors",
        lambda s: (s.adapter / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    ),
}  # fmt: skip

TENSORS = {
    "no lora_B": Row(rf"{DOWN}{B} is missing", tensors(lambda s: s.pop(f"{DOWN}{B}"))),
    "no lora_A": Row(rf"{DOWN}{A} is missing", tensors(lambda s: s.pop(f"{DOWN}{A}"))),
    "rank of one module": Row(
        r"down_proj has rank 4 but the config gives it 5",
        tensors(lambda s: s.update({f"{DOWN}{A}": torch.ones(4, 19), f"{DOWN}{B}": torch.ones(13, 4)})),
    ),
    "rank by the config": Row(r"q_proj has rank 35 but the config gives it 36",
                              configure(rank_pattern={".*q_proj": 36}, r=5)),
    "factors that are no pair": Row(
        r"lora_A \[4, 19\] and lora_B \[13, 5\], which do not match",
        tensors(lambda s: s.update({f"{DOWN}{A}": torch.ones(4, 19)})),
    ),
    "factors of one axis": Row(
        r"lora_A \[5\] and lora_B \[13, 5\], which do not match",
        tensors(lambda s: s.update({f"{DOWN}{A}": torch.ones(5)})),
    ),
    "factors without rows": Row(
        r"down_proj",
        tensors(lambda s: s.update({f"{DOWN}{A}": torch.ones(0, 19), f"{DOWN}{B}": torch.ones(13, 0)})),
    ),
    "a transposed factor": Row(r"lora_A \[19, 5\] and lora_B \[13, 5\], which do not match", transpose(f"{DOWN}{A}")),
    "a stray name": Row(
        r"nonsense\.lora_A\.weight does not belong to any pi0 module", add(f"{PREFIX}nonsense{A}", 5, 13)
    ),
    "a stray ending": Row(
        r"lora_magnitude_vector is DoRA's magnitudes, and the config does not say use_dora",
        add(f"{DOWN}.lora_magnitude_vector", 13),
        "put back the adapter_config.json that was saved with it",
    ),
    "a stray bias": Row(
        r"lora_B\.bias is a bias of LoRA, and the config does not say lora_bias",
        add(f"{DOWN}.lora_B.bias", 13),
        "put back the adapter_config.json that was saved with it",
    ),
    "an embedding": Row(
        r"lora_embedding_A is LoRA of an embedding, which bridge does not convert",
        add(f"{PREFIX}{golden.PALIGEMMA}.model.language_model.embed_tokens.lora_embedding_A", 5, 29),
        "merge_and_unload",
    ),
    "no prefix": Row(
        r"down_proj\.lora_A\.weight does not belong to any pi0 module",
        rename(f"{DOWN}{A}", f"{DOWN}{A}".removeprefix(PREFIX)),
    ),
    "a base weight": Row(
        r"action_in_proj\.weight would overwrite the base, but modules_to_save does not name it",
        add(f"{PREFIX}action_in_proj.weight", 17, 31),
    ),
    "a base weight beside another that is saved": Row(
        r"state_proj\.weight would overwrite the base",
        lambda s: (
            s.config(modules_to_save=["action_in_proj"]),
            add(f"{PREFIX}action_in_proj.weight", 17, 31)(s),
            add(f"{PREFIX}action_in_proj.bias", 17)(s),
            add(f"{PREFIX}state_proj.weight", 17, 31)(s),
        ),
    ),
    "a saved embedding": Row(
        r"embed_tokens\.weight",
        add(f"{PREFIX}{golden.PALIGEMMA}.model.language_model.embed_tokens.weight", 29, 13),
    ),
    "a saved weight of another shape": Row(
        r"action_in_proj\.weight is \[17, 31\] in the base, \[17, 30\] in the adapter",
        lambda s: (
            s.config(modules_to_save=["action_in_proj"]),
            add(f"{PREFIX}action_in_proj.weight", 17, 30)(s),
            add(f"{PREFIX}action_in_proj.bias", 17)(s),
        ),
    ),
    "another dtype": Row(
        r"has dtype float64", tensors(lambda s: s.update({f"{DOWN}{A}": s[f"{DOWN}{A}"].double()}))
    ),
    "integers": Row(r"has dtype int32", tensors(lambda s: s.update({f"{DOWN}{A}": s[f"{DOWN}{A}"].int()}))),
    "no tensor at all": Row(r"adapter contains no array", tensors(lambda s: s.clear())),
    "no known module": Row(
        r"match no supported model",
        tensors(lambda s: (s.clear(), s.update({"base_model.model.layers.0.attn.lora_A.weight": torch.ones(2, 2)}))),
    ),
    "a NaN in lora_A": Row(
        r"adapter: \S+down_proj\.lora_A\.weight contains NaN or infinite values",
        put(f"{DOWN}{A}", float("nan")),
        "earlier step",
    ),
    "an infinity in lora_B": Row(
        r"adapter: \S+down_proj\.lora_B\.weight contains NaN or infinite values",
        put(f"{DOWN}{B}", float("inf")),
        "earlier step",
    ),
    "a NaN in a saved module": Row(
        r"adapter: action_in_proj/kernel contains NaN or infinite values",
        lambda s: (
            s.config(modules_to_save=["action_in_proj"]),
            s.tensors(
                lambda state: state.update(
                    {
                        f"{PREFIX}action_in_proj.weight": torch.full((17, 31), torch.nan),
                        f"{PREFIX}action_in_proj.bias": torch.ones(17),
                    }
                )
            ),
        ),
    ),
    "a product that overflows": Row(
        r"linear overflows float32",
        tensors(lambda s: (s[f"{DOWN}{A}"].fill_(1e30), s[f"{DOWN}{B}"].fill_(1e30))),
    ),
    "too large for float16": Row(
        r"linear overflows float16",
        lambda s: (s.options.update(dtype="float16"), put(f"{DOWN}{B}", 1e6)(s)),
        "float32",
    ),
}  # fmt: skip

BASES = {
    "no base": Row(r"without a base", lambda s: s.options.pop("base"), "add --base PATH"),
    "a base that does not exist": Row(
        r"nowhere does not exist", lambda s: s.options.update(base=s.home / "nowhere")
    ),
    "an adapter as base": Row(r"second is an adapter, not a base", adapter_as_base),
    "itself as base": Row(
        r"adapter is an adapter, not a base", lambda s: s.options.update(base=s.adapter)
    ),
    "a base with LoRA": Row(r"base\S* has LoRA factors of its own", own_lora, "--to torch-base"),
    "a base of other widths": Row(
        r"does not fit .*: \d+ weights disagree: "
        r"(\S+ is \[\d+, \d+\] in the base, \[\d+, \d+\] in the adapter(; )?){3}$",
        lambda s: s.rebase(width=11, mlp=23),
        "--base",
    ),
    "a base of one other width": Row(
        r"weights disagree: \S+layers\.0\.mlp\.gate_proj\.weight is \[20, 13\] in the base, \[19, 13\] in the adapter",
        lambda s: s.rebase(mlp=20),
    ),
    "a base of fewer layers": Row(r"layers\.1\.\S+ is not in the base", lambda s: s.rebase(layers=1)),
    "a base in PyTorch of other widths": Row(
        r"weights disagree: .*in the base",
        lambda s: (
            s.rebase(width=11),
            bridge.convert(s.base, s.home / "torch", to="torch-merged"),
            s.options.update(base=s.home / "torch"),
        ),
    ),
    "a base of which a tensor is missing": Row(
        r"action_in_proj/bias",
        lambda s: (
            shutil.rmtree(s.base),
            checkpoints.save(
                {k: v for k, v in checkpoints.pi0_tree(lora={}, layers=2).items() if k != "action_in_proj/bias"},
                s.base,
                quick=True,
            ),
        ),
    ),
    "an output in the base": Row(
        r"is inside the source", lambda s: setattr(s, "out", s.base / "out")
    ),
    "alpha for what needs none": Row(r"--lora-alpha", lambda s: s.options.update(lora_alpha=4.0)),
    "rslora for what says it itself": Row(r"--rslora", lambda s: s.options.update(rslora=True)),
}  # fmt: skip

ROWS = {
    f"{table}: {name}": row
    for table, rows in (("configs", CONFIGS), ("files", FILES), ("tensors", TENSORS), ("bases", BASES))
    for name, row in rows.items()
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter and the base that rows spoil: rank 5, q_proj 35."""
    home = tmp_path_factory.mktemp("good")
    tree = checkpoints.pi0_tree(lora={"paligemma": 5, "expert": 5}, layers=2)
    checkpoints.save(tree, home / "1", quick=True)
    bridge.convert(home / "1", home / "adapter", to="peft-adapter", lora_alpha=5.0)
    checkpoints.save({k: v for k, v in tree.items() if "lora" not in k}, home / "base", quick=True)
    shutil.rmtree(home / "1")
    return home


@pytest.fixture
def scene(good: Path, tmp_path: Path) -> Scene:
    shutil.copytree(good, tmp_path / "scene")
    return Scene(tmp_path / "scene")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if row.slow else []) for name, row in ROWS.items()]
)
def test_refused(scene: Scene, name: str) -> None:
    row = ROWS[name]
    row.spoil(scene)
    before = snapshot(scene.home)
    with pytest.raises(Refusal) as refused:
        bridge.convert(scene.adapter, scene.out, **scene.options)
    for problem in refused.value.problems:
        assert problem.cause and "\n" not in problem.cause and len(problem.cause) < 700, problem.cause
        assert problem.fix and "\n" not in problem.fix
    assert len(set(refused.value.problems)) == len(refused.value.problems), "said twice"
    hits = [problem for problem in refused.value.problems if re.search(row.says, problem.cause)]
    assert hits, [problem.cause for problem in refused.value.problems]
    assert any(row.fix in problem.fix for problem in hits), hits
    assert snapshot(scene.home) == before


def test_the_scene_converts_when_nothing_spoils_it(scene: Scene) -> None:
    before = snapshot(scene.home)
    bridge.convert(scene.adapter, scene.out, **scene.options)
    after = snapshot(scene.home)
    assert {path: after[path] for path in before} == before


def test_harmless_fields_pass(scene: Scene) -> None:
    """What PEFT writes into every config, and what only matters while training."""
    written = json.loads((scene.adapter / CONFIG).read_text())
    every = json.loads(json.dumps(LoraConfig(target_modules=["q_proj"]).to_dict(), default=str))
    more = {"lora_dropout": 0.1, "inference_mode": False, "unknown_and_off": False, "unknown_and_null": None,
            "unknown_and_empty": {}}  # fmt: skip
    scene.config(**{**every, **written, **more})
    bridge.convert(scene.adapter, scene.out, **scene.options)


def test_all_faults_are_said_at_once(scene: Scene) -> None:
    scene.config(use_rslora=True, bias="all", superlora=3, use_dora=True)
    scene.tensors(lambda state: (state.pop(f"{DOWN}{B}"), state.update(stray=torch.ones(2))))
    scene.options["layout"] = "nonsense"
    with pytest.raises(Refusal) as refused:
        bridge.convert(scene.adapter, scene.out, **scene.options)
    said = [problem.cause for problem in refused.value.problems]
    for part in (
        "bias is",
        "superlora is",
        "use_dora is",
        "is missing",
        "stray does not belong to any pi0 module",
        "no layout",
    ):
        assert sum(part in cause for cause in said) == 1, (part, said)


def test_ranks_by_a_pattern_for_every_module(scene: Scene, good: Path) -> None:
    """The same function under other names than bridge's own."""
    config = json.loads((scene.adapter / CONFIG).read_text())
    assert config["r"] == 5
    scene.config(r=35, lora_alpha=35, rank_pattern={"(k|v|o|gate|up|down)_proj": 5},
                 alpha_pattern={r"self_attn\.(k|v|o)_proj": 5, "(gate|up|down)_proj": 5})  # fmt: skip
    bridge.convert(scene.adapter, scene.out, **scene.options)
    state = golden.read(scene.out)
    again = golden.convert(good / "adapter", scene.home / "good", base=scene.base)
    assert golden.differing(state, again) == set()
