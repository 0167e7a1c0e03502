"""Seconds of a Retry-After header (RFC 9110, 10.2.3), whatever stands in it. Pure: no clock is read."""

import email.utils
import math

LONGEST_S = 3600.0
"""No wait is longer, whatever a server asks for."""


def retry_after_s(asked: str | None, *, now: float, date: str | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date, from 0 to `LONGEST_S`.

    Args:
        asked: the header; None where there is none.
        now: Unix seconds.
        date: the answer's own `Date`; where it can be read, it counts instead of `now`.

    Returns:
        None where there is no header that can be read.

    >>> retry_after_s("3", now=0.0), retry_after_s("soon", now=0.0), retry_after_s(None, now=0.0)
    (3.0, None, None)
    >>> until, date = "Wed, 21 Oct 2026 07:28:30 GMT", "Wed, 21 Oct 2026 07:28:00 GMT"
    >>> retry_after_s(until, now=0.0, date=date), retry_after_s(until, now=0.0), retry_after_s(date, now=2e9)
    (30.0, 3600.0, 0.0)
    """
    if asked is None:
        return None
    try:
        seconds = float(asked)
    except ValueError:
        until = _unix(asked)
        if until is None:
            return None
        own = _unix(date or "")
        seconds = until - (now if own is None else own)
    return None if math.isnan(seconds) else min(max(0.0, seconds), LONGEST_S)


def _unix(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):  # no date, or one of a year that cannot be
        return None
