"""A verdict or a comparison as one HTML page that opens in any browser, offline."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import TypeVar

from bridge.compare.diff import Comparison, Difference
from bridge.errors import Problem
from bridge.proof.checks import Check
from bridge.proof.verify import Verdict
from bridge.report import figures
from bridge.report.figures import BFLOAT16, FLOAT32, Scale
from bridge.report.page import Html, banner, name, page, pairs, panels, row, section, table, tag
from bridge.rules.names import grouped, skeleton

__all__ = ["diff_report", "verify_report"]

#: problems of one kind in full view; the others unfold
SHOWN = 8
Weight = TypeVar("Weight", bound="Check | Difference")


def verify_report(verdict: Verdict) -> str:
    """The page for a verdict: what it is first, then what does not hold, then the numbers."""
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
    """The page for a comparison: how much differs, where, and what LoRA made of it."""
    differences = comparison.differences
    lora = Counter(each.lora for each in differences if each.lora)
    carried = [f"{_count(n, 'weight')} in {side}" for side, n in lora.items()]
    broken = sum(not math.isfinite(each.relative) for each in differences)
    return page(
        f"Comparison of two checkpoints of {comparison.model}",
        _comparison_banner(comparison),
        pairs(
            [
                ("a", Html(name(comparison.a) + tag("div", comparison.states[0]))),
                ("b", Html(name(comparison.b) + tag("div", comparison.states[1]))),
                ("LoRA", ", ".join(carried) or "none"),
                *([("not finite", _count(broken, "weight"))] if broken else []),
            ]
        ),
        *_changes(differences),
        *_spectra([each for each in differences if any(each.spectrum)]),
        *_differences(differences),
    )


def _verdict_banner(verdict: Verdict) -> Html:
    if not verdict.checks:
        said = "Files were checked against the record beside them; no weights were compared."
        return banner(verdict.holds, "As written" if verdict.holds else "Not as written", said)
    counts = verdict.counts
    lines = [
        f"{_count(len(verdict.checks), 'weight')} checked: {counts.get('runtime', 0)} run by both runtimes, "
        f"{counts.get('equal', 0)} compared after the cast; none unchecked."
    ]
    worst = max((check for check in verdict.checks if check.kind == "runtime"), key=_share, default=None)
    if failing := sum(not check.holds for check in verdict.checks):
        lines.append(f"{failing} of them {'differs' if failing == 1 else 'differ'} by more than is allowed.")
    elif not verdict.holds:
        lines.append("The weights hold; something beside them does not.")
    elif worst is not None:
        lines.append(f"Largest relative error: {worst.relative:.1e}, {_share(worst):.0%} of what is allowed.")
    return banner(verdict.holds, "The same policy" if verdict.holds else "Not the same policy", *lines)


def _comparison_banner(comparison: Comparison) -> Html:
    changed, total = comparison.changed, _count(len(comparison.differences), "weight")
    if not changed:
        return banner(None, "No weight differs", f"{total} compared.")
    most = name(f"Most changed: {changed[0].name}, by {changed[0].relative:.1e} of its norm.")
    return banner(None, f"{len(changed)} of {total} differ", most)


def _verdict_facts(verdict: Verdict) -> Iterable[tuple[str, str]]:
    yield "source", name(verdict.source)
    if verdict.destination != verdict.source:
        yield "destination", name(verdict.destination)
    if verdict.scales:
        yield "LoRA scale", Html("".join(tag("div", scale) for scale in verdict.scales))
    if verdict.files:
        signs = {
            True: tag("span", "holds", class_="good"),
            False: tag("span", "fails", class_="bad"),
        }
        lines = [tag("div", signs[good], " ", name(file)) for file, good in verdict.files.items()]
        yield "files", Html("".join(lines))
    if verdict.actions is not None:
        numbers = ", ".join(f"{key} {value:.1e}" for key, value in verdict.actions.items())
        yield "actions", f"{numbers}; sampled by stock transformers"
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
    return [section("What does not hold", "The worst first.", *parts)] if parts else []


def _errors(checks: Sequence[Check]) -> list[Html]:
    if not checks:
        return []
    values = [check.relative for check in checks]
    narrow = [check.bfloat16 for check in checks if check.bfloat16 is not None]
    bounds = [check.allowed for check in checks if check.allowed > 0]
    note = "Largest difference of the outputs over the largest output, in float32 arithmetic."
    failing = {check.name for check in checks if not check.holds}
    note += " A cross marks what is more than allowed." if failing else ""
    maps = _maps(checks, lambda check: check.relative, Scale.over([*values, *bounds]), bounds, failing)
    scale = Scale.over([*values, *narrow, *bounds])
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
    scale = Scale.over(size for c in checks for size in (c.relative, c.allowed, c.bfloat16 or 0))
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
        "The same inputs in float32, and in bfloat16 as policies run: what precision costs. "
        "A dot for each layer; the stroke is what float32 is allowed."
    )
    if any(0 in (check.relative, check.bfloat16) for check in checks):
        note += " Zeros stand at the left edge."
    return [section("Drift in bfloat16 beside float32", note, tag("p", *map(Html, legend)), panels(plots))]


def _checks(checks: Sequence[Check]) -> list[Html]:
    def cells(group: Sequence[Check]) -> Iterable[object]:
        worst = max(group, key=_share)
        narrow = [check.bfloat16 for check in group if check.bfloat16 is not None]
        yield len(group)
        yield _number(worst.relative)
        yield _number(worst.allowed) if worst.kind == "runtime" else "equal"
        yield _number(max(narrow)) if narrow else ""
        yield _number(max(check.max_abs for check in group))
        yield _number(max(check.mean_abs for check in group))

    def badness(group: Sequence[Check]) -> float:
        return max(map(_share, group))

    def style(group: Sequence[Check]) -> str:
        return "" if all(check.holds for check in group) else "fails"

    head = ("weights", "count", "relative", "allowed", "in bfloat16", "max_abs", "mean_abs")
    note = "The worst layer of each kind. Equal: bit for bit, once the wider side is cast to the narrower."
    return _tables(note, checks, head, "nrrrrrr", cells, badness, style)


def _changes(differences: Sequence[Difference]) -> list[Html]:
    if all(each.relative == 0 for each in differences):
        return []
    scale = Scale.over(each.relative for each in differences)
    stacks = _stacks(differences).values()
    drawn = [each for stack in stacks if any(d.relative != 0 for d in stack) for each in stack]
    note = "Norm of b − a over the norm of a."
    if len(drawn) < len(differences):
        note += f" Not drawn: {_count(len(differences) - len(drawn), 'weight')} of parts that are equal throughout."
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
    scale = Scale.over((value for each in weights for value in each.spectrum), decades=6)
    plots: list[Html] = []
    for title, stack in _stacks(weights).items():
        rows = _short(stack)
        lines: defaultdict[str, dict[int, Sequence[float]]] = defaultdict(dict)
        for each in stack:
            lines[rows[each.name]][_place(each.name)[1] or 0] = each.spectrum
        found = [(k, figures.spectrum(v, scale, f"Singular values of {title} {k}")) for k, v in lines.items()]
        plots += [tag("h3", title), panels(found, "small")]
    share = Scale(0, 1, linear=True)
    maps = _maps(weights, lambda each: (each.effective_rank or 0) / len(each.spectrum), share)
    drawn = (
        "Singular values of the scaled product, largest first. A line for each layer, later layers darker."
    )
    used = (
        "How many directions a product uses, as a share of those it has: "
        "exp of the entropy of the squared singular values."
    )
    return [section("LoRA spectra", drawn, *plots), section("Effective rank", used, *maps)]


def _differences(differences: Sequence[Difference]) -> list[Html]:
    def cells(group: Sequence[Difference]) -> Iterable[object]:
        both = [(each.dtype_a, each.dtype_b) for each in group]
        ranks = [each.effective_rank for each in group if each.effective_rank is not None]
        lora = next((each.lora for each in group if each.lora), "")
        yield f"{sum(each.changed for each in group)} of {len(group)}"
        yield _number(max(each.relative for each in group))
        yield _number(max(each.max_abs for each in group))
        yield f"{median(ranks):.1f} of {max(len(each.spectrum) for each in group)}" if ranks else ""
        yield {"both": "a, b"}.get(lora, lora)
        yield ", ".join(dict.fromkeys(a if a == b else f"{a} → {b}" for a, b in both))

    def badness(group: Sequence[Difference]) -> float:
        sizes = [each.relative for each in group]
        return max(math.inf if math.isnan(size) else size for size in sizes)

    def style(group: Sequence[Difference]) -> str:
        return "" if badness(group) else "same"

    head = ("weights", "changed", "relative", "max_abs", "effective rank", "LoRA", "dtype")
    note = (
        "The largest change of each kind, the most changed first; effective rank is the median over layers."
    )
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
    """A row for each kind of weight below its part, the largest ``badness`` first; then each weight."""

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
    every = [line(one.name, [one]) for one in sorted(weights, key=lambda one: badness([one]), reverse=True)]
    unfolding = tag("summary", f"All {_count(len(every), 'weight')}, one by one")
    details = tag("details", unfolding, table(head, every, align))
    return [section("Every kind of weight", note, table(head, rows, align), details)] if rows else []


def _label(group: Sequence[Weight], common: str) -> str:
    """The names of one kind of weight, shortened."""
    return "; ".join(grouped([weight.name.removeprefix(common) for weight in group]))


def _maps(
    weights: Sequence[Weight],
    value: Callable[[Weight], float],
    scale: Scale,
    bounds: Sequence[float] = (),
    marked: Collection[str] = (),
) -> list[Html]:
    """What the colours mean, and a heat map for each stack of layers."""
    zero = not scale.linear and any(value(each) == 0 for each in weights)
    broken = any(not math.isfinite(value(each)) for each in weights)
    key = figures.colour_key(scale, "What the colours mean", bounds, zero=zero, broken=broken)
    found = []
    for title, stack in _stacks(weights).items():
        rows = _short(stack)
        cells = {(rows[each.name], _place(each.name)[1]): each for each in stack}
        values = {at: value(each) for at, each in cells.items()}
        crosses = {at for at, each in cells.items() if each.name in marked}
        found.append((title, figures.heat_map(values, scale, f"Heat map of {title}", crosses)))
    return [Html(key), panels(found)]


def _histogram(
    title: str, colour: str, values: Sequence[float], scale: Scale, bounds: Sequence[float] = ()
) -> tuple[str, str]:
    zeros = sum(value == 0 for value in values)
    svg = figures.histogram(values, scale, colour, f"Histogram, {title}", bounds)
    return title + (f" ({zeros} that are zero left out)" if zeros else ""), svg


def _stacks(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Weights by their part's stack of layers; those that belong to no layer together, last."""
    found: defaultdict[str, list[Weight]] = defaultdict(list)
    for each in sorted(weights, key=lambda each: _place(each.name)[1] is None):
        found["in no layer" if _place(each.name)[1] is None else each.part].append(each)
    return dict(found)


