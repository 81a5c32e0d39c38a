"""Plots as inline SVG, reproducible byte for byte, drawn by matplotlib without a display.

Text and axes use the text colour of the page, so one drawing serves light and dark pages. One
drawing unit is one CSS pixel. matplotlib is imported with the first plot.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: placeholder for the text colour of the page
INK = "#010203"
#: of medium lightness, to be legible on white and on near-black
RAMP = ((242, 201, 138), (235, 154, 109), (220, 106, 104), (184, 74, 123), (130, 60, 132))
FLOAT32, BFLOAT16, BROKEN = "#3f86c0", "#d98032", "#d23b3b"
FAINT = 0.13
FONT = 11
#: width of a panel: two fit side by side in a wide window, one fills a phone
PANEL = 440
STYLE: dict[str, Any] = {
    "svg.hashsalt": "bridge",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": FONT,
    "axes.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


@dataclass(frozen=True)
class PlotScale:
    """The scale of an axis or of colours, from ``low`` to ``high``: log10 unless ``linear``."""

    low: float
    high: float
    linear: bool = False

    @classmethod
    def over(cls, values: Iterable[float], decades: float = 12) -> PlotScale:
        """A logarithmic scale over the positive finite values, of at most the top ``decades``."""
        logs = [math.log10(value) for value in values if 0 < value < math.inf]
        if not logs:
            return cls(-1, 0)
        high = max(logs)
        low = max(min(logs), high - decades)
        margin = max(0.04 * (high - low), 0.08)
        return cls(low - margin, high + margin)

    def at(self, value: float) -> float:
        place = value if self.linear else math.log10(value) if value > 0 else self.low
        return min(max(place, self.low), self.high)

    def colour(self, value: float) -> str | tuple[str, float]:
        """The colour of a cell in a heat map; zero and non-finite values have their own."""
        if not math.isfinite(value):
            return BROKEN
        if value == 0 and not self.linear:
            return INK, FAINT
        place = (self.at(value) - self.low) / (self.high - self.low) * (len(RAMP) - 1)
        mixed = (np.interp(place, range(len(RAMP)), channel) for channel in zip(*RAMP, strict=True))
        return "#" + "".join(f"{round(float(part)):02x}" for part in mixed)

    def ticks(self) -> dict[float, str]:
        """Positions -> labels: whole decades, or steps of 1, 2, 5 if there are too few."""
        if self.linear:
            return {step: f"{step:.0%}" for step in np.linspace(self.low, self.high, 5)}
        whole = range(math.ceil(self.low), math.floor(self.high) + 1)
        if len(whole) > 1:
            return {float(n): _power(n) for n in whole[:: 1 + len(whole) // 8]}
        steps = [(k, n) for n in range(math.floor(self.low), math.ceil(self.high)) for k in (1, 2, 5)]
        labels = {math.log10(k) + n: f"{k}·{_power(n)}".removeprefix("1·") for k, n in steps}
        return {place: label for place, label in labels.items() if self.low <= place <= self.high}


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def heat_map(
    cells: Mapping[tuple[str, int | None], float],
    scale: PlotScale,
    label: str,
    marked: Collection[tuple[str, int | None]] = (),
) -> str:
    """A square for every (module, layer), modules as rows and layers as columns."""
    from matplotlib.collections import PolyCollection

    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells}, key=lambda column: -1 if column is None else column)
    left = _text_width(rows)
    size = min(22.0, (PANEL - left - 4) / len(columns))
    height = 17
    with _drawing(left + size * len(columns) + 4, height * len(rows) + 20) as figure:
        axes = _axes(figure, left, 0, size * len(columns), height * len(rows))
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        at = [(rows.index(row), columns.index(column)) for row, column in cells]
        squares = [_square(x, y) for y, x in at]
        axes.add_collection(
            PolyCollection(squares, facecolors=[scale.colour(value) for value in cells.values()], lw=0)
        )
        for cell, (y, x) in zip(cells, at, strict=True):
            if cell in marked:
                _cross(axes, x + 0.5, y + 0.5)
        _bare(axes)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        apart = math.ceil(16 / size)
        shown = [n for n, column in enumerate(columns) if column is not None and n % apart == 0]
        axes.set_xticks(np.array(shown) + 0.5, [str(columns[n]) for n in shown])
        return _svg(figure, label)


def colour_key(
    scale: PlotScale, label: str, bounds: Sequence[float] = (), *, zero: bool = False, broken: bool = False
) -> str:
    """The legend of a heat map, with the tolerance marked, and zero and non-finite values beside it."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Rectangle

    left, width = 22 + 48 * zero, 300
    with _drawing(left + width + 22 + 48 * broken, 54) as figure:
        axes = _axes(figure, left, 20, width, 12)
        axes.set(xlim=(scale.low, scale.high), ylim=(0, 1))
        edges = np.linspace(scale.low, scale.high, 65)
        # each bar extends to the end below the next ones, to avoid seams
        bars = [[(a, 0), (a, 1), (edges[-1], 1), (edges[-1], 0)] for a in edges[:-1]]
        middles = (edges[:-1] + edges[1:]) / 2
        colours = [scale.colour(float(value)) for value in (middles if scale.linear else 10**middles)]
        axes.add_collection(PolyCollection(bars, facecolors=colours, lw=0))
        if bounds:
            place = scale.at(max(bounds))
            axes.plot([place, place], [0, 1.3], color=INK, lw=1.6, clip_on=False)
            _bound(axes, scale, bounds, 1.5)
        inside = axes.transAxes
        for shown, pixel, value, word in (
            (zero, -left, 0, "equal"),
            (broken, width + 16, math.nan, "nan, inf"),
        ):
            if shown:
                swatch = Rectangle((pixel / width, 0), 40 / width, 1, transform=inside, clip_on=False, lw=0)
                swatch.set_facecolor(scale.colour(value))
                axes.add_patch(swatch)
                axes.text((pixel + 20) / width, -0.55, word, transform=inside, ha="center", va="top")
        _bare(axes)
        _ticks(axes, scale)
        axes.set_yticks([])
        return _svg(figure, label)


