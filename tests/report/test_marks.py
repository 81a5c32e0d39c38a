"""What is plotted is drawn: a mark for every value, of its colour and in its place."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from bridge.report import figures
from bridge.report.figures import BFLOAT16, BROKEN, FLOAT32, PlotScale

SCALE = PlotScale(-9, -1)
NAN, INF = float("nan"), float("inf")


def marks(svg: str) -> list[tuple[str, float, float]]:
    """Colour and position of every marker, in pixels."""
    found = []
    for use in re.findall(r"<use [^>]*>", svg):
        colour = re.search(r"fill: (#\w+)", use)
        x, y = (re.search(rf' {axis}="([-\d.]+)"', use) for axis in "xy")
        if colour is not None and x is not None and y is not None:
            found.append((colour[1], float(x[1]), float(y[1])))
    return found


def lines(svg: str, width: float) -> list[str]:
    """The paths of every line of a width."""
    drawn = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg)
    return [path for path, style in drawn if f"stroke-width: {width:g}" in style]


def test_a_strip_has_a_dot_for_every_layer_and_a_tick_for_every_tolerance() -> None:
    points = {
        "q_proj": [(FLOAT32, 1e-7), (FLOAT32, 3e-6), (BFLOAT16, 1e-3), (FLOAT32, NAN)],
        "down_proj": [(BFLOAT16, 2e-3), (BFLOAT16, 1e-2), (FLOAT32, INF), (FLOAT32, 1e-5)],
    }
    svg = figures.strips(points, {"q_proj": 2e-6, "down_proj": 5e-3}, SCALE, "errors")
    drawn = marks(svg)
    assert Counter(colour for colour, _, _ in drawn) == {FLOAT32: 3, BFLOAT16: 3}
    # from left to right by value, and in the row of the module
    right = sorted(drawn, key=lambda mark: mark[1])
    assert [colour for colour, _, _ in right] == [FLOAT32] * 3 + [BFLOAT16] * 3
    first = {y for colour, x, y in right if colour == FLOAT32}
    assert len(first) == 2 and len({y for colour, _, y in right if colour == BFLOAT16}) == 2
    # float32 above bfloat16 in each row, 20 pixels apart: 0.15 above, 0.15 below
    rows = {colour: sorted({y for each, _, y in drawn if each == colour}) for colour in (FLOAT32, BFLOAT16)}
    for above, below in zip(rows[FLOAT32], rows[BFLOAT16], strict=True):
        assert 5 < abs(below - above) < 7
    assert len(lines(svg, 1.6)) == 2


@pytest.mark.parametrize("values", [[1e-7, 1e-7, 3e-3], [0.0, NAN, 1e-4]])
def test_a_histogram_counts_what_is_positive_and_finite(values: list[float]) -> None:
    svg = figures.histogram(values, SCALE, FLOAT32, "gaps", [1e-6])
    bars = re.findall(r'<path d="([^"]*)"[^>]*style="fill: (#\w+)', svg)
    heights = [
        max(ys) - min(ys)
        for path, colour in bars
        if colour == FLOAT32 and (ys := [float(y) for _, y in re.findall(r"([-\d.]+) ([-\d.]+)", path)])
    ]
    counted = sorted(round(height, 3) for height in heights if height > 0)
    if len(values) == 3 and values[0] == values[1]:
        assert len(counted) == 2 and counted[1] == pytest.approx(2 * counted[0], rel=1e-3)
    else:
        assert len(counted) == 1
    assert "tolerance 1.0e-06" in svg


def test_a_heat_map_has_a_square_of_its_colour_for_every_cell() -> None:
    cells = {("q", 0): 1e-8, ("q", 1): NAN, ("v", 0): 1e-2, ("v", None): 0.0}
    svg = figures.heat_map(cells, SCALE, "map", [("v", 0)])
    fills = Counter(re.findall(r"fill: (#\w{6}|currentColor)", svg))
    for value in (1e-8, NAN, 1e-2):
        colour = SCALE.colour(value)
        assert isinstance(colour, str) and fills[colour] == 1, value
    assert SCALE.colour(NAN) == BROKEN
    # the cross of the cell that is marked: white below, dark above
    assert svg.count("stroke: #ffffff") >= 1 and svg.count("stroke: #1a1a1a") >= 1
    assert "stroke: #1a1a1a" not in figures.heat_map(cells, SCALE, "map")


def test_a_spectrum_has_a_line_for_every_layer_and_leaves_out_zeros() -> None:
    svg = figures.spectrum({0: [0.05, 0.01, 0.0], 5: [0.09, 0.03, 0.002]}, SCALE, "spectrum")
    curves = lines(svg, 1.3)
    assert sorted(len(re.findall(r"[ML] ", curve)) for curve in curves) == [2, 3]
    shade = PlotScale(0, 5, linear=True)
    for layer, values in ((0, 2), (5, 3)):
        colour = shade.colour(layer)
        assert sum(colour == each for each, _, _ in marks(svg)) == values
