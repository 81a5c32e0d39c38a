"""Rules and models: declarations that contradict themselves are refused where they are made."""

import pickle
from typing import Any

import pytest

from bridge.rules.factoring import Factoring
from bridge.rules.family import families
from bridge.rules.model import Model, Multiple, Part, Unused
from bridge.rules.rule import Rule

LORA = Factoring(leaf="/w", a="/lora_a", b="/lora_b", rank="rank", scaled=True)
FEED_FORWARD = Factoring(leaf="", a="_lora_a", b="_lora_b", rank="ffn_rank", scaled=False)
Q = Rule("attn/q/w", "layers.{layer}.q.weight", "layer head in dim -> (head dim) in", LORA)


@pytest.mark.parametrize(
    ("leaf", "weight", "axes", "lora", "cause"),
    [
        ("a", "a.weight", "layer x -> x", None, "needs \\['layer'\\]"),
        ("a", "a.{layer}.weight", "x -> x", None, "has placeholders \\['layer'\\]"),
        ("a", "a.{layer}.{layer}", "layer x -> x", None, "has placeholders"),
        ("a", "a.{layer}.w", "block x -> x", None, "needs \\['block'\\]"),
        ("a", "a{layer}.w", "layer x -> x", None, "whole segment"),
        ("a_{layer}", "a", "x -> x", None, "'x -> x' and the path need \\['layer'\\]"),
        ("a_{kv:k|v}", "a.{kv}", "x -> x", None, "a placeholder of a path is a number"),
        ("a_{layer}", "a.{layer}.{layer}", "layer x -> x", None, "has placeholders"),
        ("a", "a", "x y -> y y", None, "twice"),
        ("a", "a", "x y", None, "expected one '->'"),
        ("q/kernel", "q", "in out -> out in", LORA, "factors replace '/w'"),
        ("q/w", "q", "rank out -> out rank", LORA, "'rank' is an axis of the leaf itself"),
        ("q/w", "q", "out in -> out in", LORA, "not input x output"),
        ("q/w", "q", "x -> x", LORA, "matrices"),
    ],
)
def test_rules_refused(leaf: str, weight: str, axes: str, lora: Factoring | None, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Rule(leaf, weight, axes, lora)


def test_factor_leaves() -> None:
    assert Q.factor_leaves == ("attn/q/lora_a", "attn/q/lora_b")
    linear = Rule("mlp/linear", "down.{layer}.weight", "layer hidden out -> out hidden", FEED_FORWARD)
    assert linear.factor_leaves == ("mlp/linear_lora_a", "mlp/linear_lora_b")
    assert Rule("b", "b", "x -> x").factor_leaves is None


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"parts": (Part("p", (Q,)), Part("p", ()))}, "part declared twice: p"),
        ({"parts": (Part("p", (Q,)), Part("r", (Q,)))}, "leaf declared twice: attn/q/lora_a"),
        (
            {"parts": (Part("p", (Rule("a", "w", "x -> x"), Rule("b", "w", "x -> x"))),)},
            "weight declared twice: w",
        ),
        (
            {"parts": (Part("p", (Rule("a", "w", "x -> x"),)),), "unused": (Unused("w", ("p.x",), "none"),)},
            "weight declared twice: w",
        ),
        ({"parts": (Part("p", (Q,)),), "same": (("p.in", "p.nothing"),)}, "no rule has the axis p.nothing"),
        (
            {"parts": (Part("p", (Q,)),), "multiples": (Multiple("p.in", 2, "q.in"),)},
            "no rule has the axis q.in",
        ),
    ],
)
def test_models_refused(fields: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Model(name="m", **fields)


def test_a_leaf_cannot_be_another_rules_factor() -> None:
    with pytest.raises(ValueError, match="leaf declared twice"):
        Model(name="m", parts=(Part("p", (Q, Rule("attn/q/lora_a", "x", "in out -> out in"))),))


def test_every_installed_rule_can_be_pickled_and_used_after() -> None:
    for family in families():
        for model in family.models:
            for rule in model.rules:
                _ = rule.equation, rule.template, rule.factor_leaves
                again = pickle.loads(pickle.dumps(rule))
                assert again == rule and again.equation == rule.equation


def test_no_two_rules_of_a_model_write_one_name() -> None:
    for family in families():
        for model in family.models:
            for layout in model.layouts:
                forms = [
                    tuple(
                        layout.rename(
                            rule.template.format({**dict.fromkeys(rule.template.numbered, 0), **chosen})
                        )
                    )
                    for rule in model.rules
                    for _, chosen in rule.template.forms()
                ]
                assert len(set(forms)) == len(forms)