def histogram(
    values: Iterable[float], scale: PlotScale, colour: str, label: str, bounds: Sequence[float] = ()
) -> str:
    """The distribution of values; zero and non-finite ones are left out."""
    from matplotlib.ticker import MaxNLocator

    places = [scale.at(value) for value in values if 0 < value < math.inf]
    with _drawing(PANEL, 170) as figure:
        axes = _axes(figure, 34, 16, PANEL - 48, 130)
        axes.hist(places, bins=np.linspace(scale.low, scale.high, 41).tolist(), color=colour, rwidth=0.88)
        axes.set_xlim(scale.low, scale.high)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _ticks(axes, scale)
        if bounds:
            axes.axvline(scale.at(max(bounds)), color=INK, lw=1.4, ls=(0, (3, 2)))
            _bound(axes, scale, bounds, 1.02)
        return _svg(figure, label)


def strips(
    points: Mapping[str, Sequence[tuple[str, float]]],
    bounds: Mapping[str, float],
    scale: PlotScale,
    label: str,
) -> str:
    """A line for every module, with a dot (colour, value) for every layer and a tick at the tolerance."""
    left, height = _text_width(points), 20
    with _drawing(PANEL, height * len(points) + 26) as figure:
        axes = _axes(figure, left, 2, PANEL - left - 14, height * len(points))
        axes.set(xlim=(scale.low, scale.high), ylim=(len(points) - 0.5, -0.5))
        for y, (row, dots) in enumerate(points.items()):
            axes.axhline(y, color=INK, alpha=FAINT, lw=1)
            for colour, above in ((FLOAT32, 0.15), (BFLOAT16, -0.15)):
                xs = [scale.at(v) for c, v in dots if c == colour and math.isfinite(v)]
                axes.plot(
                    xs, [y - above] * len(xs), "o", ms=5, mew=0, color=colour, alpha=0.75, clip_on=False
                )
            place = scale.at(bounds[row])
            axes.plot([place, place], [y - 0.34, y + 0.34], color=INK, lw=1.6)
        axes.spines["left"].set_visible(False)
        axes.set_yticks(range(len(points)), list(points))
        axes.tick_params("y", length=0)
        _ticks(axes, scale)
        return _svg(figure, label)


