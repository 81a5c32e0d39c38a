"""The directories people have at hand: runs, steps, links and a hub's cache, each read and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

import bridge
from bridge import SourceRefused
from bridge.checkpoint.open import open_source
from tests.kit import trainers
from tests.kit.trainers import Tensors

MODULE = "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return trainers.policy(tmp_path_factory.mktemp("plain"), "lerobot")


@pytest.fixture(scope="module")
def adapter(plain: Tensors) -> Tensors:
    a, b = trainers.factors(plain, MODULE, 2)
    return {f"base_model.model.{MODULE}.lora_{x}.weight": m for x, m in (("A", a), ("B", b))}


def lerobot_run(home: Path, plain: Tensors, adapter: Tensors | None = None) -> Path:
    """outputs/train/X as lerobot-train leaves it: two steps, the first without weights, and a link."""
    run = home / "outputs" / "train" / "X"
    for number, name in enumerate(("000002", "000003"), 2):
        step = run / "checkpoints" / name
        (step / "training_state").mkdir(parents=True)
        (step / "training_state" / "training_step.json").write_text(json.dumps({"step": number}))
        inner = step / "pretrained_model"
        marked = {**plain, "model.action_out_proj.bias": plain["model.action_out_proj.bias"] + number}
        trainers.save(marked, inner)
        (inner / "config.json").write_text('{"type": "pi0"}')
        if adapter is not None:
            (inner / "model.safetensors").unlink()
            save_file(adapter, inner / "adapter_model.safetensors")
            config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [MODULE]}
            (inner / "adapter_config.json").write_text(json.dumps(config))
    (run / "checkpoints" / "last").symlink_to("000003")
    return run


@pytest.mark.parametrize(
    ("below", "note"),
    [
        ("", "using 000003/pretrained_model, the newest of 2 in"),
        ("checkpoints", "using 000003/pretrained_model, the newest of 2 in"),
        ("checkpoints/000003", "using pretrained_model of"),
        ("checkpoints/last", "using pretrained_model of"),
        ("checkpoints/last/pretrained_model", ""),
    ],
)
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_run_of_lerobot(
    tmp_path: Path, plain: Tensors, adapter: Tensors, below: str, note: str, kind: str
) -> None:
    run = lerobot_run(tmp_path, plain, adapter if kind == "adapter" else None)
    described = bridge.describe(run / below)
    assert described.state == ("torch-merged[base]" if kind == "full" else "peft-adapter[lora]")
    assert Path(described.path) == run / (
        below
        if below.endswith("_model")
        else f"checkpoints/{'last' if 'last' in below else '000003'}/pretrained_model"
    )
    chosen = [each for each in described.notes if each.startswith("using")]
    assert [each[: len(note)] for each in chosen] == ([note] if note else [])


def test_the_newest_step_is_converted_and_the_plan_says_which(tmp_path: Path, plain: Tensors) -> None:
    run = lerobot_run(tmp_path, plain)
    (run / "checkpoints" / "000004" / "training_state").mkdir(parents=True)
    plan = bridge.plan(run, tmp_path / "out", to="orbax", size=trainers.SIZES)
    (note,) = (note for note in plan.notes if note.startswith("using"))
    assert note == (
        f"using 000003/pretrained_model, the newest of 2 in {run / 'checkpoints'} (without weights: 000004)"
    )
    plan.run()
    with bridge.open(tmp_path / "out") as opened:
        bias = opened.read("params/action_out_proj/bias")
    assert bias.tobytes() == (plain["model.action_out_proj.bias"] + 3).tobytes()


def test_an_adapter_of_a_run_meets_the_base_of_another(
    tmp_path: Path, plain: Tensors, adapter: Tensors
) -> None:
    base = lerobot_run(tmp_path / "base", plain)
    run = lerobot_run(tmp_path / "run", plain, adapter)
    plan = bridge.plan(run, tmp_path / "out", to="torch-merged", base=base)
    assert sum("the newest of 2" in note for note in plan.notes) == 2
    assert any(note.startswith("base: using 000003/pretrained_model") for note in plan.notes)


def test_a_run_of_train_pytorch(tmp_path: Path, plain: Tensors) -> None:
    run = tmp_path / "run"
    for number in (2, 3, 10):
        step = trainers.save(plain, run / str(number))
        for name in ("optimizer.pt", "metadata.pt"):
            (step / name).write_bytes(b"PK\x03\x04")
    (run / "tmp_11").mkdir()
    save_file(plain, run / "tmp_11" / "model.safetensors")
    (run / "wandb_id.txt").write_text("x")
    source = open_source(run)
    assert source.location.name == "10"
    assert source.notes == (f"using 10, the newest of 3 in {run}",)
    assert open_source(run / "2").notes == ()


def test_several_runs_are_no_steps(tmp_path: Path, plain: Tensors) -> None:
    for number in (1, 2):
        trainers.save(plain, tmp_path / "runs" / f"run_{number}")
    with pytest.raises(SourceRefused, match=r"runs is not a checkpoint .*\(contains run_1, run_2\)"):
        open_source(tmp_path / "runs")
    trainers.save(plain, tmp_path / "hf" / "checkpoint-500")
    assert open_source(tmp_path / "hf").notes == (
        f"using checkpoint-500, the newest of 1 in {tmp_path / 'hf'}",
    )


def hub_cache(home: Path, plain: Tensors, ref: str | None = "b" * 40) -> Path:
    """A repository's folder as huggingface_hub makes it: snapshots of links into blobs."""
    repository = home / "models--lerobot--pi0_base"
    (repository / "blobs").mkdir(parents=True)
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name in ("model.safetensors", "config.json"):
            blob = repository / "blobs" / f"{number}{name.replace('.', '')}"
            if name == "config.json":
                blob.write_text('{"type": "pi0"}')
            else:
                bias = plain["model.action_out_proj.bias"] + number
                save_file({**plain, "model.action_out_proj.bias": bias}, blob)
            (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    if ref is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(ref)
    return repository


def test_a_repository_of_the_hub_s_cache(tmp_path: Path, plain: Tensors) -> None:
    repository = hub_cache(tmp_path, plain)
    found = trainers.leaves(repository, tmp_path / "out")
    assert (
        found["params/action_out_proj/bias"].tobytes() == (plain["model.action_out_proj.bias"] + 1).tobytes()
    )
    notes = bridge.plan(repository, None, to="orbax", size=trainers.SIZES).notes
    assert f"using snapshots/{'b' * 40}, the current snapshot of models--lerobot--pi0_base" in notes
    other = open_source(repository / "snapshots" / ("a" * 40))
    assert not other.notes
    # with one snapshot, nothing needs to say which
    shutil.rmtree(repository / "refs")
    shutil.rmtree(repository / "snapshots" / ("a" * 40))
    assert open_source(repository).location.name == "b" * 40


@pytest.mark.parametrize(
    ("ref", "cause"),
    [(None, "main is missing; there are a{40}, b{40}"), ("c" * 40, "main names c{40}, which is not there")],
)
def test_a_cache_that_does_not_say_which_snapshot(
    tmp_path: Path, plain: Tensors, ref: str | None, cause: str
) -> None:
    repository = hub_cache(tmp_path, plain, ref)
    with pytest.raises(SourceRefused, match=cause) as refused:
        bridge.plan(repository, tmp_path / "out", to="orbax", size=trainers.SIZES)
    assert refused.value.problems[0].fix == f"give one of them: {repository / 'snapshots' / ('a' * 40)}"
    assert not (tmp_path / "out").exists()


def test_a_directory_without_weights_is_named_as_given(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "000003" / "training_state").mkdir(parents=True)
    with pytest.raises(
        SourceRefused, match=r"run is not a checkpoint bridge recognizes \(contains checkpoints\)"
    ):
        bridge.describe(tmp_path / "run")
