"""Mistakes planted in real outputs: `bridge verify` must see each, and say first where it is.

Checksums have no part in it: a spoiled PyTorch file has a ``bridge.json`` that fits it, a spoiled
Orbax checkpoint has none. What one flipped bit can hide behind is measured at the end: in a weight
without LoRA nothing, the lowest bit is seen. A merged weight is a sum, and two float32 sums of the
same numbers may differ in their last bits: an entry is seen once it is off by more than 9 · 2⁻²³ of
the weight's largest entry, which in the largest entry itself is the fifth or sixth bit from below,
and in one a thousandth of its size the fifteenth or so. What is smaller, only the checksum sees.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from click.testing import CliRunner, Result

from bridge.cli.main import cli
from bridge.errors import CheckpointRefused
from bridge.proof.verify import verify as prove
from tests.kit import checkpoints, golden, mistakes
from tests.kit.checkpoints import Tree
from tests.kit.forms import Form, Forms
from tests.kit.golden import Golden, State
from tests.kit.mistakes import Folded

MISTAKES = mistakes.IN_MERGE | mistakes.IN_LEAVES
WEIGHTS, ADAPTER, CONFIG, RECORD = (
    "model.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "bridge.json",
)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forms]:
    home = tmp_path_factory.mktemp("forms")
    return {name: Forms(golden.golden(name), home) for name in golden.NAMES}


@dataclass(frozen=True)
class Said:
    """What the command said of two checkpoints."""

    code: int
    holds: bool
    causes: list[str]
    files: dict[str, bool]

    @property
    def named(self) -> set[str]:
        """The weights that the problems name."""
        return {cause.split(": ")[0] for cause in self.causes}


def verify(source: Golden, form: Form, *flags: str, alphas: bool = True) -> Said:
    """`bridge verify --json` of what openpi saved against a form of it."""
    run = invoke(source, form, *flags, alphas=alphas)
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    said = json.loads(run.stdout)
    return Said(run.exit_code, said["holds"], [each["cause"] for each in said["problems"]], said["files"])


def invoke(source: Golden, form: Form, *flags: str, alphas: bool = True) -> Result:
    given = [f"--lora-alpha={part}={alpha}" for part, alpha in source.options.get("lora_alpha", {}).items()]
    base = [f"--base={form.base}"] if form.base else []
    arguments = ["verify", "--json", *flags, *(given if alphas else []), *base, source.checkpoint, form.path]
    return CliRunner().invoke(cli, [str(each) for each in arguments])


# Planting.


def copy(form: Form, to: Path, change: Callable[[State, dict[str, Any]], None], file: str = WEIGHTS) -> Path:
    """A copy of an output with other tensors (and adapter config), and a record that fits them."""
    shutil.copytree(form.path, to)
    before, config = (
        safetensors.torch.load_file(to / file),
        json.loads((to / CONFIG).read_text()) if file == ADAPTER else {},
    )
    after = {name: tensor.clone() for name, tensor in before.items()}
    change(after, config)
    with safetensors.safe_open(to / file, "pt") as opened:
        metadata = opened.metadata()
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in after.items()}, to / file, metadata
    )
    if file == ADAPTER:
        (to / CONFIG).write_text(json.dumps(config))
    amend(to, after)
    return to


def amend(directory: Path, state: State | None = None) -> None:
    """Make the record say what is there."""
    record = json.loads((directory / RECORD).read_text())
    if state is not None:
        record["tensors"] = {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "checksum": xxhash.xxh3_128(golden.bits(tensor)).hexdigest(),
            }
            for name, tensor in state.items()
        }
    record["files"] = {
        name: xxhash.xxh3_128((directory / name).read_bytes()).hexdigest()
        for name in record["files"]
        if (directory / name).exists()
    }
    (directory / RECORD).write_text(json.dumps(record))


def spoiled(source: Golden, mistake: Callable[[Folded], None]) -> tuple[Folded, Folded, set[str]]:
    """The folded leaves as they should be, as the mistake leaves them, and the weights it makes wrong."""
    right, wrong = (mistakes.folded(source.leaves, source.scales) for _ in range(2))
    mistake(wrong)
    touched = golden.differing(golden.by_hand(right.tree), golden.by_hand(wrong.tree))
    assert touched, "nothing was planted"
    return right, wrong, touched


def in_torch(
    source: Golden, form: Form, to: Path, mistake: Callable[[Folded], None]
) -> tuple[Form, set[str]]:
    """A mistake in the tensors of a merged file: only entries that it changes are replaced."""
    right, wrong, touched = spoiled(source, mistake)
    good, bad = golden.by_hand(right.tree), golden.by_hand(wrong.tree)

    def change(state: State, config: dict[str, Any]) -> None:
        for name in touched:
            torch.testing.assert_close(state[name], good[name], rtol=1e-5, atol=1e-6)
            state[name] = torch.where(good[name] == bad[name], state[name], bad[name])

    return Form(copy(form, to, change)), touched


def in_orbax(
    source: Golden, form: Form, to: Path, mistake: Callable[[Folded], None]
) -> tuple[Form, set[str]]:
    """A mistake in the leaves of a folded checkpoint, which Orbax saves again."""
    right, wrong, touched = spoiled(source, mistake)
    tree = checkpoints.restore(form.path)
    for leaf, bad in wrong.tree.items():
        tree[leaf] = np.where(right.tree[leaf] == bad, tree[leaf], bad)
    return saved(tree, form, to), touched


def saved(tree: Tree, form: Form, to: Path) -> Form:
    checkpoints.save(tree, to, quick=True, assets=False)
    shutil.copytree(form.path / "assets", to / "assets")
    return Form(to)


def assert_seen(said: Said, touched: set[str]) -> None:
    """The verdict fails, first by a weight that is wrong, then by every other such, and by no other."""
    assert (said.code, said.holds) == (1, False)
    assert said.causes[0].split(": ")[0] in touched
    assert said.named == touched
    assert all(said.files.values()), "a checksum gave it away"


# Merged weights, PyTorch and Orbax.


def cases(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every mistake in a merge where there is one, every other in these checkpoints."""
    return [(mistake, name) for mistake in mistakes.IN_MERGE for name in golden.WITH_LORA] + [
        (mistake, name) for mistake in mistakes.IN_LEAVES for name in names
    ]


