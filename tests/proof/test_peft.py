"""The proof that stands before every adapter: it passes a true one, and rejects each corruption of it.

Corruptions are planted into a finished directory, or made by a faulty writer; most of them PEFT loads in silence.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import bridge
from bridge.conversion import to_adapter
from bridge.errors import ProofFailed
from bridge.proof.peft import TOLERANCE, Proof, prove_adapter
from bridge.proof.peft_skeleton import load_on_skeleton
from bridge.stream import factor_writers
from tests.kit import checkpoints, golden
from tests.kit.golden import State
from tests.kit.mutants import in_axes
from tests.kit.peft import CONFIG, PREFIX, WEIGHTS, A, B

LANGUAGE = f"{golden.PALIGEMMA}.model.language_model"
LAYER = f"{PREFIX}{LANGUAGE}.layers.0"
EXPERT = f"{PREFIX}{golden.EXPERT}.model.layers.0"
SIGLIP = f"{golden.PALIGEMMA}.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"

#: Ranks that make some matrices square: 13 is the width, 11 a head's dimension.
SQUARE = {"paligemma": 13, "expert": 17}


@dataclass
class Files:
    """An adapter as it lies on disk, to be corrupted."""

    config: dict[str, Any]
    tensors: State

    def swap(self, one: str, other: str) -> None:
        """Exchange both factors of two modules."""
        for ending in (A, B):
            self.tensors[one + ending], self.tensors[other + ending] = (
                self.tensors[other + ending],
                self.tensors[one + ending],
            )

    def modules(self) -> list[str]:
        return sorted(name.removesuffix(A) for name in self.tensors if name.endswith(A))

    def write(self, directory: Path) -> None:
        (directory / CONFIG).write_text(json.dumps(self.config))
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            directory / WEIGHTS,
            {"format": "pt"},
        )


@dataclass(frozen=True)
class Written:
    """A finished adapter and the plan that made it."""

    plan: bridge.Plan
    directory: Path

    def files(self) -> Files:
        tensors = safetensors.torch.load_file(self.directory / WEIGHTS)
        return Files(json.loads((self.directory / CONFIG).read_text()), tensors)

    def spoilt(self, spoil: Callable[[Files], object], directory: Path) -> Path:
        shutil.copytree(self.directory, directory)
        files = self.files()
        before = copy.deepcopy(files)
        spoil(files)
        assert files.config != before.config or golden.differing(files.tensors, before.tensors)
        files.write(directory)
        return directory


def write(home: Path, lora: dict[str, int], *, keep_alpha: bool, layers: int = 2) -> Written:
    """An adapter of a small pi0; alpha / rank is 2 and 0.5."""
    tree = checkpoints.pi0_tree(lora=lora, layers=layers)
    source = checkpoints.save(tree, home / "1", quick=True)
    alphas = {"paligemma": 2.0 * lora["paligemma"], "expert": 0.5 * lora["expert"]}
    plan = bridge.plan(source, home / "adapter", to="peft-adapter", keep_alpha=keep_alpha, lora_alpha=alphas)
    plan.run()
    return Written(plan, home / "adapter")


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """With square factors, and the scale in `lora_B`."""
    return write(tmp_path_factory.mktemp("folded"), SQUARE, keep_alpha=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Of ranks below every dimension, and the scale in `alpha_pattern`."""
    return write(tmp_path_factory.mktemp("kept"), {"paligemma": 1, "expert": 1}, keep_alpha=True)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Of five layers."""
    return write(tmp_path_factory.mktemp("deep"), {"paligemma": 3, "expert": 2}, keep_alpha=False, layers=5)


# What is planted.


def rename(files: Files) -> None:
    files.tensors[f"{LAYER}.self_attn.query{A}"] = files.tensors.pop(f"{LAYER}.self_attn.q_proj{A}")


def rename_both(files: Files) -> None:
    for ending in (A, B):
        files.tensors[f"{LAYER}.mlp.gate{ending}"] = files.tensors.pop(f"{LAYER}.mlp.gate_proj{ending}")


def lose_prefix(files: Files) -> None:
    files.tensors = {name.removeprefix(PREFIX): tensor for name, tensor in files.tensors.items()}


def drop(*names: str) -> Callable[[Files], object]:
    return lambda files: [files.tensors.pop(name) for name in names]


def permute_layers(files: Files) -> None:
    for module in files.modules():
        if ".layers.0." in module:
            files.swap(module, module.replace(".layers.0.", ".layers.1."))


def swap(one: str, other: str, layer: str = LAYER) -> Callable[[Files], object]:
    return lambda files: files.swap(f"{layer}.{one}", f"{layer}.{other}")


def swap_all_gates(files: Files) -> None:
    for module in files.modules():
        if module.endswith("gate_proj"):
            files.swap(module, module.replace("gate_proj", "up_proj"))


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Files], object]:
    def spoil(files: Files) -> None:
        files.tensors[name] = how(files.tensors[name].clone())

    return spoil


def put(value: float, *, relative: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """Change the largest value of a tensor."""

    def how(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.view(-1)
        at = int(flat.abs().argmax())
        flat[at] = flat[at] * value if relative else value
        return tensor

    return how


def flip(bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Flip one bit of the largest value of a float32 tensor."""

    def how(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.view(-1)
        at = int(flat.abs().argmax())
        number = flat[at : at + 1].numpy().view(np.uint32)
        number ^= np.uint32(1 << bit)
        return tensor

    return how


def roll_heads(files: Files) -> None:
    """q's blocks of the rank against each other: lora_A moved by one head, lora_B not."""
    name = f"{LAYER}.self_attn.q_proj{A}"
    files.tensors[name] = files.tensors[name].roll(len(files.tensors[name]) // 7, 0)


def scale_between(files: Files) -> None:
    """A factor from one matrix into the other is the same product: which must pass, see below."""
    files.tensors[f"{LAYER}.mlp.up_proj{A}"] *= 2
    files.tensors[f"{LAYER}.mlp.up_proj{B}"] *= 1.0001 / 2


def configure(**changes: Any) -> Callable[[Files], object]:
    return lambda files: files.config.update(changes)


def in_pattern(field: str, how: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Files], object]:
    def spoil(files: Files) -> None:
        files.config[field] = how(dict(files.config[field]))

    return spoil


def one_more(pattern: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(pattern))
    return {**pattern, first: pattern[first] + 1}


def without_first(pattern: dict[str, Any]) -> dict[str, Any]:
    return dict(list(pattern.items())[1:])


def miss_one(files: Files) -> None:
    """The expert's down_proj is no target any more; its tensors are still there."""
    left, right = files.config["target_modules"].rsplit("|down_proj", 1)
    files.config["target_modules"] = left + right


def other_expert(files: Files) -> None:
    """The config of an adapter of the action expert alone, beside the tensors of both."""
    files.config.update(target_modules=rf"{golden.EXPERT}.model.layers.\d+.*(q|k|v|o|gate|up|down)_proj")


def siglip_module(files: Files) -> None:
    """Factors for SigLIP's attention: of width 15, and no target."""
    files.tensors[f"{PREFIX}{SIGLIP}{A}"] = torch.ones(13, 15)
    files.tensors[f"{PREFIX}{SIGLIP}{B}"] = torch.ones(15, 13)


def siglip_target(files: Files) -> None:
    """The same, and a config that targets it."""
    siglip_module(files)
    files.config["target_modules"] = f"({files.config['target_modules']}|{SIGLIP})"
    files.config["rank_pattern"]["^" + SIGLIP] = 13
    files.config["alpha_pattern"]["^" + SIGLIP] = 13


def base_key(files: Files) -> None:
    """What PEFT adds by itself when it thinks the vocabulary has changed: it would overwrite the base."""
    files.tensors[f"{PREFIX}{LANGUAGE}.embed_tokens.weight"] = torch.ones(29, 13)


def base_weight(files: Files) -> None:
    files.tensors[f"{PREFIX}action_in_proj.weight"] = torch.ones(17, 31)


def base_layer(files: Files) -> None:
    """Under the name that the base weight has once PEFT has wrapped it: loading would overwrite it."""
    files.tensors[f"{LAYER}.mlp.down_proj.base_layer.weight"] = torch.ones(13, 19)


def saved_modules(files: Files) -> None:
    files.tensors[f"{PREFIX}action_in_proj.weight"] = torch.ones(17, 31)
    files.tensors[f"{PREFIX}action_in_proj.bias"] = torch.ones(17)
    files.config["modules_to_save"] = ["action_in_proj"]


def truncated(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16, stored in float32."""
    return tensor.to(torch.bfloat16).to(torch.float32)


def every(how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Files], object]:
    def spoil(files: Files) -> None:
        files.tensors = {name: how(tensor.clone()) for name, tensor in files.tensors.items()}

    return spoil


def add_pattern(field: str, pattern: str, value: int, *, first: bool) -> Callable[[Files], object]:
    return in_pattern(field, lambda old: {pattern: value, **old} if first else {**old, pattern: value})


#: Every module, or every one of the expert; both sort before bridge's own patterns.
BROAD = r"^paligemma_with_expert.*_proj"
EXPERTS = r"^paligemma_with_expert.gemma_expert.*_proj"

CORRUPTIONS: dict[str, Callable[[Files], object]] = {
    # names
    "a key renamed": rename,
    "a module renamed": rename_both,
    "the prefix lost": lose_prefix,
    "a lora_A dropped": drop(f"{LAYER}.mlp.up_proj{A}"),
    "a lora_B dropped": drop(f"{LAYER}.mlp.up_proj{B}"),
    "a module dropped": drop(f"{LAYER}.mlp.up_proj{A}", f"{LAYER}.mlp.up_proj{B}"),
    "an extra base key": base_key,
    "a base weight": base_weight,
    "a base weight under PEFT's name": base_layer,
    "a module saved whole": saved_modules,
    "factors for SigLIP": siglip_module,
    "factors for SigLIP, targeted": siglip_target,
    # places
    "layers permuted": permute_layers,
    "gate and up swapped": swap("mlp.gate_proj", "mlp.up_proj"),
    "gate and up swapped everywhere": swap_all_gates,
    "k and v swapped": swap("self_attn.k_proj", "self_attn.v_proj"),
    "k and v of the expert swapped": swap("self_attn.k_proj", "self_attn.v_proj", EXPERT),
    "heads of q moved": roll_heads,
    "a square lora_A transposed": change(f"{LAYER}.mlp.gate_proj{A}", lambda t: t.T),
    "a square lora_B transposed": change(f"{LAYER}.mlp.down_proj{B}", lambda t: t.T),
    # values
    "a lora_B of zeros": change(f"{EXPERT}.self_attn.o_proj{B}", torch.zeros_like),
    "every lora_B of zeros": lambda files: [t.zero_() for n, t in files.tensors.items() if n.endswith(B)],
    "a sign lost": change(f"{LAYER}.self_attn.v_proj{A}", torch.neg),
    "one value doubled": change(f"{LAYER}.mlp.down_proj{A}", put(2, relative=True)),
    "one value off by a thousandth": change(f"{LAYER}.mlp.down_proj{A}", put(1.001, relative=True)),
    "one value zero": change(f"{EXPERT}.self_attn.k_proj{B}", put(0)),
    "one sign bit flipped": change(f"{LAYER}.self_attn.q_proj{B}", flip(31)),
    "one exponent bit flipped": change(f"{LAYER}.self_attn.q_proj{B}", flip(24)),
    "one mantissa bit flipped": change(f"{LAYER}.self_attn.q_proj{B}", flip(16)),
    "the last bit flipped": change(f"{LAYER}.self_attn.q_proj{B}", flip(0)),
    "a NaN": change(f"{LAYER}.mlp.down_proj{B}", put(float("nan"))),
    "an infinity": change(f"{LAYER}.mlp.down_proj{A}", put(float("inf"))),
    "rounded to bfloat16": every(truncated),
    "one tensor rounded": change(f"{LAYER}.self_attn.o_proj{A}", truncated),
    "stored in bfloat16": every(lambda t: t.to(torch.bfloat16)),
    "stored in float64": every(lambda t: t.to(torch.float64)),
    "a scale moved, and lost a little": scale_between,
    # config
    "alpha default wrong": lambda files: files.config.update(lora_alpha=files.config["lora_alpha"] * 2),
    "alpha default lost": lambda files: files.config.pop("lora_alpha"),
    "an alpha wrong": in_pattern("alpha_pattern", one_more),
    "an alpha lost": in_pattern("alpha_pattern", without_first),
    "a rank wrong": in_pattern("rank_pattern", one_more),
    "a rank lost": in_pattern("rank_pattern", without_first),
    "rank default wrong": lambda files: files.config.update(r=files.config["r"] + 1),
    "a broad alpha pattern first": add_pattern("alpha_pattern", BROAD, 1, first=True),
    "a broad rank pattern first": add_pattern("rank_pattern", BROAD, 13, first=True),
    # the first that matches wins: PEFT loads these as planned, and means something else once it has saved them
    "a broad alpha pattern last, which sorts first": add_pattern("alpha_pattern", EXPERTS, 1, first=False),
    "a broad rank pattern last, which sorts first": add_pattern("rank_pattern", EXPERTS, 13, first=False),
    "targets widened to suffixes": configure(
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    ),
    "targets widened to all linear layers": configure(target_modules="all-linear"),
    "a target missed": miss_one,
    "the config of another expert": other_expert,
    "only some layers": configure(layers_to_transform=[0], target_modules=["gate_proj"]),
    "a module excluded": configure(exclude_modules=r".*layers\.0\.mlp\.up_proj"),
    "use_rslora": configure(use_rslora=True),
    "use_dora": configure(use_dora=True),
    "init pissa": configure(init_lora_weights="pissa"),
    "init olora": configure(init_lora_weights="olora"),
    "a bias": configure(bias="all"),
    "a LoRA bias": configure(lora_bias=True),
    "fan_in_fan_out": configure(fan_in_fan_out=True),
    "another method": configure(peft_type="LOHA"),
    "no method": lambda files: files.config.pop("peft_type"),
    "layers replicated": configure(layer_replication=[[0, 2]]),
    "an unknown field": configure(use_superlora=True),
    "a module that does not exist to save": configure(modules_to_save=["nothing_proj_"]),
}


def prove(directory: Path, plan: bridge.Plan) -> Proof:
    return prove_adapter(directory, plan.output, plan.inputs, plan.workers)


def rejected(directory: Path, plan: bridge.Plan) -> ProofFailed:
    with pytest.raises(ProofFailed) as failed:
        prove(directory, plan)
    *named, last = failed.value.problems
    for problem in named if "more problems" in last.cause else failed.value.problems:
        assert str(directory) in problem.cause and "\n" not in problem.cause and problem.fix
        assert len(problem.cause) < 700
    return failed.value


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_proof_rejects(folded: Written, name: str, tmp_path: Path) -> None:
    """Of a finished directory, whose plan and record are right."""
    rejected(folded.spoilt(CORRUPTIONS[name], tmp_path / "adapter"), folded.plan)


def test_what_peft_loads_otherwise_than_it_lies_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is saved whole has no factors to check: only what PEFT would save again shows its values."""
    tree = checkpoints.pi0_tree(lora={"expert": 3}, layers=2)
    source = checkpoints.save(tree, tmp_path / "1", quick=True)
    bare = {leaf: array for leaf, array in tree.items() if "lora" not in leaf}
    bare["action_in_proj/kernel"] = bare["action_in_proj/kernel"] + 1
    base = checkpoints.save(bare, tmp_path / "base", quick=True)
    plan = bridge.plan(
        source, tmp_path / "adapter", to="peft-adapter", base=base, modules_to_save=True, lora_alpha=2.0
    )
    plan.run()
    prove(tmp_path / "adapter", plan)

    def otherwise(directory: Path, shapes: Any) -> Any:
        model, problems = load_on_skeleton(directory, shapes)
        saved = model.get_submodule(f"{PREFIX}action_in_proj").modules_to_save["default"]
        saved.weight.data[3, 5] += 1
        return model, problems

    monkeypatch.setattr("bridge.proof.peft.load_on_skeleton", otherwise)
    (problem,) = rejected(tmp_path / "adapter", plan).problems
    assert f"PEFT holds other values than the file in {PREFIX}action_in_proj.weight" in problem.cause


#: What only a checksum shows, as PEFT computes the same from it; and what needs square factors.
ELSEWHERE = {"the last bit flipped", "a square lora_A transposed", "a square lora_B transposed"}


def planned_so(written: Written, spoil: Callable[[Files], object], directory: Path) -> bridge.Plan:
    """A fault made by bridge itself: the plan's config agrees with the file, and no record tells."""
    written.spoilt(spoil, directory)
    (directory / "bridge.json").unlink()
    output = written.plan.output
    files = {**output.files, CONFIG: (directory / CONFIG).read_bytes()}
    return replace(written.plan, outputs=(replace(output, files=files),))


@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - ELSEWHERE))
def test_proof_rejects_what_was_planned_wrongly(kept: Written, name: str, tmp_path: Path) -> None:
    """The same faults. What is left is what PEFT makes of them, held against the source."""
    plan = planned_so(kept, CORRUPTIONS[name], tmp_path / "adapter")
    rejected(tmp_path / "adapter", plan)


