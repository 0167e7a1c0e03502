"""Which form an answer takes: what the caller's `Accept` and `Accept-Encoding` ask for (RFC 9110, section 12)."""

from collections.abc import Sequence
from enum import StrEnum

from shared.errors import RequestError


class MediaType(StrEnum):
    """Forms of an answer of `POST /rollout_tree`, the one that is given unasked first."""

    JSON = "application/json"
    MSGPACK = "application/msgpack"
    """The same structure in packed columns, see `shared/codec.py`."""
    NDJSON = "application/x-ndjson"
    """Nodes as they finish, see `shared/stream.py`."""


def choose(accept: str | None, offered: Sequence[MediaType] = tuple(MediaType)) -> MediaType:
    """The form that an `Accept` header likes best.

    Of equally liked forms the one named more exactly wins, then the one named first, then the one offered first.

    Args:
        accept: the header; None where it is absent.
        offered: what may be chosen.

    Raises:
        RequestError: none of them is acceptable; status 406.

    >>> choose("application/json;q=0.5, application/msgpack").value
    'application/msgpack'
    >>> choose("text/html, */*;q=0.1").value
    'application/json'
    """
    ranges = _weighted(accept) if accept and accept.strip() else [("*/*", 1.0)]
    liked: list[
        tuple[float, int, int, int]
    ] = []  # weight, exactness, place in the header, in the offer
    for place, media in enumerate(offered):
        patterns = ("*/*", f"{media.partition('/')[0]}/*", media)
        matches = [
            (patterns.index(name), -position, weight)
            for position, (name, weight) in enumerate(ranges)
            if name in patterns
        ]
        if matches:
            exactness, position, weight = max(matches)  # the most exact range speaks for a form
            liked.append((weight, exactness, position, -place))
    best = max(liked, default=(0.0, 0, 0, 0))
    if best[0] == 0.0:
        raise RequestError(
            "Accept",
            f"no answer is of the kind {accept!r}; ask for {', '.join(offered)}",
            status=406,
        )
    return offered[-best[3]]


def wants_zstd(accept_encoding: str | None) -> bool:
    """Whether an `Accept-Encoding` header takes zstd. It must name it: `*` means no wish for one.

    >>> wants_zstd("gzip, zstd;q=0.5"), wants_zstd("gzip, zstd;q=0"), wants_zstd(None)
    (True, False, False)
    """
    return dict(_weighted(accept_encoding or "")).get("zstd", 0.0) > 0


def _weighted(header: str) -> list[tuple[str, float]]:
    """[(name in lower case, weight)] of a header, in its order; a weight that is no number counts as 0."""
    found: list[tuple[str, float]] = []
    for item in header.split(","):
        name, *parameters = (part.strip() for part in item.lower().split(";"))
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                weight = _number(value)
        found.append((name, weight))
    return found


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0.0 <= value <= 1.0 else 0.0