@pytest.mark.parametrize(("mistake", "name"), cases(("pi0_base", "pi05_lora")))
def test_seen_in_merged_tensors(mistake: str, name: str, forms: dict[str, Forms], tmp_path: Path) -> None:
    source = golden.golden(name)
    form, touched = in_torch(source, forms[name]["merged"], tmp_path / "out", MISTAKES[mistake])
    said = verify(source, form)
    assert said.files[str(form.path / RECORD)]
    assert_seen(said, touched)


@pytest.mark.parametrize(("mistake", "name"), cases(("pi0_lora",)))
def test_seen_in_folded_leaves(mistake: str, name: str, forms: dict[str, Forms], tmp_path: Path) -> None:
    source = golden.golden(name)
    form, touched = in_orbax(source, forms[name]["folded"], tmp_path / "100", MISTAKES[mistake])
    assert_seen(verify(source, form), touched)


def test_seen_where_a_merged_weight_is_square(tmp_path: Path) -> None:
    """Heads x dim is the width: the shape of a merged weight does not tell its transpose."""
    tree = checkpoints.pi0_tree(layers=2, width=77, expert_width=77)  # 7 heads x 11
    source = checkpoints.save(tree, tmp_path / "100", quick=True)
    golden.convert(source, tmp_path / "out", lora_alpha=2.0)
    touched = {
        f"{golden.EXPERTS[0][2]}.layers.1.self_attn.q_proj.weight",
        f"{golden.EXPERTS[1][2]}.layers.0.self_attn.o_proj.weight",
    }

    def change(state: State, config: dict[str, Any]) -> None:
        for name in touched:
            assert state[name].shape == (77, 77)
            state[name] = state[name].T

    spoiled = copy(Form(tmp_path / "out"), tmp_path / "spoiled", change)
    assert prove(source, tmp_path / "out").holds
    verdict = prove(source, spoiled)
    assert all(verdict.files.values())
    assert {problem.cause.split(": ")[0] for problem in verdict.problems} == touched


