"""Errors as problem documents (RFC 9457)."""

import math
from collections.abc import Mapping

from fastapi.responses import JSONResponse, Response

from shared.wire import Problem

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
TITLES: Mapping[int, str] = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "The request came too slowly",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    422: "Request cannot be served",
    429: "Server full",
    500: "Unexpected error",
    503: "Not ready",
}


def problem(
    status: int,
    detail: str,
    *,
    field: str | None = None,
    request_id: str | None = None,
    retry_after_s: float = RETRY_AFTER_S,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem document as a response; 429 and 503 carry Retry-After."""
    title = TITLES.get(status, "Error")
    body = Problem(title=title, status=status, detail=detail, field=field, request_id=request_id)
    retry = {"Retry-After": str(math.ceil(retry_after_s))} if status in (429, 503) else {}
    return JSONResponse(
        body.model_dump(exclude_none=True),
        status_code=status,
        headers=retry | dict(headers or {}),
        media_type=MEDIA_TYPE,
    )