# What only the numbers of one module of one layer show.

SEVEN = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
EVERY = [f"{stack[:-1]}{layer}.{name}" for stack in (LAYER, EXPERT) for layer in (0, 3, 4) for name in SEVEN]


def count(refused: ProofFailed, what: str) -> int:
    """Problems that say something."""
    return sum(what in problem.cause for problem in refused.problems)


def off_by(modules: list[str], ending: str, relative: float) -> Callable[[Files], object]:
    """One entry of each module off, by so much that the module's product is off by `relative`."""

    def spoil(files: Files) -> None:
        for module in modules:
            a, b = (files.tensors[module + each].double() for each in (A, B))
            # a row of A counts by its column of B, and the other way round
            counts = torch.linalg.norm(b, dim=0) if ending == A else torch.linalg.norm(a, dim=1)
            rank = int(counts.argmax())
            place = (rank, 1) if ending == A else (int(b[:, rank].abs().argmax()), rank)
            files.tensors[module + ending][place] += relative * torch.linalg.norm(b @ a) / counts[rank]

    return spoil


@pytest.mark.parametrize("ending", [A, B])
def test_the_limit_is_where_it_says(deep: Written, ending: str, tmp_path: Path) -> None:
    """One entry off, in each module of three layers: a tenth above what is allowed, and a tenth below."""
    limit = TOLERANCE["float32"]
    said = rejected(tmp_path / "a", planned_so(deep, off_by(EVERY, ending, 1.1 * limit), tmp_path / "a"))
    for module in EVERY:
        assert (
            count(said, f": the product of the factors of {module.removeprefix(PREFIX)} is off by 2.2e-06")
            == 1
        )
    assert count(said, ": the product of the factors of ") == len(EVERY)
    plan = planned_so(deep, off_by(EVERY, ending, 0.9 * limit), tmp_path / "b")
    errors = prove(tmp_path / "b", plan).errors
    for module in EVERY:
        assert errors[module.removeprefix(PREFIX)] == pytest.approx(0.9 * limit, rel=0.05)
    assert sum(error > 0.5 * limit for error in errors.values()) == len(EVERY)


