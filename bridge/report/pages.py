"""A verdict or a comparison as a self-contained HTML page."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import TypeVar

from bridge.compare.diff import Comparison, Difference
from bridge.display import counted, scientific
from bridge.errors import Problem
from bridge.proof.checks import Check
from bridge.proof.verify import Verdict
from bridge.report import figures
from bridge.report.figures import BFLOAT16, FLOAT32, PlotScale
from bridge.report.page import Html, banner, name, page, pairs, panels, row, section, table, tag
from bridge.rules.names import grouped, skeleton

__all__ = ["diff_report", "verify_report"]

#: problems with the same fix that are shown at once; the others unfold
SHOWN = 8
Weight = TypeVar("Weight", bound="Check | Difference")


def verify_report(verdict: Verdict) -> str:
    """The page of a verdict: the result, failed checks, then the numbers."""
    return page(
        f"Verification of {verdict.model}",
        _verdict_banner(verdict),
        pairs(_verdict_facts(verdict)),
        *_problems(verdict.problems),
        *_errors([check for check in verdict.checks if check.kind == "runtime" or not check.holds]),
        *_drift([check for check in verdict.checks if check.bfloat16 is not None]),
        *_spectra([check for check in verdict.checks if any(check.spectrum)]),
        *_checks(verdict.checks),
    )


def diff_report(comparison: Comparison) -> str:
    """The page of a comparison: how much differs, where, and the spectra of LoRA."""
    differences = comparison.differences
    lora = Counter(each.lora for each in differences if each.lora)
    with_lora = [f"{counted(n, 'weight')} in {side}" for side, n in lora.items()]
    broken = sum(not math.isfinite(each.relative) for each in differences)
    return page(
        f"Comparison of two checkpoints of {comparison.model}",
        _comparison_banner(comparison),
        pairs(
            [
                ("a", Html(name(comparison.a) + tag("div", comparison.states[0]))),
                ("b", Html(name(comparison.b) + tag("div", comparison.states[1]))),
                ("LoRA", ", ".join(with_lora) or "none"),
                *([("not finite", counted(broken, "weight"))] if broken else []),
            ]
        ),
        *_changes(differences),
        *_spectra([each for each in differences if any(each.spectrum)]),
        *_differences(differences),
    )


def _verdict_banner(verdict: Verdict) -> Html:
    if not verdict.checks:
        note = "Files were checked against bridge.json; no weights were compared."
        headline = "Matches its bridge.json" if verdict.holds else "Does not match its bridge.json"
        return banner(verdict.holds, headline, note)
    counts = verdict.counts
    lines = [
        f"{counted(len(verdict.checks), 'weight')} checked: {counts.get('runtime', 0)} run by both runtimes, "
        f"{counts.get('equal', 0)} compared after the cast; none unchecked."
    ]
    worst = max((check for check in verdict.checks if check.kind == "runtime"), key=_share, default=None)
    if failing := sum(not check.holds for check in verdict.checks):
        lines.append(f"{counted(failing, 'weight')} {'exceeds' if failing == 1 else 'exceed'} the tolerance.")
    elif not verdict.holds:
        lines.append("All weights passed; another check failed.")
    elif worst is not None:
        lines.append(f"Largest relative error: {worst.relative:.1e}, {_share(worst):.0%} of the tolerance.")
    return banner(verdict.holds, "The same policy" if verdict.holds else "Not the same policy", *lines)


def _comparison_banner(comparison: Comparison) -> Html:
    changed, total = comparison.changed, counted(len(comparison.differences), "weight")
    if not changed:
        return banner(None, "No weight differs", f"{total} compared.")
    most = name(f"Most changed: {changed[0].name}, by {changed[0].relative:.1e} × its norm.")
    return banner(None, f"{len(changed)} of {total} differ", most)


def _verdict_facts(verdict: Verdict) -> Iterable[tuple[str, str]]:
    yield "source", name(verdict.source)
    if verdict.destination != verdict.source:
        yield "destination", name(verdict.destination)
    if verdict.scales:
        yield "LoRA scale", Html("".join(tag("div", scale) for scale in verdict.scales))
    if verdict.files:
        signs = {
            True: tag("span", "verified", class_="good"),
            False: tag("span", "failed", class_="bad"),
        }
        lines = [tag("div", signs[good], " ", name(file)) for file, good in verdict.files.items()]
        yield "files", Html("".join(lines))
    if verdict.actions is not None:
        numbers = ", ".join(f"{key} {value:.1e}" for key, value in verdict.actions.items())
        yield verdict.output, f"{numbers}; run by {verdict.runtime}"
    if verdict.unused:
        lines = [tag("div", name(each), f": {why}") for each, why in verdict.unused.items()]
        yield "not used", Html("".join(lines))


def _problems(problems: Sequence[Problem]) -> list[Html]:
    by_fix: defaultdict[str, list[Html]] = defaultdict(list)
    for problem in problems:
        by_fix[problem.fix].append(tag("li", name(problem.cause)))
    parts: list[Html] = []
    for fix, causes in by_fix.items():
        parts.append(tag("ol", *causes[:SHOWN]))
        if rest := causes[SHOWN:]:
            listed = tag("ol", *rest, start=str(SHOWN + 1))
            parts.append(tag("details", tag("summary", f"and {len(rest)} more"), listed))
        parts.append(tag("p", tag("strong", "Fix: "), fix, class_="fix"))
    return [section("Failed checks", "Worst first.", *parts)] if parts else []


def _errors(checks: Sequence[Check]) -> list[Html]:
    if not checks:
        return []
    values = [check.relative for check in checks]
    narrow = [check.bfloat16 for check in checks if check.bfloat16 is not None]
    bounds = [check.allowed for check in checks if check.allowed > 0]
    note = "Largest difference of the outputs over the largest output, computed in float32."
    failing = {check.name for check in checks if not check.holds}
    note += " A cross marks errors above the tolerance." if failing else ""
    maps = _maps(checks, lambda check: check.relative, PlotScale.over([*values, *bounds]), bounds, failing)
    scale = PlotScale.over([*values, *narrow, *bounds])
    histograms = [
        _histogram("float32", FLOAT32, values, scale, bounds),
        _histogram("bfloat16", BFLOAT16, narrow, scale),
    ]
    return [
        section("Error by module and layer", note, *maps),
        section("How large the errors are", "Number of weights by relative error.", panels(histograms)),
    ]


def _drift(checks: Sequence[Check]) -> list[Html]:
    if not checks:
        return []
    scale = PlotScale.over(size for c in checks for size in (c.relative, c.allowed, c.bfloat16 or 0))
    plots = []
    for title, stack in _stacks(checks).items():
        rows = _short(stack)
        points: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
        for check in stack:
            points[rows[check.name]] += [(FLOAT32, check.relative), (BFLOAT16, check.bfloat16 or 0)]
        bounds = {rows[check.name]: check.allowed for check in stack}
        svg = figures.strips(points, bounds, scale, f"Errors of {title} in float32 and bfloat16")
        plots.append((title, svg))
    legend = [
        tag("span", "", class_="swatch", style=f"background:{colour}") + word
        for word, colour in (("float32", FLOAT32), ("bfloat16", BFLOAT16))
    ]
    note = (
        "The same inputs computed in float32, and in bfloat16 as at inference. "
        "A dot for each layer; the tick is the tolerance in float32."
    )
    if any(0 in (check.relative, check.bfloat16) for check in checks):
        note += " Zeros are at the left edge."
    return [section("bfloat16 vs float32 error", note, tag("p", *map(Html, legend)), panels(plots))]


def _checks(checks: Sequence[Check]) -> list[Html]:
    def cells(group: Sequence[Check]) -> Iterable[object]:
        worst = max(group, key=_share)
        narrow = [check.bfloat16 for check in group if check.bfloat16 is not None]
        yield len(group)
        yield scientific(worst.relative)
        yield scientific(worst.allowed) if worst.kind == "runtime" else "equal"
        yield scientific(max(narrow)) if narrow else ""
        yield scientific(max(check.max_abs for check in group))
        yield scientific(max(check.mean_abs for check in group))

    def badness(group: Sequence[Check]) -> float:
        return max(map(_share, group))

    def style(group: Sequence[Check]) -> str:
        return "" if all(check.holds for check in group) else "fails"

    head = ("weights", "count", "relative", "tolerance", "in bfloat16", "max_abs", "mean_abs")
    note = "The worst layer of each kind. Equal: bit for bit, after the wider dtype is cast to the narrower."
    return _tables(note, checks, head, "nrrrrrr", cells, badness, style)


def _changes(differences: Sequence[Difference]) -> list[Html]:
    if all(each.relative == 0 for each in differences):
        return []
    scale = PlotScale.over(each.relative for each in differences)
    stacks = _stacks(differences).values()
    drawn = [each for stack in stacks if any(d.relative != 0 for d in stack) for each in stack]
    note = "Norm of b − a over the norm of a."
    if len(drawn) < len(differences):
        note += f" Not drawn: {counted(len(differences) - len(drawn), 'weight')} of parts without any change."
    maps = _maps(drawn, lambda each: each.relative, scale)
    by_lora = [
        ("Weights with LoRA", FLOAT32, [each.relative for each in differences if each.lora]),
        ("Weights without", BFLOAT16, [each.relative for each in differences if not each.lora]),
    ]
    histograms = [_histogram(*each, scale) for each in by_lora if any(each[2])]
    return [
        section("Change by module and layer", note, *maps),
        section("How large the changes are", "Number of weights by relative change.", panels(histograms)),
    ]


def _spectra(weights: Sequence[Weight]) -> list[Html]:
    if not weights:
        return []
    scale = PlotScale.over((value for each in weights for value in each.spectrum), decades=6)
    plots: list[Html] = []
    for title, stack in _stacks(weights).items():
        rows = _short(stack)
        lines: defaultdict[str, dict[int, Sequence[float]]] = defaultdict(dict)
        for each in stack:
            lines[rows[each.name]][_place(each.name)[1] or 0] = each.spectrum
        spectra = [
            (k, figures.spectrum(v, scale, f"Singular values of {title} {k}")) for k, v in lines.items()
        ]
        plots += [tag("h3", title), panels(spectra, "small")]
    share = PlotScale(0, 1, linear=True)
    maps = _maps(weights, lambda each: (each.effective_rank or 0) / len(each.spectrum), share)
    values_note = (
        "Singular values of the scaled product, largest first. A line for each layer, later layers darker."
    )
    rank_note = (
        "exp of the entropy of the squared singular values, over their number: "
        "the share of directions that a product uses."
    )
    return [section("LoRA spectra", values_note, *plots), section("Effective rank", rank_note, *maps)]


def _differences(differences: Sequence[Difference]) -> list[Html]:
    def cells(group: Sequence[Difference]) -> Iterable[object]:
        both = [(each.dtype_a, each.dtype_b) for each in group]
        ranks = [each.effective_rank for each in group if each.effective_rank is not None]
        lora = next((each.lora for each in group if each.lora), "")
        yield f"{sum(each.changed for each in group)} of {len(group)}"
        yield scientific(max(each.relative for each in group))
        yield scientific(max(each.max_abs for each in group))
        yield f"{median(ranks):.1f} of {max(len(each.spectrum) for each in group)}" if ranks else ""
        yield {"both": "a, b"}.get(lora, lora)
        yield ", ".join(dict.fromkeys(a if a == b else f"{a} → {b}" for a, b in both))

    def badness(group: Sequence[Difference]) -> float:
        sizes = [each.relative for each in group]
        return max(math.inf if math.isnan(size) else size for size in sizes)

    def style(group: Sequence[Difference]) -> str:
        return "" if badness(group) else "same"

    head = ("weights", "changed", "relative", "max_abs", "effective rank", "LoRA", "dtype")
    note = "The largest change of each kind, most changed first; effective rank is the median over layers."
    return _tables(note, differences, head, "nrrrrtt", cells, badness, style)


def _tables(
    note: str,
    weights: Sequence[Weight],
    head: Sequence[str],
    align: str,
    cells: Callable[[Sequence[Weight]], Iterable[object]],
    badness: Callable[[Sequence[Weight]], float],
    style: Callable[[Sequence[Weight]], str],
) -> list[Html]:
    """A row for each kind of weight by part, the largest ``badness`` first; then every weight."""

    def line(label: str, group: Sequence[Weight]) -> Html:
        return row([name(label), *cells(group)], align, style(group))

    kinds: defaultdict[tuple[str, str, str], list[Weight]] = defaultdict(list)
    for each in weights:
        kinds[each.part, _place(each.name)[0], getattr(each, "kind", "")].append(each)
    parts: defaultdict[str, list[list[Weight]]] = defaultdict(list)
    for same in sorted(kinds.values(), key=badness, reverse=True):
        parts[same[0].part].append(same)
    rows: list[Html] = []
    for part, groups in parts.items():
        common = _common([weight.name for family in groups for weight in family])
        title = tag("div", part, " ", tag("span", name(common)))
        rows.append(tag("tr", tag("th", title, colspan=str(len(head))), class_="part"))
        rows += [row((name(_label(kind, common)), *cells(kind)), align, style(kind)) for kind in groups]
    every = [line(w.name, [w]) for w in sorted(weights, key=lambda weight: badness([weight]), reverse=True)]
    unfolding = tag("summary", f"All {counted(len(every), 'weight')}")
    details = tag("details", unfolding, table(head, every, align))
    return [section("All kinds of weights", note, table(head, rows, align), details)] if rows else []


def _label(group: Sequence[Weight], common: str) -> str:
    """The names of a kind of weight, shortened."""
    return "; ".join(grouped([weight.name.removeprefix(common) for weight in group]))


def _maps(
    weights: Sequence[Weight],
    value: Callable[[Weight], float],
    scale: PlotScale,
    bounds: Sequence[float] = (),
    marked: Collection[str] = (),
) -> list[Html]:
    """The legend, and a heat map for each stack of layers."""
    zero = not scale.linear and any(value(each) == 0 for each in weights)
    broken = any(not math.isfinite(value(each)) for each in weights)
    key = figures.colour_key(scale, "Legend", bounds, zero=zero, broken=broken)
    maps = []
    for title, stack in _stacks(weights).items():
        rows = _short(stack)
        cells = {(rows[each.name], _place(each.name)[1]): each for each in stack}
        values = {at: value(each) for at, each in cells.items()}
        crosses = {at for at, each in cells.items() if each.name in marked}
        maps.append((title, figures.heat_map(values, scale, f"Heat map of {title}", crosses)))
    return [Html(key), panels(maps)]


def _histogram(
    title: str, colour: str, values: Sequence[float], scale: PlotScale, bounds: Sequence[float] = ()
) -> tuple[str, str]:
    zeros = sum(value == 0 for value in values)
    svg = figures.histogram(values, scale, colour, f"Histogram, {title}", bounds)
    return title + (f" ({zeros} zeros left out)" if zeros else ""), svg


def _stacks(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Weights by the stack of layers of their part; those outside any layer come last, together."""
    stacks: defaultdict[str, list[Weight]] = defaultdict(list)
    for each in sorted(weights, key=lambda each: _place(each.name)[1] is None):
        stacks["outside layers" if _place(each.name)[1] is None else each.part].append(each)
    return dict(stacks)


