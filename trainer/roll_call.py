"""Who serves and who does not, in words: of few servers their names, of many their number."""

from collections.abc import Collection, Sequence

from shared.fleet import ServerRecord

MOST_NAMES = 8
"""Servers named in one line; of more there is a number alone."""


def not_serving(records: Sequence[ServerRecord]) -> str:
    """Who lives and does not serve, and what they report, to be put behind how many serve."""
    said = {
        r.server_id: f"{r.server_id} {r.state}" + (f": {r.last_error}" if r.last_error else "")
        for r in records
        if not r.state.serves
    }
    if not said:
        return ""
    if len(said) <= MOST_NAMES:
        return f" ({'; '.join(said.values())})"
    example = next((said[r.server_id] for r in records if r.server_id in said and r.last_error), "")
    return f" ({len(said)} do not{', such as ' + example if example else ''})"


def named(names: Collection[str]) -> str:
    """Names in order; of many their number.

    >>> named({"b", "a"}), named([str(n) for n in range(100)])
    ('a, b', '100')
    """
    return str(len(names)) if len(names) > MOST_NAMES else ", ".join(sorted(names))