@pytest.mark.parametrize("module", [EVERY[0], EVERY[17], EVERY[-1]])
def test_one_entry_of_one_module(deep: Written, module: str, tmp_path: Path) -> None:
    said = rejected(tmp_path / "a", planned_so(deep, off_by([module], A, 2.2e-6), tmp_path / "a"))
    assert count(said, module.removeprefix(PREFIX)) == len(said.problems) <= 2


@pytest.mark.parametrize("name", SEVEN)
def test_one_module_of_two_layers_exchanged(deep: Written, name: str, tmp_path: Path) -> None:
    one, other = (f"{EXPERT.removesuffix('.0')}.{layer}.{name}" for layer in (2, 4))
    said = rejected(tmp_path / "a", planned_so(deep, lambda files: files.swap(one, other), tmp_path / "a"))
    for module in (one, other):
        assert f"the product of the factors of {module.removeprefix(PREFIX)} is off" in str(said)
        assert f"the output of {module.removeprefix(PREFIX)} is off" in str(said)


def test_one_layer_of_all_modules_permuted(deep: Written, tmp_path: Path) -> None:
    """Layers 1, 2 and 3 in a circle, everywhere."""

    def spoil(files: Files) -> None:
        for module in files.modules():
            if ".layers.1." in module:
                files.swap(module, module.replace(".layers.1.", ".layers.2."))
                files.swap(module, module.replace(".layers.1.", ".layers.3."))

    said = rejected(tmp_path / "a", planned_so(deep, spoil, tmp_path / "a"))
    assert count(said, ": the product of the factors of ") == 3 * 2 * 7


