"""Everything that is said of a family from outside is in its own words: none of another family's shows up.

The example plug-in, through its entry point, in every verb, card and refusal that a user of it can meet.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge
from bridge import Refusal
from tests.kit.checkpoints import Tree, save
from tests.kit.golden import ROOT
from tests.kit.plugins import registered

EXAMPLE = ROOT / "examples" / "own_adapter"

#: words of openpi's family, of its runtimes and of their modules; the package's own name is no family's
FOREIGN = re.compile(
    r"openpi(?!-bridge)|pi0|PI0Pytorch|paligemma|gemma|siglip|lerobot|transformers|\bexperts?\b|policy|policies"
    r"|horizon|norm.?stats|robot|vision|feed.?forward|[qkvo]_proj|(gate|up|down)_proj|attn|einsum",
    re.IGNORECASE,
)

LAYERS, HEADS, WIDTH, DIM, TOKENS, RANK, ALPHA = 2, 3, 13, 5, 11, 7, 6.0
SHAPES = {
    "embed": (TOKENS, WIDTH),
    "mix/w": (LAYERS, HEADS, WIDTH, DIM),
    "mix/lora_a": (LAYERS, HEADS, WIDTH, RANK),
    "mix/lora_b": (LAYERS, HEADS, RANK, DIM),
    "out/w": (LAYERS, HEADS, DIM, WIDTH),
    "out/lora_a": (LAYERS, HEADS, DIM, RANK),
    "out/lora_b": (LAYERS, HEADS, RANK, WIDTH),
}


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["bridge.adapters"].items()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        # beside the families that ship with bridge, as a user has it
        with registered([EntryPoint(name, value, "bridge.adapters")]):
            yield


def tree(*without: str) -> Tree:
    random = np.random.default_rng(3)
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {name: array for name, array in made.items() if name not in without}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("toy")
    save(tree(), home / "run", quick=True, assets=False)
    bridge.convert(home / "run", home / "adapter", to="peft-adapter", lora_alpha=ALPHA, with_base=True)
    shutil.copytree(home / "adapter", home / "alone", ignore=shutil.ignore_patterns("base"))
    bridge.convert(home / "run", home / "merged", to="torch-merged", lora_alpha=ALPHA)
    return home


def own(text: str, home: Path) -> str:
    """What is said, without the paths that the test itself named; it has no foreign word."""
    text = text.replace(str(home), "HOME")
    assert text.strip()
    assert not (found := FOREIGN.search(text)), (found, text)
    return text


def refused(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        call(*args, **options)
    return str(caught.value)


def test_the_words_looked_for_are_openpis(tmp_path: Path) -> None:
    """The same card of its family has them: the pattern can match."""
    sample = ROOT / "cli" / "sample" / "pi0_lora" / "checkpoint"
    bridge.convert(sample, tmp_path / "a", to="peft-adapter", lora_alpha={"paligemma": 8, "expert": 4})
    card = (tmp_path / "a" / "README.md").read_text()
    assert len(set(map(str.lower, FOREIGN.findall(card)))) >= 1
    assert FOREIGN.search(card)


def test_card(home: Path) -> None:
    card = own((home / "adapter" / "README.md").read_text(), home)
    assert "# LoRA adapter of a toy model" in card
    assert f"| body | {RANK} | 6 | {ALPHA / RANK:g} |" in card
    assert "The scale of toy is folded into `lora_B`" in card
    assert "In PEFT, `mix` has the rank times the number of heads" in card


def test_card_without_a_base_and_with_kept_alpha(home: Path, tmp_path: Path) -> None:
    bridge.convert(home / "run", tmp_path / "a", to="peft-adapter", lora_alpha=ALPHA, keep_alpha=True)
    card = own((tmp_path / "a" / "README.md").read_text(), home)
    assert "Factors are as toy trained them" in card
    assert "Apply it to the base it was trained on." in card


def test_other_files(home: Path) -> None:
    """No config of another family's loader, and no folder of its assets."""
    for directory in ("adapter", "adapter/base", "merged"):
        files = {
            str(path.relative_to(home / directory))
            for path in (home / directory).rglob("*")
            if path.is_file()
        }
        assert not any("config.json" in name and "adapter_config" not in name for name in files)
        assert not any("assets" in name or "policy" in name for name in files)
        own((home / directory / "bridge.json").read_text().replace("openpi-bridge", ""), home)
    own(json.dumps(json.loads((home / "adapter" / "adapter_config.json").read_text())), home)


@pytest.mark.parametrize(
    ("src", "to", "options"),
    [
        ("run", "torch-merged", {"lora_alpha": ALPHA}),
        ("run", "torch-merged", {"lora_alpha": ALPHA, "dtype": "bfloat16"}),
        ("run", "torch-base", {}),
        ("run", "peft-adapter", {"lora_alpha": ALPHA}),
        ("run", "peft-adapter", {"lora_alpha": ALPHA, "rank": 2}),
        ("run", "peft-adapter", {"lora_alpha": ALPHA, "base": "merged"}),
        ("merged", "orbax", {}),
        ("adapter", "orbax", {"base": "adapter/base"}),
        ("adapter", "torch-merged", {"base": "adapter/base"}),
    ],
)
def test_plans(home: Path, src: str, to: str, options: dict[str, Any]) -> None:
    given = {name: home / value if name == "base" else value for name, value in options.items()}
    text = own(str(bridge.plan(home / src, home / "planned", to=to, **given)), home)
    assert "model toy" in text and "layout plain" in text


