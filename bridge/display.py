"""Numbers as people read them."""


def size(count: float) -> str:
    """Bytes, in powers of ten.

    >>> size(999), size(46_580_123), size(4.2e12)
    ('999 B', '46.6 MB', '4.2 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