def spectrum(lines: Mapping[int, Sequence[float]], scale: PlotScale, label: str) -> str:
    """Singular values, largest first; a line for every layer, later layers darker."""
    from matplotlib.ticker import MaxNLocator

    shade = PlotScale(min(lines), max(*lines, min(lines) + 1), linear=True)
    with _drawing(190, 132) as figure:
        axes = _axes(figure, 36, 4, 146, 104)
        for layer, values in lines.items():
            kept = [value for value in values if 0 < value < math.inf]
            xs, ys = range(1, len(kept) + 1), [scale.at(value) for value in kept]
            marker = "o" if len(values) < 12 else ""
            axes.plot(xs, ys, color=shade.colour(layer), lw=1.3, marker=marker, ms=3)
        longest = max(map(len, lines.values()))
        axes.set(xlim=(1 - 0.04 * longest, longest * 1.04), ylim=(scale.low, scale.high))
        numbers = MaxNLocator(4, integer=True).tick_values(1, longest)
        # values are numbered from one
        axes.set_xticks([number for number in numbers if 1 <= number <= longest])
        axes.set_yticks(list(scale.ticks()), list(scale.ticks().values()))
        axes.grid(axis="y", color=INK, alpha=FAINT, lw=0.8)
        return _svg(figure, label)


@contextmanager
def _drawing(width: float, height: float) -> Iterator[Figure]:
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):  # regardless of the user's matplotlibrc
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a position in pixels from the upper left corner."""
    whole_width, whole_height = figure.get_size_inches() * 72
    bottom = whole_height - top - height
    return figure.add_axes(
        (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    )


def _bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=4)


def _square(x: float, y: float) -> list[tuple[float, float]]:
    a, b = 0.05, 0.95
    return [(x + a, y + a), (x + b, y + a), (x + b, y + b), (x + a, y + b)]


def _cross(axes: Axes, x: float, y: float) -> None:
    axes.plot(x, y, "x", color="#ffffff", ms=6.5, mew=3.2)
    axes.plot(x, y, "x", color="#1a1a1a", ms=6, mew=1.5)


def _ticks(axes: Axes, scale: PlotScale) -> None:
    axes.set_xticks(list(scale.ticks()), list(scale.ticks().values()))


def _bound(axes: Axes, scale: PlotScale, bounds: Sequence[float], y: float) -> None:
    place = scale.at(max(bounds))
    side = "right" if place > (scale.low + scale.high) / 2 else "left"
    low, high = (f"{value:.1e}" for value in (min(bounds), max(bounds)))
    label = f"tolerance {low}" if low == high else f"tolerance {low} to {high}"
    axes.text(place, y, label, ha=side, va="bottom", transform=axes.get_xaxis_transform())


def _text_width(rows: Iterable[str]) -> float:
    return 10 + 6.7 * max(map(len, rows), default=0)


def _svg(figure: Figure, label: str) -> str:
    """The drawing as an element of an HTML page: no XML declaration, no URLs, no clashing ids."""
    from html import escape

    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    prefix = f"f{zlib.crc32((label + text).encode()):08x}-"
    width, height = figure.get_size_inches() * 72
    opening = f'<svg role="img" aria-label="{escape(label)}" width="{width:.0f}" height="{height:.0f}"'

    def tag(match: re.Match[str]) -> str:
        markup = match[0].replace(INK, "currentColor").replace("xlink:href", "href")
        markup = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", markup)
        markup = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", markup)
        markup = re.sub(r'(url\(#|href="#)', rf"\1{prefix}", markup)
        if markup.startswith("<svg"):
            box = re.search(r'viewBox="[^"]*"', markup)
            return f"{opening} {box[0] if box else ''}>"
        return markup

    return re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]*>", tag, text))
