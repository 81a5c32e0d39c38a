"""Every option of a conversion is one declaration: a flag, a keyword, a refusal where it has no effect."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from click.testing import CliRunner

import bridge
from bridge import (
    Family,
    Model,
    Number,
    Option,
    Options,
    Part,
    Rule,
    SourceOptions,
    State,
    VerifyOptions,
    plugins,
)
from bridge.arrays import WEIGHT_DTYPES
from bridge.cli.main import cli
from bridge.cli.options import options as click_options
from bridge.conversion.converters import converters
from bridge.conversion.settings import family_options, read_options
from bridge.errors import PluginRefused
from bridge.graph import Form
from bridge.rules.family import families
from bridge.rules.option import Choice, Flag, declared, flag
from tests.kit import checkpoints

OPENPI = next(family for family in families() if family.name == "openpi")
OWN = OPENPI.options
ALL = {**declared(Options), **OWN}

#: a value of each option that some conversion refuses because it would have no effect
VALUES: dict[str, Any] = {
    "base": "elsewhere",
    "base_differs": True,
    "layout": "lerobot",
    "rank": 4,
    "keep_alpha": True,
    "with_base": True,
    "base_name": "lab/base",
    "modules_to_save": True,
    "fold": True,
    "lossy": True,
    "seed": 1,
    "value_suffix": True,
    "action_dim": 9,
}


def help_of(command: str) -> str:
    run = CliRunner().invoke(cli, [command, "--help"], catch_exceptions=False)
    assert run.exit_code == 0
    return run.stdout


@pytest.mark.parametrize("keyword", ALL)
def test_each_option_is_a_flag_with_help(keyword: str) -> None:
    shown = help_of("convert")
    line = next(line for line in shown.splitlines() if line.split()[:1] == [flag(keyword)])
    assert ALL[keyword].kind.metavar in line
    assert ALL[keyword].help.split()[0] in shown
    assert ALL[keyword].help[0].isupper() or keyword == "dtype"
    assert ALL[keyword].help.endswith(".")


@pytest.mark.parametrize("keyword", ALL)
def test_each_option_is_a_keyword(keyword: str) -> None:
    option = ALL[keyword]
    options = read_options({keyword: option.default})  # type: ignore[typeddict-item]
    assert {**options, **dict.fromkeys(OWN)}[keyword] == option.default


@pytest.mark.parametrize(("verb", "declares"), [("verify", VerifyOptions), ("diff", SourceOptions)])
def test_options_of_the_other_verbs(verb: str, declares: type) -> None:
    shown = {word for line in help_of(verb).splitlines() for word in line.split()[:1]}
    assert {flag(keyword) for keyword in declared(declares)} <= shown


def test_verbs_take_what_is_declared() -> None:
    """No keyword of an option stands in a signature: a type checker reads them from the declaration."""
    for verb, declares in (
        (bridge.plan, "Options"),
        (bridge.convert, "Options"),
        (bridge.load_jax, "Options"),
        (bridge.load_nnx, "Options"),
        (bridge.load_torch, "Options"),
        (bridge.verify, "VerifyOptions"),
        (bridge.diff, "SourceOptions"),
    ):
        parameters = inspect.signature(verb).parameters
        assert parameters["options"].annotation == f"Unpack[{declares}]"
        assert not parameters.keys() & declared(Options).keys()


def test_every_option_that_may_have_no_effect_is_tried() -> None:
    edges = [(edge.source, edge.target) for edge in converters()]
    assert VALUES.keys() == {
        keyword for keyword, option in ALL.items() if not all(option.fits(*edge) for edge in edges)
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each state that something leads out of."""
    home = tmp_path_factory.mktemp("sources")
    lora = checkpoints.save(checkpoints.pi0_tree(layers=2), home / "lora", quick=True)
    base = checkpoints.save(checkpoints.pi0_tree(lora={}, layers=2), home / "plain", quick=True)
    bridge.convert(base, home / "merged", to="torch-merged")
    bridge.convert(lora, home / "adapter", to="peft-adapter", lora_alpha=4.0)
    return {
        "orbax[base+lora]": lora,
        "orbax[base]": base,
        "torch-merged[base]": home / "merged",
        "torch-base[base]": home / "merged",
        "peft-adapter[lora]": home / "adapter",
    }