def _place(weight: str) -> tuple[str, int | None]:
    """The name with its first number, which is the layer, left open; and that number."""
    parts, numbers = skeleton(weight)
    if not numbers:
        return weight, None
    rest = iter(("*", *numbers[1:]))
    return ".".join(str(next(rest)) if part is None else part for part in parts), numbers[0]


def _short(weights: Iterable[Weight]) -> Mapping[str, str]:
    """Names -> labels of rows: the fewest last segments that tell the kinds apart."""
    kinds = {each.name: _place(each.name)[0].removesuffix(".weight").split(".") for each in weights}
    ends = Counter(".".join(k[-n:]) for k in set(map(tuple, kinds.values())) for n in range(1, len(k) + 1))
    return {
        weight: next((end for n in range(1, len(k)) if ends[end := ".".join(k[-n:])] == 1), ".".join(k))
        for weight, k in kinds.items()
    }


def _common(names: Sequence[str]) -> str:
    """The dotted segments that all names begin with, short of their last and of what is numbered."""
    kept = ""
    for column in zip(*(_place(each)[0].split(".*")[0].split(".")[:-1] for each in names), strict=False):
        if len(set(column)) > 1 or len(names) < 2:
            break
        kept += column[0] + "."
    return kept


def _share(check: Check) -> float:
    """Of what is allowed; without bound where nothing is, or where the error is not a number."""
    share = check.relative / check.allowed if check.allowed else math.inf if check.relative else 0.0
    return math.inf if math.isnan(share) else share


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"