def _place(weight: str) -> tuple[str, int | None]:
    """The name with its first number, the layer, as a wildcard; and that number."""
    texts, numbers = skeleton(weight)
    if not numbers:
        return weight, None
    rest = map("{}{}".format, ("*", *numbers[1:]), texts[1:])
    return texts[0] + "".join(rest), numbers[0]


def _short(weights: Iterable[Weight]) -> Mapping[str, str]:
    """Names -> row labels: the fewest trailing segments that distinguish the kinds."""
    kinds = {each.name: _place(each.name)[0].removesuffix(".weight").split(".") for each in weights}
    ends = Counter(".".join(k[-n:]) for k in set(map(tuple, kinds.values())) for n in range(1, len(k) + 1))
    return {
        weight: next((end for n in range(1, len(k)) if ends[end := ".".join(k[-n:])] == 1), ".".join(k))
        for weight, k in kinds.items()
    }


def _common(names: Sequence[str]) -> str:
    """The dotted prefix of all names, up to the last segment or the first number."""
    kept = ""
    for column in zip(*(_place(each)[0].split(".*")[0].split(".")[:-1] for each in names), strict=False):
        if len(set(column)) > 1 or len(names) < 2:
            break
        kept += column[0] + "."
    return kept


def _share(check: Check) -> float:
    """The error over the tolerance; infinite if it must be 0 and is not, or if it is NaN."""
    share = check.relative / check.allowed if check.allowed else math.inf if check.relative else 0.0
    return math.inf if math.isnan(share) else share
