"""Sizes that shapes do not determine: asked for with the values that fit, given by flag or by config, and checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import bridge
from bridge import Refusal
from bridge.cli.main import cli
from tests.kit import trainers
from tests.kit.trainers import Tensors

#: transformers' spelling of the sizes of `checkpoints.DIMS`
CONFIG: dict[str, Any] = {
    "vlm_config": {
        "text_config": {
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "head_dim": 11,
            "hidden_size": 13,
        },
        "vision_config": {"num_attention_heads": 3},
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


@pytest.fixture(scope="module")
def plain(home: Path) -> Tensors:
    return trainers.policy(home, "lerobot")


@pytest.fixture(scope="module")
def source(home: Path, plain: Tensors) -> Path:
    return trainers.save(plain, home / "src")


@pytest.fixture(scope="module")
def recorded(home: Path, source: Path) -> Tensors:
    """The leaves, where bridge's own record beside the weights has the sizes."""
    return trainers.leaves(home / "lerobot", home / "recorded", size=None)


def test_what_is_missing_is_asked_for_with_the_values_that_fit(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        bridge.convert(source, tmp_path / "out", to="orbax")
    (problem,) = refused.value.problems
    unknown = "paligemma.dim, paligemma.group, paligemma.head, siglip.dim, siglip.head"
    assert problem.cause == f"{source}: cannot infer {unknown} from tensor shapes"
    # 7 heads of 11 share kv rows of 11: what divides 77 rows into heads must divide 11 rows as well
    assert problem.fix.startswith(
        "add --size paligemma.head=N (N 7 or 77) and --size siglip.head=N (N 1, 3, 5 or 15), or --config FILE"
    )
    assert not (tmp_path / "out").exists()
    (note,) = (note for note in bridge.describe(source).notes if note.startswith("shapes do not determine"))
    assert "--size paligemma.head=N (N 7 or 77)" in note


def test_the_flag_and_the_config_give_what_the_record_gives(
    source: Path, home: Path, recorded: Tensors, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert trainers.same(trainers.leaves(source, tmp_path / "flag"), recorded)
    by_config = trainers.leaves(source, tmp_path / "config", size=None, config=tmp_path / "config.json")
    assert trainers.same(by_config, recorded)
    # what the source has in both names is one size: the experts share their attention
    alias = {"expert.head": 7, "siglip.dim": 5}
    assert trainers.same(trainers.leaves(source, tmp_path / "alias", size=alias), recorded)
    record = json.loads((tmp_path / "flag" / "bridge.json").read_text())
    assert record["sizes"]["paligemma.dim"] == 11 and record["sizes"]["siglip.dim"] == 5


def test_a_config_that_the_shapes_rule_out_contradicts_no_record(
    home: Path, recorded: Tensors, tmp_path: Path
) -> None:
    copy = shutil.copytree(home / "lerobot", tmp_path / "src")
    (copy / "config.json").write_text('{"type": "pi0", "paligemma_variant": "gemma_2b"}')
    assert trainers.same(trainers.leaves(copy, tmp_path / "out", size=None), recorded)


@pytest.mark.parametrize(
    ("sizes", "cause", "fix"),
    [
        ({"paligemma.head": 5}, "--size paligemma.head=5, which the shapes do not allow",
         "give --size paligemma.head=N (N 7 or 77)"),
        ({"paligemma.dim": 7}, "--size paligemma.dim=7, which the shapes do not allow",
         "give --size paligemma.dim=N (N 1 or 11)"),
        ({"paligemma.head": 7, "paligemma.dim": 1},
         "--size and --config give paligemma.head 7, paligemma.dim 1, which the shapes do not allow together",
         "give --size paligemma.head=N (N 7 or 77) and --size siglip.head=N (N 1, 3, 5 or 15)"),
        ({"paligemma.heads": 7}, "--size names paligemma.heads, and pi0 has no such axis",
         "name one of paligemma.dim, paligemma.group, paligemma.head, siglip.dim, siglip.head"),
        ({"paligemma.width": 7}, "--size paligemma.width=7, but paligemma.width is 13 in the arrays of the checkpoint",
         "leave --size paligemma.width out: the shapes tell it"),
        ({"paligemma.head": 7, "expert.head": 77}, "--size gives paligemma.head twice: 7 and 77",
         "give one size for each axis"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(
    source: Path, tmp_path: Path, sizes: dict[str, int], cause: str, fix: str
) -> None:
    with pytest.raises(Refusal) as refused:
        bridge.convert(source, tmp_path / "out", to="orbax", size=sizes)
    assert (f"{source}: {cause}", fix) in [(each.cause, each.fix) for each in refused.value.problems]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (
            {"vlm_config": {"text_config": {"hidden_size": 2048}}},
            "paligemma.width is 2048, but 13 in the arrays",
        ),
        ({"type": "pi0", "paligemma_variant": "gemma_2b"}, "paligemma.hidden is 16384, but 19 in the arrays"),
        ({"architectures": []}, "tells no size of pi0"),
        ([], "is not a config"),
    ],
)
def test_a_config_of_another_model(source: Path, tmp_path: Path, config: Any, cause: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal) as refused:
        bridge.convert(source, tmp_path / "out", to="orbax", config=tmp_path / "config.json")
    assert any(cause in str(problem) for problem in refused.value.problems)
    assert not (tmp_path / "out").exists()


def test_every_command_takes_the_sizes(source: Path, home: Path, recorded: Tensors) -> None:
    flags = ["--size", "paligemma.head=7", "--size", "siglip.head=3"]

    def run(*arguments: str) -> str:
        ran = CliRunner().invoke(cli, [*arguments, *flags])
        assert ran.exit_code == 0, ran.output
        return ran.output

    described = json.loads(run("inspect", "--json", str(source)))
    parts = {part["name"]: part["sizes"] for part in described["parts"]}
    assert (parts["paligemma"]["head"], parts["paligemma"]["dim"], parts["siglip"]["head"]) == (7, 11, 3)
    assert "0 of 88 weights differ" in run("diff", str(source), str(home / "recorded"))
    assert "import -> orbax[base]" in run("convert", "--to", "orbax", "--dry-run", str(source), "unused")


def test_sizes_of_a_jax_checkpoint_are_checked_too(home: Path) -> None:
    problems = bridge.describe(home / "jax", size={"paligemma.head": 8}).problems
    assert problems == (
        f"{home / 'jax' / 'params'}: --size paligemma.head=8, but paligemma.head is 7 in the arrays of the checkpoint",
    )


# What lerobot-train saved, of sizes that LeRobot's code does not have: 8 heads of Gemma, 4 of SigLIP.

GOLDEN = {"paligemma.head": 8, "siglip.head": 4}
LAYERS = "PaliGemma/llm/layers/attn"
VISION = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0"


def run_of(name: str) -> Path:
    return Path(__file__).resolve().parents[1] / "data" / "golden" / "lerobot" / name


@pytest.mark.parametrize("name", ["full_pi0", "qv_pi0", "base_pi0"])
def test_head_counts_of_real_policies(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {}
    if name == "qv_pi0":
        options = {"base": run_of("base_pi0"), "rank": {"expert": 4}, "lora_alpha": {"expert": 8}}
    with pytest.raises(
        Refusal, match=r"cannot infer paligemma\.dim, paligemma\.group, paligemma\.head, siglip\.dim"
    ):
        bridge.plan(run_of(name), None, to="orbax", **options)
    found = trainers.leaves(run_of(name), tmp_path / "out", size=GOLDEN, **options)
    home = run_of("base_pi0" if name == "qv_pi0" else name)
    (file,) = home.rglob("model.safetensors")
    weights = load_file(file)
    gemma = "model.paligemma_with_expert.gemma_expert.model.layers.1.self_attn"
    query = weights[f"{gemma}.q_proj.weight"].reshape(8, 16, 48).transpose(0, 2, 1)
    key = weights[f"{gemma}.k_proj.weight"].reshape(1, 16, 48).transpose(0, 2, 1)
    assert found[f"params/{LAYERS}/q_einsum_1/w"][1].tobytes() == query.tobytes()
    assert found[f"params/{LAYERS}/kv_einsum_1/w"][1, 0].tobytes() == key.tobytes()
    tower = "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.1.self_attn"
    vision = weights[f"{tower}.q_proj.weight"].reshape(4, 18, 72).transpose(2, 0, 1)
    assert found[f"params/{VISION}/query/kernel"][1].tobytes() == vision.tobytes()