@pytest.mark.parametrize(
    ("src", "to", "options", "says"),
    [
        ("run", "torch-merged", {}, "body has LoRA of rank 7 with unknown alpha"),
        ("run", "torch-merged", {"lora_alpha": {"expert_": 3}}, "names expert_, but scaled LoRA factors are in body"),
        ("run", "torch-merged", {"lora_alpha": ALPHA, "layout": "other"}, "toy has no layout other"),
        ("run", "torch-merged", {"lora_alpha": ALPHA, "lossy": True}, "--lossy has no effect"),
        ("run", "peft-adapter", {"lora_alpha": ALPHA, "modules_to_save": True}, "--modules-to-save needs the base"),
        ("alone", "torch-merged", {}, "which is not here"),
        ("adapter", "orbax", {"base": "adapter/base", "rank": {"nothing": 3}}, "--rank names nothing"),
        ("adapter", "orbax", {"base": "adapter/base", "rank": {"body": 3}, "lora_alpha": 5},
         "has 3 blocks of rank 7; toy's rank is 3"),
        ("adapter", "orbax", {"base": "adapter/base", "rank": {"body": 8}}, "the alpha toy will use is unknown"),
    ],
)  # fmt: skip
def test_refusals(home: Path, src: str, to: str, options: dict[str, Any], says: str) -> None:
    given = {name: home / value if name == "base" else value for name, value in options.items()}
    said = own(refused(bridge.plan, home / src, None, to=to, **given), home)
    assert says in said


def test_refusals_of_damaged_checkpoints(home: Path, tmp_path: Path) -> None:
    lost = save(tree("mix/lora_b"), tmp_path / "lost", quick=True, assets=False)
    assert "mix/lora_a is there, but its counterpart mix/lora_b is missing" in own(
        refused(bridge.plan, lost, None, to="torch-merged"), tmp_path
    )
    half = save(tree("mix/lora_a", "mix/lora_b"), tmp_path / "half", quick=True, assets=False)
    assert "toy gives factors to all of them or none" in own(
        refused(bridge.plan, half, None, to="torch-merged"), tmp_path
    )
    extra = save(tree() | {"gate": np.zeros(3, np.float32)}, tmp_path / "extra", quick=True, assets=False)
    assert "leaf gate is not part of toy" in own(
        refused(bridge.plan, extra, None, to="torch-merged"), tmp_path
    )
    wide = tree() | {"embed": np.zeros((TOKENS, WIDTH, 2), np.float32)}
    odd = save(wide, tmp_path / "odd", quick=True, assets=False)
    assert "this is not how toy stores toy" in own(
        refused(bridge.plan, odd, None, to="torch-merged"), tmp_path
    )
    nan = tree()
    nan["out/w"][1, 2, 3, 4] = np.nan
    diverged = save(nan, tmp_path / "nan", quick=True, assets=False)
    own(refused(bridge.convert, diverged, tmp_path / "out", to="torch-base"), tmp_path)


def test_sizes_that_tensors_do_not_tell(home: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(home / "merged", tmp_path / "bare")
    (tmp_path / "bare" / "bridge.json").unlink()
    said = own(refused(bridge.plan, tmp_path / "bare", None, to="orbax"), tmp_path)
    assert "cannot infer body.dim, body.head from tensor shapes" in said
    assert "put the config.json of the model beside them" in said


def test_other_verbs(home: Path) -> None:
    base = home / "adapter" / "base"
    verdict = bridge.verify(home / "run", home / "adapter", base=base)
    assert verdict.holds
    own(json.dumps(verdict.as_json()), home)
    wrong = bridge.verify(home / "merged", base)
    assert not wrong.holds
    own("\n".join(map(str, wrong.problems)), home)
    own(refused(bridge.verify, home / "run", home / "alone"), home)
    own(json.dumps(bridge.diff(base, home / "run", lora_alpha=ALPHA).as_json()), home)
    for path in (home / "run", home / "adapter", base):
        own(json.dumps(bridge.describe(path).as_json()), home)
    recording = home / "recording.npz"
    np.savez(recording, x=np.zeros(3))
    said = own(refused(bridge.verify, home / "run", home / "merged", reference=recording), home)
    assert "which no runtime here runs as a whole" in said


def test_its_readme_and_module_speak_of_a_family() -> None:
    readme = (EXAMPLE / "README.md").read_text()
    assert "family plug-in" in readme
    module = (EXAMPLE / "toy_adapter.py").read_text()
    assert "Family(" in module and "Factoring(" in module and "Adapter(" not in module