@pytest.mark.parametrize("keyword", VALUES)
def test_an_option_without_effect_is_refused(keyword: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """By every converter that it has no effect on, with the flag in the cause and in the fix."""
    tried = 0
    for edge in converters():
        # what is asked for by --fold is another target
        if ALL[keyword].fits(edge.source, edge.target) or (keyword == "fold" and edge.name == "join"):
            continue
        given = {keyword: VALUES[keyword] if keyword != "base" else sources["orbax[base]"]}
        needed: dict[str, Any] = {"base": sources["orbax[base]"]} if edge.needs else {}
        if edge.name == "fold" and edge.target.form is Form.PYTREE:
            needed["fold"] = True
        with pytest.raises(bridge.Refusal, match=f"{flag(keyword)} has no effect") as refused:
            bridge.plan(sources[str(edge.source)], tmp_path / "out", to=edge.target.name, **needed, **given)
        problem = next(each for each in refused.value.problems if "no effect" in each.cause)
        assert problem.fix == f"leave {flag(keyword)} out"
        tried += 1
    assert tried


def test_a_refusal_says_what_the_option_has_no_effect_on(sources: dict[str, Path]) -> None:
    """With --to where it has none with it at all, and the route where it depends."""
    with pytest.raises(bridge.Refusal, match=r"^--layout has no effect with --to orbax\n"):
        bridge.plan(sources["torch-merged[base]"], None, to="orbax", layout="openpi")
    with pytest.raises(
        bridge.Refusal, match=r"^--rank has no effect from torch-merged\[base\] to orbax\[base\]\n"
    ):
        bridge.plan(sources["torch-merged[base]"], None, to="orbax", rank=4)


def test_the_first_layout_is_the_default(sources: dict[str, Path]) -> None:
    plan = bridge.plan(sources["orbax[base]"], None, to="torch-merged")
    assert plan.layout == plan.inputs.model.layouts[0]
    assert plan.options["layout"] is None


def test_dtypes_are_those_of_weights() -> None:
    kind = declared(Options)["dtype"].kind
    assert isinstance(kind, Choice)
    assert set(kind.words) == {"keep", *WEIGHT_DTYPES}


def test_keywords_are_checked_before_anything_is_read() -> None:
    for verb in (bridge.plan, bridge.convert):
        with pytest.raises(TypeError, match="'keep_alfa' is not an option; did you mean 'keep_alpha'"):
            verb("nowhere", "out", to="orbax", keep_alfa=True)
        with pytest.raises(TypeError, match="rank must be a positive whole number"):
            verb("nowhere", "out", to="orbax", rank="4")
    with pytest.raises(TypeError, match="'lora_alfa' is not an option; did you mean 'lora_alpha'"):
        bridge.verify("a", "b", lora_alfa=4)
    with pytest.raises(TypeError, match="'only' is not an option"):
        bridge.diff("a", "b", only="changed")
    with pytest.raises(bridge.Refusal, match=r"--seed is 0.5\n.*give a whole number"):
        bridge.verify("a", "b", seed=0.5)


# A new option is one more field.


class MoreOptions(Options, total=False):
    """What a fork would declare."""

    sprinkle: Annotated[
        int | None, Option(kind=Number("GRAMS"), group="Topping", help="Sugar on top.", aliases=("--dust",))
    ]
    glaze: Annotated[bool, Option(kind=Flag(), group="Topping", help="Shiny.")]


def test_a_new_option_is_one_field() -> None:
    import click

    from bridge.cli.options import Command

    given: dict[str, Any] = {}

    @click.command(cls=Command)
    @click_options(MoreOptions)
    def bake(**options: Any) -> None:
        given.update(options)

    run = CliRunner().invoke(
        bake, ["--sprinkle", "5", "--glaze", "--rank", "expert=8", "--rank", "paligemma=4"]
    )
    assert run.exit_code == 0, run.output
    assert given == {
        **{keyword: option.default for keyword, option in declared(Options).items()},
        "sprinkle": 5,
        "glaze": True,
        "rank": {"expert": 8, "paligemma": 4},
    }
    assert CliRunner().invoke(bake, ["--dust", "7"]).exit_code == 0 and given["sprinkle"] == 7
    shown = CliRunner().invoke(bake, ["--help"]).output
    assert "Topping:\n  --sprinkle GRAMS " in shown and "Sugar on top." in shown and "--dust" not in shown
    refused = CliRunner().invoke(bake, ["--sprinkle", "0"])
    assert refused.exit_code == 2 and "0 is not a positive whole number" in refused.output


# Options of families.


def has_config(source: State, target: State) -> bool:
    return target.format != "orbax"


TOY = Family(
    name="toy",
    models=(
        Model(
            name="toy", parts=(Part("body", (Rule("embed", "embed.weight", "token width -> token width"),)),)
        ),
    ),
    options={"sugar": Option(kind=Number(), default=2, help="Lumps.", fits=has_config)},
)


class Registered(EntryPoint):
    """An entry point that is not of an installed package."""

    def load(self) -> Any:
        return {"toy": TOY, "same": replace(TOY, name="same"), "other": OTHER, "clash": CLASH}[self.value]


OTHER = replace(TOY, name="other", options={"sugar": Option(kind=Flag(), help="Any.")})
CLASH = replace(TOY, name="clash", options={"workers": Option(kind=Number(), help="Bees.")})


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install families beside those that are."""
    installed = plugins.entry_points

    def add(*names: str) -> None:
        more = tuple(Registered(name=name, value=name, group="bridge.adapters") for name in names)
        monkeypatch.setattr(
            plugins,
            "entry_points",
            lambda *, group: (*installed(group=group), *(more if group == "bridge.adapters" else ())),
        )
        plugins.load.cache_clear()

    yield add
    plugins.load.cache_clear()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    tree = {"embed": np.ones((5, 3), np.float32)}
    return checkpoints.save(tree, tmp_path / "toy", quick=True, assets=False)


def test_a_family_declares_its_own(register: Any, toy: Path, tmp_path: Path) -> None:
    assert "--sugar" not in help_of("convert")
    register("toy")
    shown = help_of("convert")
    assert "Models of toy:\n  --sugar N " in shown and "Lumps.  [default: 2]" in shown
    assert "Models of openpi and pi0_fast:\n  --action-horizon N " in shown
    for given in ({"sugar": 3}, {"settings": {"sugar": 3}}):
        plan = bridge.plan(toy, None, to="torch-merged", **given)
        assert plan.options["settings"] == {"sugar": 3}
    run = CliRunner().invoke(
        cli, ["convert", "--to", "torch-merged", "--sugar", "3", "--dry-run", str(toy), str(tmp_path / "out")]
    )
    assert run.exit_code == 0, run.output


def test_a_family_sees_its_settings(register: Any, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def companions(facts: bridge.Facts) -> bridge.Companions:
        seen.append(dict(facts.settings))
        return bridge.Companions({})

    monkeypatch.setattr(Registered, "load", lambda self: replace(TOY, companions=companions))
    register("toy")
    bridge.plan(toy, None, to="torch-merged")
    bridge.plan(toy, None, to="torch-merged", sugar=5)
    assert seen == [{"sugar": 2}, {"sugar": 5}]


def test_an_option_of_another_family_is_refused(register: Any, toy: Path, sources: dict[str, Path]) -> None:
    register("toy")
    with pytest.raises(
        bridge.Refusal,
        match=r"--action-horizon is an option of openpi and pi0_fast, and this is a checkpoint of toy\n.*leave --a",
    ):
        bridge.plan(toy, None, to="torch-merged", action_horizon=10)
    with pytest.raises(
        bridge.Refusal, match="--sugar is an option of toy, and this is a checkpoint of openpi"
    ):
        bridge.plan(sources["orbax[base]"], None, to="torch-merged", sugar=1)


def test_values_of_a_family_s_options_are_checked(register: Any, toy: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(bridge.Refusal, match=r"--action-horizon is 0\n.*give a positive whole number"):
        bridge.plan(sources["orbax[base]"], None, to="torch-merged", action_horizon=0)
    with pytest.raises(TypeError, match="action_horizon must be a positive whole number, not '10'"):
        bridge.plan(sources["orbax[base]"], None, to="torch-merged", settings={"action_horizon": "10"})
    with pytest.raises(TypeError, match="'action_horizn' is not an option; did you mean 'action_horizon'"):
        bridge.plan(sources["orbax[base]"], None, to="torch-merged", action_horizn=10)


def test_families_may_share_an_option(register: Any) -> None:
    register("toy", "same")
    assert [family.name for family in family_options()["sugar"][1]] == ["same", "toy"]
    assert "Models of same and toy:\n  --sugar N " in help_of("convert")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("toy", "other"), "other and toy|toy and other both declare --sugar"),
        (("clash",), "clash and bridge itself both declare --workers"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    register: Any, names: tuple[str, ...], says: str
) -> None:
    register(*names)
    with pytest.raises(PluginRefused, match=says):
        family_options()
