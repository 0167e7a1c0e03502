"""Errors as problem documents (RFC 9457)."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from server.connection import ClientGoneError
from shared.errors import BusyError, EngineError, RequestError
from shared.wire import Problem, field_path

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
LONGEST = 500
"""Characters of a validation error's text."""
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
    416: "No such range",
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


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of an application with a problem document."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return problem(400, f"the body is not JSON: {first['ctx']['error']}", field="body")
        if isinstance(error.body, bytes):  # FastAPI reads no other kind
            detail = "body: send JSON with Content-Type: application/json"
            return problem(415, detail, field="body")
        field, detail = _describe(first)
        return problem(422, detail, field=field, request_id=_request_id(error.body))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return problem(error.status, str(error), field=error.field, request_id=_named(request))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> Response:
        return problem(
            error.status,
            str(error),
            request_id=_named(request),
            retry_after_s=error.retry_after_s,
        )

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # nobody reads it; access logs do

    @app.exception_handler(EngineError)
    async def engine_failed(request: Request, error: EngineError) -> Response:
        return problem(503, str(error), request_id=_named(request))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The edge of the process: whatever went wrong, the caller gets a document and we get the traceback.
        return problem(500, "an unexpected error; the server's log has the traceback")


def _describe(error: dict[str, Any]) -> tuple[str, str]:
    """(field, detail) of one validation error, in the words of the request."""
    field = field_path([part for part in error["loc"] if part != "body"]) or "body"
    message = str(error["msg"]).removeprefix("Value error, ")[
        :LONGEST
    ]  # it may quote what was sent
    if error["type"] == "extra_forbidden":
        message = "unknown field; remove it or check its spelling"
    elif error["type"] == "missing":
        message = "this field is required"
    return field, f"{field}: {message}"


def _named(request: Request) -> str | None:
    """The id that a request gave itself, once its body has been read."""
    found: str | None = getattr(request.state, "request_id", None)
    return found


def _request_id(body: Any) -> str | None:  # noqa: ANN401  # whatever the caller sent
    found = body.get("request_id") if isinstance(body, dict) else None
    return found if isinstance(found, str) else None
