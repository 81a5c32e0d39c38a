"""The HTML report: whole, self-contained, and the same every time."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bridge.compare.diff import Comparison
from bridge.errors import Problem
from bridge.proof.verify import Verdict
from bridge.report.pages import diff_report, verify_report
from tests.kit.reports import MODULES, PAGES, SPECTRUM, STACK, check, comparison, difference, verdict

VOID = {"meta", "wbr"}
NASTY = "<script>alert('&')</script>"


class Reader(HTMLParser):
    """Reads a page, and holds it to its own closing tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        assert {"html", "head", "title", "body", "main", "h1"} <= set(self.seen)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.links += [value or "" for key, value in attrs if key.split(":")[-1] in ("href", "src", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@functools.cache
def made(kind: str) -> str:
    return PAGES[kind]()


@pytest.mark.parametrize("kind", PAGES)
def test_page_is_whole_and_needs_nothing_else(kind: str) -> None:
    html = made(kind)
    page = Reader(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "image", "iframe", "object"} & set(page.seen)
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in html and "#010203" not in html and "currentColor" in html


@pytest.mark.parametrize("kind", PAGES)
def test_every_kind_of_module_is_in_table_and_plots(kind: str) -> None:
    page = Reader(made(kind))
    words = [word.strip() for word in page.words]
    for module in MODULES:
        assert f"layers.{{0..2}}.{module}.weight" in page.text  # the table
        assert module.split(".")[-1] in words  # the plots


def test_verdict_comes_first() -> None:
    text = Reader(verify_report(verdict())).text
    assert text.index("The same policy") < text.index("Error by module and layer")
    assert "14 weights checked: 12 run by both runtimes, 2 compared after the cast; none unchecked." in text
    assert "Failed checks" not in text


def test_failing_verdict_names_the_worst_first_with_cause_and_fix() -> None:
    problems = [Problem(f"cause {n}.", "mend it") for n in range(30)] + [Problem("stats differ", "copy them")]
    text = Reader(verify_report(verdict(0.5, *problems))).text
    first, last = text.index("cause 0."), text.index("cause 29.")
    assert text.index("Not the same policy") < first < last < text.index("stats differ")
    assert text.count("mend it") == text.count("copy them") == 1
    assert "1 weight exceeds the tolerance." in text
    rows = re.findall(r'<tr class="fails">.*?</tr>', verify_report(verdict(0.5)))
    assert len(rows) == 2 and all("k_proj" in row for row in rows)  # of its kind, and one by one


def test_verification_shows_what_lora_uses() -> None:
    plain = Reader(verify_report(verdict())).text
    assert "LoRA spectra" not in plain and "Effective rank" not in plain
    lora = [dataclasses.replace(each, spectrum=SPECTRUM) for each in verdict().checks]
    text = Reader(verify_report(dataclasses.replace(verdict(), checks=tuple(lora)))).text
    assert "LoRA spectra" in text and "Effective rank" in text


def test_failure_beside_the_weights_is_told_apart() -> None:
    text = Reader(verify_report(verdict(4e-7, Problem("norm stats differ", "copy them")))).text
    assert "Not the same policy" in text and "another check failed" in text


def test_comparison_tells_changed_from_equal() -> None:
    html = diff_report(comparison())
    text = Reader(html).text
    assert "13 of 16 weights differ" in text and "12 weights in b" in text
    assert "LoRA spectra" in text and "Effective rank" in text
    assert html.count('<tr class="same">') == 4  # one kind, three weights


def test_names_and_paths_are_escaped() -> None:
    bad = f"a.layers.0.{NASTY}.weight"
    named = dataclasses.replace(
        verdict(0.5, Problem(NASTY, NASTY)),
        source=NASTY,
        destination=f"/x/{NASTY}",
        model=NASTY,
        checks=(check(bad, 1e-7, part=NASTY), check(f"{NASTY}.weight", 1.0)),
        files={NASTY: False},
        unused={NASTY: NASTY},
        actions={NASTY: 1.0},
    )
    lora = difference(bad, 0.5, "b", part=NASTY)
    compared = Comparison(
        a=NASTY,
        b=f'"{NASTY}',
        model=NASTY,
        states=(NASTY, NASTY),
        differences=(lora, difference(f"$x_{NASTY}$", 0.1)),
    )
    for html in (verify_report(named), diff_report(compared)):
        page = Reader(html)
        assert "script" not in page.seen and "alert('&')" in page.text


@pytest.mark.filterwarnings("ignore::RuntimeWarning:bridge.compare.diff")
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e-300, 1e300])
def test_odd_numbers_do_not_break_it(value: float) -> None:
    odd = dataclasses.replace(check(f"{STACK}.layers.0.mlp.up_proj.weight", value), bfloat16=value)
    Reader(verify_report(dataclasses.replace(verdict(), checks=(odd,), actions={"max_abs": value})))
    Reader(verify_report(dataclasses.replace(verdict(), checks=(*verdict().checks, odd))))
    changed = difference(f"{STACK}.layers.0.mlp.up_proj.weight", value, "b")
    Reader(diff_report(comparison(changed)))
    Reader(diff_report(dataclasses.replace(comparison(), differences=(changed,))))
    spectrum = dataclasses.replace(changed, spectrum=(value, value))
    Reader(diff_report(dataclasses.replace(comparison(), differences=(spectrum,))))


def test_empty_ones_do_not_break_it() -> None:
    files_only = Verdict(
        source="/out", destination="/out", model="pi0", checks=(), files={"bridge.json": True}
    )
    assert "Matches its bridge.json" in Reader(verify_report(files_only)).text
    nothing = dataclasses.replace(comparison(), differences=())
    assert "No weight differs" in Reader(diff_report(nothing)).text
    equal = dataclasses.replace(comparison(), differences=(difference("norm.weight", 0.0),))
    assert "No weight differs" in Reader(diff_report(equal)).text
    assert (
        "The same policy"
        in Reader(verify_report(dataclasses.replace(verdict(), checks=(check("x", 0, "equal"),)))).text
    )


def test_same_bytes_every_time() -> None:
    assert all(make() == made(kind) for kind, make in PAGES.items())
    code = "from tests.kit.reports import PAGES; print(hash_of(''.join(make() for make in PAGES.values())))"
    code = "import zlib\nhash_of = lambda text: zlib.crc32(text.encode())\n" + code
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
