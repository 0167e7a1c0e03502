"""The HTTP face: routes, and every error as a problem document (RFC 9457)."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from server.respond import CONTENT, WHOLE, tree_response
from server.service import RolloutService, Status
from shared.codec import choose
from shared.errors import EngineError, RequestError
from shared.wire import Problem, RolloutTreeRequest, RolloutTreeResponse, field_path

RETRY_AFTER_S = 1
LOGPROBS = (
    "log-probability (nats) of each token under the distribution it was sampled from: after temperature, "
    "renormalised where top_p or top_k truncates it; at temperature 0 that of temperature 1"
)
TITLES = {
    400: "Bad request",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    409: "Conflict",
    413: "Too large",
    422: "Request cannot be served",
    503: "Not ready",
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": TITLES[status]}
    for status in (400, 406, 409, 422, 503)
}


class Holder:
    """What the routes reach: the status from the start, the service once the model is loaded."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.service: RolloutService | None = None


def problem(
    status: int, detail: str, *, field: str | None = None, request_id: str | None = None
) -> Response:
    """A problem document as a response; 503 carries Retry-After."""
    title = TITLES.get(status, "Error")
    body = Problem(title=title, status=status, detail=detail, field=field, request_id=request_id)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    return JSONResponse(
        body.model_dump(exclude_none=True),
        status_code=status,
        headers=headers,
        media_type="application/problem+json",
    )


def create_app(holder: Holder) -> FastAPI:
    """The application around one server's holder."""
    app = FastAPI(title="Spoke rollout server", version="0.1.0", docs_url="/docs", redoc_url=None)
    _add_routes(app, holder)
    _add_error_handlers(app)
    return app


def _add_routes(app: FastAPI, holder: Holder) -> None:
    status = holder.status

    def service() -> RolloutService:
        if holder.service is None or not status.state.serves:
            raise HTTPException(503, f"this server is {status.state}")
        return holder.service

    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": RolloutTreeResponse, "content": CONTENT}
    }

    @app.post("/rollout_tree", response_class=Response, responses=_PROBLEMS | answers)
    async def rollout_tree(request: RolloutTreeRequest, http: Request) -> Response:
        """Sample one tree of continuations, grade its leaves and back their values up."""
        accept, encoding = (
            ", ".join(http.headers.getlist(name)) for name in ("accept", "accept-encoding")
        )
        choose(accept, WHOLE)  # refused before anything is sampled
        return await tree_response(await service().rollout_tree(request), accept, encoding)

    @app.get("/livez", responses={503: _PROBLEMS[503]})
    async def livez() -> dict[str, str]:
        """The process answers, and so does the engine once it is loaded."""
        if holder.service is not None:
            await holder.service.engine.check()
        return {"status": "alive"}

    @app.get("/readyz", responses={503: _PROBLEMS[503]})
    async def readyz() -> dict[str, Any]:
        """The model is loaded and its weights may be served."""
        return {"status": status.state, "version": service().engine.version}

    @app.get("/info", responses={503: _PROBLEMS[503]})
    async def info() -> dict[str, Any]:
        """Model, engine, limits, weight version and logprob convention."""
        if holder.service is None:
            raise HTTPException(503, f"this server is {status.state}")
        engine = holder.service.engine
        about = engine.info
        return {
            "server_id": status.server_id,
            "state": status.state,
            "model": about.model,
            "engine": about.engine,
            "dtype": about.dtype,
            "device": about.device,
            "vocab_size": about.vocab_size,
            "eos_token_ids": list(about.eos_token_ids),
            "limits": {"max_model_len": about.max_model_len},
            "weights": {"version": engine.version, "digest": status.weights_digest},
            "rewards": holder.service.rewards.names(),
            "logprobs": LOGPROBS,
        }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return problem(400, f"the body is not JSON: {first['ctx']['error']}", field="body")
        field, detail = _describe(first)
        return problem(422, detail, field=field, request_id=_request_id(error.body))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return problem(error.status, str(error), field=error.field)

    @app.exception_handler(EngineError)
    async def engine_failed(request: Request, error: EngineError) -> Response:
        return problem(503, str(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The edge of the process: whatever went wrong, the caller gets a document and we get the traceback.
        return problem(500, "an unexpected error; the server's log has the traceback")


def _describe(error: dict[str, Any]) -> tuple[str, str]:
    """(field, detail) of one validation error, in the words of the request."""
    field = field_path([part for part in error["loc"] if part != "body"]) or "body"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "unknown field; remove it or check its spelling"
    elif error["type"] == "missing":
        message = "this field is required"
    return field, f"{field}: {message}"


def _request_id(body: Any) -> str | None:  # noqa: ANN401  # whatever the caller sent
    found = body.get("request_id") if isinstance(body, dict) else None
    return found if isinstance(found, str) else None
