"""Text for people: what a terminal can print, and numbers in a few characters."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text safe to print on one line: a foreign name may contain line breaks, escapes or invalid bytes."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def byte_size(count: float) -> str:
    """A number of bytes, in powers of ten: ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def abbreviated(number: int) -> str:
    """A large count: ``3.24 G``."""
    for divisor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= divisor:
            return f"{number / divisor:.3g}{unit}"
    return str(number)


def scientific(value: float) -> str:
    """A number for comparing orders of magnitude: ``1.2e-07``, or a bare ``0``."""
    return f"{value:.1e}" if value else "0"


def with_article(noun: str) -> str:
    """A noun phrase with its indefinite article: ``an adapter``, ``a model``."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def counted(number: int, noun: str) -> str:
    """A number and its noun, which takes an *s*: ``1 weight``, ``2 weights``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def and_more(names: list[str]) -> str:
    """The first of some names, how many more there are, and the verb: ``a is``, ``a and 2 more are``."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
