"""Steps for equations that no openpi leaf has and a plug-in's may: each number lands where the equation says."""

import numpy as np
import pytest

from bridge.arrays import FLOAT32, Spec
from bridge.rules.equation import Equation
from bridge.rules.factoring import Factoring
from bridge.rules.rule import Rule
from bridge.stream.readers import LeafFactors, LeafWeights
from bridge.stream.step import Step, run_step
from bridge.stream.writers import TensorWriter
from tests.kit.algebra import openpi_change
from tests.kit.memory import Arrays, Kept

LORA_AXES = (
    "layer head in dim -> (head dim) in",
    "layer head dim out -> out (head dim)",
    "in out -> out in",  # one matrix, no layers
    "head dim out -> out (head dim)",
    "head in dim -> (head dim) in",
    "head layer in dim -> (head dim) in",  # layers are not first
)


def step(rule: Rule, source: Arrays, writer: TensorWriter, factors: LeafFactors | None = None) -> Step:
    """A step that takes the weights of the leaf ``w`` to a state_dict."""
    return Step(
        rule=rule,
        part="p",
        weights=LeafWeights("source", "w"),
        factors=factors,
        writer=writer,
        leaf_spec=source.specs["w"],
        bytes_read=0,
        memory=0,
    )


@pytest.mark.parametrize(
    ("axes", "folded"),
    [
        *((axes, folded) for axes in LORA_AXES for folded in (False, True)),
        ("in kv out -> out in", False),
        ("1 token width -> token width", False),
    ],
)
def test_a_step_writes_what_its_equation_says(axes: str, folded: bool) -> None:
    equation = Equation.parse(axes)
    sizes = dict(zip(equation.left, (3, 5, 2, 7), strict=False))
    rank = 4
    generator = np.random.default_rng(5)
    *shared, inner, outer = equation.leaf_shape(sizes)
    arrays = {
        "w": generator.standard_normal((*shared, inner, outer)).astype(np.float32),
        "a": generator.standard_normal((*shared, inner, rank)).astype(np.float32),
        "b": generator.standard_normal((*shared, rank, outer)).astype(np.float32),
    }
    name = ".".join(["w", *(f"{{{axis}}}" for axis in equation.placeholders)])
    lora = Factoring(leaf="w", a="a", b="b", rank="rank", scaled=True) if folded else None
    rule = Rule("w", name, axes, lora)
    expected = arrays["w"]
    if folded:
        expected = expected + np.float32(0.5) * openpi_change(equation, arrays["a"], arrays["b"])
    weights = {
        index: (rule.template.format(dict(zip(equation.placeholders, index, strict=True))),)
        for index, _ in equation.slices(expected)
    }
    source = Arrays(arrays)
    spec = Spec(equation.weight_shape(sizes), FLOAT32)
    factors = LeafFactors("source", "a", "b", 0.5) if folded else None
    writer = TensorWriter(weights, spec)
    task = step(rule, source, writer, factors)
    sink = Kept({name: spec for (name,) in weights.values()})
    done = run_step(task, {"source": source}, sink)
    for index, part in equation.slices(expected):
        np.testing.assert_allclose(
            sink.arrays[weights[index][0]], equation.arrange(part), rtol=1e-5, atol=1e-5
        )
    assert done.problems == [] and set(done.read) == set(task.reads) and set(done.written) == set(sink.arrays)


def test_a_leaf_that_streams_by_rows_and_has_other_placeholders() -> None:
    """Rows and placeholders at once: whether it streams or not, every weight must be whole."""
    equation = Equation.parse("vocab kv width -> vocab width")
    leaf = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    rule = Rule("w", "w.{kv}", str(equation))
    weights = {(kv,): (f"w.{kv}",) for kv in range(2)}
    spec = Spec((5, 3), FLOAT32)
    source, sink = Arrays({"w": leaf}), Kept({"w.0": spec, "w.1": spec})
    writer = TensorWriter(weights, spec)
    task = step(rule, source, writer)
    run_step(task, {"source": source}, sink)
    for kv in range(2):
        np.testing.assert_array_equal(sink.arrays[f"w.{kv}"], leaf[:, kv])