# Factors, PEFT's and openpi's.


@pytest.mark.parametrize("mistake", mistakes.IN_ADAPTER)
def test_seen_in_an_adapter(mistake: str, forms: dict[str, Forms], tmp_path: Path) -> None:
    source, (change, kind) = golden.golden("pi05_lora"), mistakes.IN_ADAPTER[mistake]
    form = forms["pi05_lora"]["adapter"]
    path = copy(form, tmp_path / "out", lambda state, config: change(state, config, source), ADAPTER)
    merged = golden.merged_names(source.leaves)
    touched = {weight for weight in merged if re.search(kind, weight)}
    said = verify(source, Form(path, form.base))
    assert said.files[str(path / RECORD)]
    assert_seen(said, touched)


def test_a_module_left_out_is_refused(forms: dict[str, Forms], tmp_path: Path) -> None:
    source, form = golden.golden("pi05_lora"), forms["pi05_lora"]["adapter"]
    change = mistakes.left_out(r"language_model\.layers\.1\.mlp\.up_proj")
    path = copy(form, tmp_path / "out", lambda state, config: change(state, config, source), ADAPTER)
    run = invoke(source, Form(path, form.base))
    assert isinstance(run.exception, CheckpointRefused)
    assert "language_model.layers.1.mlp.up_proj" in str(run.exception)


def test_seen_in_the_base_of_an_adapter(forms: dict[str, Forms], tmp_path: Path) -> None:
    """The adapter is right, and a square of the weights below it is transposed."""
    source, form = golden.golden("pi05_lora"), forms["pi05_lora"]["adapter"]

    def change(state: State, config: dict[str, Any]) -> None:
        state["time_mlp_out.weight"] = state["time_mlp_out.weight"].T

    assert form.base is not None
    base = copy(Form(form.base), tmp_path / "base", change)
    refused = invoke(source, Form(form.path, base))
    assert isinstance(refused.exception, CheckpointRefused)
    assert "1 of" in str(refused.exception) and "time_mlp_out.weight" in str(refused.exception)
    assert_seen(verify(source, Form(form.path, base), "--base-differs"), {"time_mlp_out.weight"})


@pytest.mark.parametrize("mistake", mistakes.IN_FACTORS)
def test_seen_in_joined_factors(mistake: str, forms: dict[str, Forms], tmp_path: Path) -> None:
    source, (leaf, change, kind) = golden.golden("pi0_lora"), mistakes.IN_FACTORS[mistake]
    form = forms["pi0_lora"]["joined"]
    tree = checkpoints.restore(form.path)
    tree[f"{golden.BLOCK}/{leaf}"] = np.ascontiguousarray(change(tree[f"{golden.BLOCK}/{leaf}"]))
    touched = {weight for weight in golden.merged_names(source.leaves) if re.search(kind, weight)}
    assert_seen(verify(source, saved(tree, form, tmp_path / "100")), touched)


# Norm stats.


# an adapter without any has its base's
@pytest.mark.parametrize(
    ("mistake", "form_name"),
    [
        *(("another number", form) for form in ("merged", "adapter", "folded")),
        ("missing", "merged"),
        ("missing", "folded"),
    ],
)
def test_wrong_norm_stats_are_seen(
    mistake: str, form_name: str, forms: dict[str, Forms], tmp_path: Path
) -> None:
    """With every weight right, the verdict fails by the file, and names it."""
    source, form = golden.golden("pi0_lora"), forms["pi0_lora"][form_name]
    path = tmp_path / "out"
    shutil.copytree(form.path, path)
    (stats,) = path.glob("assets/*/norm_stats.json")
    if mistake == "missing":
        stats.unlink()
    else:
        tree = json.loads(stats.read_text())
        tree["norm_stats"]["actions"]["q99"][-1] *= 1 + 1e-6
        stats.write_text(json.dumps(tree))
    amend(path)
    said = verify(source, Form(path, form.base))
    assert (said.code, said.holds) == (1, False)
    (cause,) = said.causes
    assert str(stats) in cause
    assert said.files[f"assets/{stats.parent.name}/norm_stats.json"] is False
    assert said.files[str(path / RECORD)], "the record gave it away"


