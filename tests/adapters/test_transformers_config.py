"""What bridge says of stock models and writes into ``config.json``, against transformers' own defaults.

transformers' ``PI0Config()`` is `lerobot/pi0_base`: its numbers are nobody's here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PaliGemmaConfig, PI0Config

import bridge
from bridge.adapters import lerobot
from tests.kit import checkpoints

#: fields that say how large a model is, or what it is stored in
SIZES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "projection_dim", "patch_size", "image_size", "image_token_id", "image_token_index",
    "max_state_dim", "max_action_dim", "chunk_size", "dtype", "architectures",
}  # fmt: skip


def fields(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from fields(value, f"{above}{name}.")
        else:
            yield above + name, value


def at(config: Any, field: str) -> Any:
    for name in field.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a policy whose every size is another (rotary needs an even head)."""
    home = tmp_path_factory.mktemp("config")
    tree = checkpoints.pi0_tree(lora={}, head_dim=12, expert_width=18)
    source = checkpoints.save(tree, home / "1", quick=True, assets=False)
    bridge.convert(source, home / "out", to="torch-merged", layout="transformers", action_horizon=43)
    config: dict[str, Any] = json.loads((home / "out" / "config.json").read_text())
    return config


def test_stock_sizes_are_those_of_transformers() -> None:
    own = PI0Config()
    text, vision, expert = own.vlm_config.text_config, own.vlm_config.vision_config, own.dit_config
    assert {
        "paligemma.width": text.hidden_size,
        "paligemma.hidden": text.intermediate_size,
        "paligemma.layer": text.num_hidden_layers,
        "paligemma.head": text.num_attention_heads,
        "paligemma.group": text.num_key_value_heads,
        "paligemma.dim": text.head_dim,
        "paligemma.vocab": text.vocab_size,
        "expert.width": expert.hidden_size,
        "expert.hidden": expert.intermediate_size,
        "siglip.width": vision.hidden_size,
        "siglip.layer": vision.num_hidden_layers,
        "siglip.hidden": vision.intermediate_size,
        "siglip.head": vision.num_attention_heads,
        "siglip.rows": vision.patch_size,
    } == lerobot.STOCK
    assert lerobot.DEFAULT_WIDTH == own.max_state_dim == own.max_action_dim


def test_what_no_size_decides_is_as_transformers_has_it(written: dict[str, Any]) -> None:
    """Attention both ways, activations, epsilons, rotary, sampling: whatever the sizes, those of `pi0_base`."""
    own = PI0Config()
    compared = {field: value for field, value in fields(written) if field.rpartition(".")[2] not in SIZES}
    assert len(compared) > 25 and "dit_config.use_bidirectional_attention" in compared
    assert compared == {field: at(own, field) for field in compared}


def test_sizes_are_read_as_they_were_written(written: dict[str, Any]) -> None:
    loaded = PI0Config(**json.loads(json.dumps(written)))
    read = {
        field: at(loaded, field) for field, _ in fields(written) if field not in ("dtype", "architectures")
    }
    assert read == {field: value for field, value in fields(written) if field in read}
    dims = {**checkpoints.DIMS, "head_dim": 12, "expert_width": 18}
    text, expert = written["vlm_config"]["text_config"], written["dit_config"]
    assert (text["hidden_size"], expert["hidden_size"]) == (dims["width"], dims["expert_width"])
    assert (text["intermediate_size"], expert["intermediate_size"]) == (dims["mlp"], dims["expert_mlp"])
    for config in (text, expert):
        assert (config["head_dim"], config["num_attention_heads"]) == (dims["head_dim"], dims["heads"])
        assert (config["num_hidden_layers"], config["vocab_size"]) == (dims["layers"], dims["vocab"])
    assert written["max_action_dim"] == dims["action_dim"] and written["chunk_size"] == 43


def test_pi0_fast_is_a_paligemma(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "data" / "golden" / "pi0_fast_lora" / "checkpoint"
    bridge.convert(golden, tmp_path / "out", to="torch-base")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    own = PaliGemmaConfig(text_config={"model_type": "gemma"})
    compared = {field: value for field, value in fields(made) if field.rpartition(".")[2] not in SIZES}
    assert len(compared) > 10
    # PaliGemmaConfig has no ids of its own; those of its tokenizer are openpi's
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    assert {field: value for field, value in compared.items() if field in ids} == ids
    assert {f: v for f, v in compared.items() if f not in ids} == {
        f: at(own, f) for f in compared if f not in ids
    }
