"""HTML around the figures: escaping, tables, style. The page loads nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Escaped markup."""


def text(value: object) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def name(value: object) -> Html:
    """A path or a weight's name, with line breaks allowed at dots and slashes, but not inside numbers."""
    return Html(re.sub(r"/(?=.)|\.(?=[^\W\d])", r"\g<0><wbr>", text(value)))


def tag(element: str, *inside: object, **attributes: str) -> Html:
    """An element; the attribute ``class`` is spelled ``class_``."""
    extra = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{element}{extra}>{''.join(map(text, inside))}</{element}>")


def section(title: str, note: str, *inside: object) -> Html:
    return tag("section", tag("h2", title), tag("p", note, class_="note"), *inside)


def panels(figures: Iterable[tuple[str, str]], kind: str = "panels") -> Html:
    """Figures with titles, side by side as far as they fit."""
    titled = [tag("figure", tag("figcaption", title), Html(svg)) for title, svg in figures]
    return tag("div", *titled, class_=kind)


def pairs(items: Iterable[tuple[str, object]]) -> Html:
    return tag("dl", *(Html(tag("dt", key) + tag("dd", value)) for key, value in items))


def row(cells: Sequence[object], align: str, kind: str = "", cell: str = "td") -> Html:
    """A table row; ``align`` has a letter per cell: name, text, or right-aligned."""
    styles = {"n": "name", "t": "", "r": "num"}
    tags = [tag(cell, value, class_=styles[a]) for value, a in zip(cells, align, strict=True)]
    return tag("tr", *tags, class_=kind)


def table(head: Sequence[str], rows: Iterable[Html], align: str) -> Html:
    """A table; it scrolls in a box of its own if the window is too narrow."""
    inside = tag("table", tag("thead", row(head, align, cell="th")), tag("tbody", *rows))
    return tag("div", inside, class_="scroll", tabindex="0")


def banner(good: bool | None, headline: str, *lines: str) -> Html:
    kind, sign = {True: ("good", "✓ "), False: ("bad", "✗ "), None: ("plain", "")}[good]
    paragraphs = (tag("p", line) for line in lines)
    return tag("div", tag("p", sign + headline, class_="headline"), *paragraphs, class_=f"banner {kind}")


def page(title: str, *inside: object) -> str:
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{text(title)}</title>\n'
    )
    body = "\n".join(map(text, inside))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{tag('h1', title)}\n{body}\n</main>\n</body>\n</html>\n"
    )


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #23262b; --soft: #636a75; --rule: #dfe1e4; --box: #f4f5f5;
  --good: #1d7044; --bad: #b3261e; --plain: #3c6e9f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --ink: #e3e5e8; --soft: #9aa1ac; --rule: #33373e; --box: #1f2227;
    --good: #6cc695; --bad: #f28b82; --plain: #8cb8e2;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif;
  font-size: 15px; -webkit-text-size-adjust: 100%; }
main { max-width: 1020px; margin: 0 auto; padding: 32px 16px 64px; }
h1 { font-size: 15px; font-weight: 500; color: var(--soft); margin: 0 0 12px; }
h2 { font-size: 19px; font-weight: 600; line-height: 1.3; margin: 48px 0 4px; }
h3 { font-size: 15px; font-weight: 600; margin: 24px 0 4px; }
p { margin: 4px 0; max-width: 44em; overflow-wrap: anywhere; }
.note { color: var(--soft); margin-bottom: 14px; }
.banner { border-left: 4px solid; padding: 2px 0 2px 16px; margin-bottom: 24px; }
.banner p { color: var(--ink); }
.banner .headline { font-size: 28px; font-weight: 600; line-height: 1.25; color: inherit; }
.good { color: var(--good); } .bad { color: var(--bad); } .plain { color: var(--plain); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
ol { padding-left: 1.6em; margin: 8px 0; }
li { margin: 4px 0; overflow-wrap: anywhere; }
.fix { border-left: 3px solid var(--rule); padding-left: 12px; margin: 8px 0 20px; }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.4; width: 100%; }
th, td { padding: 4px 0 4px 20px; text-align: left; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--rule); }
tr.part th { padding-top: 16px; font-weight: 600; white-space: normal; }
tr.part div { position: sticky; left: 0; max-width: calc(100vw - 32px); overflow-wrap: anywhere; }
.part span { color: var(--soft); font-weight: 400; }
td { border-bottom: 1px solid var(--rule); }
th.num, td.num { text-align: right; font-variant-numeric: tabular-nums; }
th.name, td.name { position: sticky; left: 0; background: var(--paper); }
td.name { white-space: normal; min-width: 170px; overflow-wrap: anywhere; }
tr.fails td { color: var(--bad); }
tr.same td { color: var(--soft); }
summary { cursor: pointer; color: var(--soft); padding: 6px 0; }
.panels { display: flex; flex-wrap: wrap; gap: 20px 48px; align-items: flex-start; margin: 12px 0; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 16px 12px; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere; }
.small figcaption { font-weight: 500; padding-left: 36px; }
svg { display: block; max-width: 100%; height: auto; }
.swatch { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin: 0 5px 0 12px; }
"""