# Faults of PEFT, of which bridge would not know.


def peft_forward(
    change: Callable[[torch.Tensor], torch.Tensor], only: int | None = None
) -> Callable[..., Any]:
    """PEFT's forward, with another result: always, or the so-many-th time alone."""
    forward, calls = peft.tuners.lora.layer.Linear.forward, iter(range(10**6))

    def faulty(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = forward(self, x, *args, **kwargs)
        return change(result) if only in (None, next(calls)) else result

    return faulty


@pytest.mark.parametrize("only", [None, 0, 13, 27])
def test_peft_that_runs_a_module_otherwise(
    folded: Written, only: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All modules, or one of the twenty-eight; by a ten thousandth."""
    faulty = peft_forward(lambda result: result * (1 + 1e-4), only)
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", faulty)
    said = rejected(folded.directory, replace(folded.plan, workers=1))
    # against openpi's einsums, and against the factors it holds
    assert len(said.problems) == 2 * (28 if only is None else 1)
    assert count(said, ": the output of ") == count(said, ": the output, by its own factors, of ")


def test_peft_that_merges_otherwise(folded: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """One module of every kind is built entry by entry: q, k, v, o, gate, up, down of two experts."""
    get_delta_weight = peft.tuners.lora.layer.Linear.get_delta_weight

    def faulty(self: Any, adapter: str) -> torch.Tensor:
        weight: torch.Tensor = get_delta_weight(self, adapter)
        return weight * (1 + 1e-5)

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "get_delta_weight", faulty)
    said = rejected(folded.directory, folded.plan)
    assert len(said.problems) == count(said, ": the change of the weight of ") == 14
    kinds = {
        problem.cause.split("the change of the weight of ")[1].split(" is off")[0]
        for problem in said.problems
    }
    assert {re.sub(r"\.\d+\.", ".", kind) for kind in kinds} == {
        f"{stack.removesuffix('.0').removeprefix(PREFIX)}.{name}"
        for stack in (LAYER, EXPERT)
        for name in SEVEN
    }
    assert {re.search(r"layers\.(\d)", kind)[1] for kind in kinds} == {"0", "1"}  # type: ignore[index]


@pytest.mark.parametrize("tile", [1, 100, 1 << 30])
def test_a_change_is_compared_in_any_tiles(
    folded: Written, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row once: one that is wrong is seen, and the layer is as it was afterwards."""
    monkeypatch.setattr("bridge.proof.peft.TILE", tile)
    prove(folded.directory, folded.plan)
    get_delta_weight, rows = peft.tuners.lora.layer.Linear.get_delta_weight, iter(range(10**6))

    def faulty(self: Any, adapter: str) -> torch.Tensor:
        weight: torch.Tensor = get_delta_weight(self, adapter)
        for row in weight:
            if next(rows) == 10:
                row += 1
        return weight

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "get_delta_weight", faulty)
    said = rejected(folded.directory, replace(folded.plan, workers=1))
    assert len(said.problems) == 1 and "the change of the weight of" in str(said)


# Faults of bridge's table: product and change follow the same table, openpi's einsums do not.

TABLE = {
    "heads inside dims, q": in_axes("/q_einsum/w", "layer head width dim -> (dim head) width"),
    "heads inside dims, o": in_axes("/attn_vec_einsum_1/w", "layer head dim width -> width (dim head)"),
}


@pytest.mark.parametrize("fault", TABLE)
def test_a_fault_of_the_table_publishes_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.save(checkpoints.pi0_tree(layers=2), tmp_path / "1", quick=True)
    TABLE[fault](monkeypatch)
    with pytest.raises(ProofFailed) as failed:
        bridge.convert(source, tmp_path / "out", to="peft-adapter", lora_alpha=4.0)
    assert len(failed.value.problems) == count(failed.value, ": the output of ") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no weights": lambda directory: (directory / WEIGHTS).unlink(),
    "no config": lambda directory: (directory / CONFIG).unlink(),
    "weights cut short": lambda directory: (directory / WEIGHTS).write_bytes(
        (directory / WEIGHTS).read_bytes()[:-100]
    ),
    "a config cut short": lambda directory: (directory / CONFIG).write_text(
        (directory / CONFIG).read_text()[:-20]
    ),
    "a config that is a list": lambda directory: (directory / CONFIG).write_text("[]"),
    "an empty file of weights": lambda directory: (directory / WEIGHTS).write_bytes(b""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_proof_rejects_damage(folded: Written, name: str, tmp_path: Path) -> None:
    shutil.copytree(folded.directory, tmp_path / "adapter")
    DAMAGE[name](tmp_path / "adapter")
    rejected(tmp_path / "adapter", folded.plan)


def test_proof_accepts_the_adapter_itself(folded: Written, kept: Written, record_property: Any) -> None:
    for written in (folded, kept):
        proof = prove(written.directory, written.plan)
        assert len(proof.errors) == len(proof.outputs) == 2 * 2 * 7
        record_property("error of the worst module, by the proof", proof.largest)
        print(f"{len(proof.errors)} modules, worst {proof.largest:.2g}")
        assert proof.largest <= 1e-7
        assert max(proof.outputs.values()) <= 1e-6


def test_proof_accepts_what_safetensors_writes(folded: Written, tmp_path: Path) -> None:
    """The same tensors by another writer, its header in another order."""
    shutil.copytree(folded.directory, tmp_path / "adapter")
    folded.files().write(tmp_path / "adapter")
    prove(tmp_path / "adapter", folded.plan)


def test_proof_says_everything_at_once(folded: Written, tmp_path: Path) -> None:
    def spoil(files: Files) -> None:
        for name in ("gate_proj", "down_proj"):
            files.tensors[f"{LAYER}.mlp.{name}{B}"].zero_()
        files.swap(f"{EXPERT}.self_attn.k_proj", f"{EXPERT}.self_attn.v_proj")
        base_key(files)

    said = str(rejected(folded.spoilt(spoil, tmp_path / "adapter"), folded.plan))
    for part in (f"{LANGUAGE}.layers.0.mlp.gate_proj", "mlp.down_proj", "k_proj", "v_proj", "embed_tokens"):
        assert part in said, part


# Faults of the writer itself: nothing is published.


def wrong_fold(self: factor_writers.AdapterWriter, index: Any, change: Any) -> Any:
    a, b = MATRICES(self, index, change)
    return a, b * b.dtype.type(change.scale)


def wrong_heads(self: factor_writers.AdapterWriter, index: Any, change: Any) -> Any:
    a, b = MATRICES(self, index, change)
    return (a, b[::-1].copy()) if change.axes.summed else (a, b)


def wrong_layer(self: factor_writers.AdapterWriter, index: Any, change: Any) -> Any:
    a, b = MATRICES(self, index, change)
    return (a, b) if index[0] == 0 else (np.zeros_like(a), b)


def half_precision(self: factor_writers.AdapterWriter, index: Any, change: Any) -> Any:
    a, b = MATRICES(self, index, change)
    return a.astype(np.float16).astype(a.dtype), b


MATRICES = factor_writers.AdapterWriter.matrices
FAULTS = {
    "scale folded twice": wrong_fold,
    "o_proj reversed": wrong_heads,
    "a layer lost": wrong_layer,
    "rounded on the way": half_precision,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_writer_publishes_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.save(checkpoints.pi0_tree(layers=2), tmp_path / "1", quick=True)
    monkeypatch.setattr(factor_writers.AdapterWriter, "matrices", FAULTS[fault])
    options: dict[str, Any] = {"to": "peft-adapter", "lora_alpha": {"paligemma": 10.0, "expert": 4.5}}
    with pytest.raises(ProofFailed):
        bridge.convert(source, tmp_path / "made" / "out", with_base=True, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    monkeypatch.undo()
    bridge.convert(source, tmp_path / "made" / "out", **options)
    before = golden.files(tmp_path / "made")
    monkeypatch.setattr(factor_writers.AdapterWriter, "matrices", FAULTS[fault])
    with pytest.raises(ProofFailed):
        bridge.convert(source, tmp_path / "made" / "out", overwrite=True, **options)
    assert golden.files(tmp_path / "made") == before


def test_a_faulty_config_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alpha left at PEFT's own default."""
    compose = to_adapter.compose_config

    def faulty(*args: Any) -> dict[str, Any]:
        config = compose(*args)
        del config["lora_alpha"]
        return config

    source = checkpoints.save(checkpoints.pi0_tree(layers=2), tmp_path / "1", quick=True)
    monkeypatch.setattr(to_adapter, "compose_config", faulty)
    with pytest.raises(ProofFailed, match="PEFT scales"):
        bridge.convert(source, tmp_path / "out", to="peft-adapter", lora_alpha=4.0)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# What a user sees of it.


def test_result_says_what_was_proven(tmp_path: Path) -> None:
    source = checkpoints.save(checkpoints.pi0_tree(layers=2), tmp_path / "1", quick=True)
    result = bridge.convert(source, tmp_path / "out", to="peft-adapter", lora_alpha=4.0)
    assert result.proof is not None
    assert len(result.proof.errors) == len(result.proof.outputs) == 2 * 2 * 7
    assert result.proof.peft == peft.__version__
    assert (
        str(result.proof)
        == f"PEFT {peft.__version__} loads 28 modules, largest error {result.proof.largest:.1e}"
    )
    assert 0 <= result.proof.importing < result.proof.seconds < result.seconds
    assert result.converting_seconds == result.seconds - result.proof.seconds
    other = bridge.convert(source, tmp_path / "base", to="torch-base")
    assert other.proof is None and other.converting_seconds == other.seconds
