"""Tables for people, and into a page."""

from pathlib import Path

Rows = list[list[str]]


def duration(seconds: float) -> str:
    """For people.

    >>> [duration(s) for s in (0.0123, 4.21, 75, 8000, 400000)]
    ['12 ms', '4.2 s', '75 s', '2.2 h', '4.6 d']
    """
    for bound, unit, name in (
        (1, 1e-3, "ms"),
        (100, 1, "s"),
        (5400, 60, "min"),
        (172800, 3600, "h"),
    ):
        if seconds < bound:
            return f"{seconds / unit:.{1 if 1 < seconds / unit < 9.95 else 0}f} {name}"
    return f"{seconds / 86400:.1f} d" if seconds < 864000 else f"{seconds / 86400:.0f} d"


def volume(size: float) -> str:
    """For people.

    >>> volume(1.4e10), volume(4.5e7), volume(2e12)
    ('14 GB', '45 MB', '2.0 TB')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.{1 if size / unit < 9.95 else 0}f} {name}"
    return f"{size / 1e3:.0f} kB"


def markdown(rows: Rows) -> str:
    """A table, numbers to the right."""
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(page: Path, found: dict[str, Rows]) -> None:
    """Put each table between `<!-- NAME -->` and `<!-- end -->`."""
    text = page.read_text()
    for name, rows in found.items():
        block = f"<!-- {name} -->\n{markdown(rows)}\n<!-- end -->"
        before, found_it, after = text.partition(f"<!-- {name} -->")
        if not found_it:
            raise SystemExit(f"{page}: it has no marker {name}")
        text = before + block + after.partition("<!-- end -->")[2]
    page.write_text(text)