# One bit.


At = tuple[int, ...]


def flip(form: Form, to: Path, bits: Mapping[str, tuple[int, At]]) -> Form:
    """A copy of an output with one bit of one entry of some weights flipped."""

    def change(state: State, config: dict[str, Any]) -> None:
        for weight, (number, at) in bits.items():
            state[weight] = golden.tensor(mistakes.bit(number, at)(state[weight].numpy()))

    return Form(copy(form, to, change))


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("pi0_base", f"{golden.EXPERTS[0][2]}.layers.1.self_attn.q_proj.weight"),
        ("pi0_base", f"{golden.EXPERTS[1][2]}.layers.0.input_layernorm.weight"),
        ("pi0_base", golden.LM_HEAD),
        ("pi0_lora", "state_proj.weight"),
        # stored as bfloat16, written as float32: a bit that no bfloat16 has
        ("pi05_lora", f"{golden.EXPERTS[1][2]}.layers.1.input_layernorm.dense.weight"),
    ],
)
def test_lowest_bit_is_seen_without_lora(
    name: str, weight: str, forms: dict[str, Forms], tmp_path: Path
) -> None:
    source, form = golden.golden(name), forms[name]["merged"]
    middle = tuple(size // 2 for size in golden.read(form.path)[weight].shape)
    assert_seen(verify(source, flip(form, tmp_path / "out", {weight: (0, middle)})), {weight})


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_bits_of_a_merged_weight_are_seen_down_to_rounding(
    size: float, forms: dict[str, Forms], tmp_path: Path
) -> None:
    """Every bit of a mantissa, each in a weight of its own, in an entry of this size beside the largest."""
    source, form = golden.golden("pi0_lora"), forms["pi0_lora"]["merged"]
    state = golden.read(form.path)
    bits: dict[str, tuple[int, At]] = {}
    changes: dict[str, float] = {}
    for number, weight in enumerate(sorted(golden.merged_names(source.leaves))[:23]):
        w = state[weight].numpy()
        largest = float(np.abs(w).max())
        at = np.unravel_index(np.abs(np.abs(w) - size * largest).argmin(), w.shape)
        bits[weight] = number, tuple(map(int, at))
        changes[weight] = abs(float(mistakes.bit(number, at)(w)[at]) - float(w[at])) / largest
    said = verify(source, flip(form, tmp_path / "out", bits))
    assert all(said.files.values())
    # the fold that they are held against may itself round differently from machine to machine
    assert said.named >= {weight for weight, change in changes.items() if change > 10 * 2.0**-23}
    assert said.named <= {weight for weight, change in changes.items() if change > 8 * 2.0**-23}
    lowest = min(bits[weight][0] for weight in said.named)
    assert lowest in ((3, 4, 5) if size == 1 else (12, 13, 14, 15)), lowest


def test_checksums_see_what_rounding_hides(forms: dict[str, Forms], tmp_path: Path) -> None:
    """The lowest bit of a merged weight: nothing that computes sees it, and the record does."""
    source, form = golden.golden("pi0_lora"), forms["pi0_lora"]["merged"]
    weight = f"{golden.EXPERTS[0][2]}.layers.2.mlp.up_proj.weight"
    spoiled = flip(form, tmp_path / "out", {weight: (0, (3, 5))})
    assert verify(source, spoiled).holds
    shutil.copy(form.path / RECORD, spoiled.path / RECORD)
    said = verify(source, spoiled)
    assert (said.code, said.holds, len(said.causes)) == (1, False, 1)
    assert weight in said.causes[0] and "checksum" in said.causes[0]
