"""What an answer that is no tree means: tried again elsewhere, or raised. Pure: nothing is sent, no clock is read.

- 502, 503, transport errors: the server is left alone for a while by every request.
- 408, 500, 504, a stale server (409): this request alone tries elsewhere, others may well be served.
- 429: so too, and the server gets no more trees at once than it has of ours.
- 401, 403: ConfigError, the token.
- anything else: RequestError, it would be refused again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from shared.errors import ConfigError
from shared.retry_after import retry_after_s
from shared.wire import Problem

TOKEN_VARIABLE = "SPOKE_TOKEN"
_SERVER = frozenset({502, 503})
_REQUEST = frozenset({408, 429, 500, 504})
_DENIED = {
    401: "takes no request without a valid token",
    403: "does not allow this with the given token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no tree, where another attempt may give it."""

    reason: str
    whole_server: bool = False
    """Every request leaves the server alone for a while; else this one does."""
    full: bool = False
    """The server has no room for one more tree."""
    retry_after_s: float | None = None
    """As the server says; None leaves the wait to us."""


def failure(url: str, found: Problem, headers: Mapping[str, str], now: float) -> Failure:
    """What a problem means.

    Args:
        url: of the server.
        found: as `problem` gives it.
        headers: of the answer, by names in lower case.
        now: Unix seconds.

    Raises:
        ConfigError: the server does not take the token.
        RequestError: the request would be refused again; it names the field and the remedy.
    """
    status = found.status
    if status in _DENIED:
        raise ConfigError(
            f"{url} {_DENIED[status]} ({found.detail}); set {TOKEN_VARIABLE} to one of its tokens, "
            "or pass token=…"
        )
    stale = status == 409 and found.field == "min_weight_version"
    if stale or status in _SERVER | _REQUEST:
        reason = f"{found.field}: {found.detail}" if found.field else found.detail
        return Failure(
            reason=f"{status}: {reason}",
            whole_server=status in _SERVER,
            full=status == 429,
            retry_after_s=retry_after_s(
                headers.get("retry-after"), now=now, date=headers.get("date")
            ),
        )
    raise found.as_error()


def problem(status: int, body: bytes) -> Problem:
    """The problem document in the body of an answer, or one made of what is there; the field is not said twice.

    >>> problem(422, b'{"title": "t", "status": 422, "detail": "plan: too deep", "field": "plan"}').detail
    'too deep'
    >>> problem(502, b"<html>").detail
    '<html>'
    """
    try:
        found = Problem.model_validate_json(body)
    except ValidationError:
        text = body[:200].decode(errors="replace")
        return Problem(title="", status=status, detail=text or f"HTTP {status} without a body")
    detail = found.detail.removeprefix(f"{found.field}: ") if found.field else found.detail
    return found.model_copy(update={"status": status, "detail": detail})
