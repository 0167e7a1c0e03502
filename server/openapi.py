"""The OpenAPI document: an example of every plan and of every error, and what a token is for."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.models import Example
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.guard import needed
from server.problems import MEDIA_TYPE, TITLES
from shared.wire import Problem

_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_PROMPT = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"


def _chain(partition: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "chain", "samples": 2, "partition": partition, "value_rollouts": 3}


_PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "tree": (
        "SPO-tree: 3, then 2, then 2 children, segments of 8 tokens",
        {"kind": "tree", "branch_factors": [3, 2, 2], "segment_tokens": 8},
    ),
    "chain-cutpoints": (
        "SPO-chain: values at every fifth cutpoint",
        _chain({"kind": "cutpoints", "threshold": 0.9, "interval": 5}),
    ),
    "chain-fixed": (
        "values every 20 tokens",
        _chain({"kind": "fixed", "tokens": 20}),
    ),
    "chain-delimiter": (
        "VinePPO: values after every line",
        _chain({"kind": "delimiter", "delimiter": "\n"}),
    ),
    "chain-whole": (
        "a value at the prompt alone",
        _chain({"kind": "whole"}),
    ),
    "group": ("GRPO, RLOO, PPO: independent responses", {"kind": "group", "samples": 4}),
}
REQUEST_EXAMPLES: dict[str, Example] = {
    name: Example(
        summary=summary,
        value={
            "prompt": _PROMPT,
            "plan": plan,
            "sampling": {"temperature": 1.0, "max_tokens": 40, "seed": 5},
            "reward": {"name": "gsm8k", "reference": "17"},
        },
    )
    for name, (summary, plan) in _PLANS.items()
}
"""Request bodies of `POST /rollout_tree`; each can be sent as it stands."""

_DETAILS: dict[int, tuple[str, str | None]] = {
    400: ("the body is not JSON: expected value at line 1 column 2", "body"),
    401: ("send Authorization: Bearer TOKEN with a token that has the scope rollout", None),
    403: ("this token lacks the scope rollout; ask the server's owner for one that has it", None),
    404: ("Not Found", None),
    405: ("Method Not Allowed", None),
    406: ("accept: this server answers in application/json", "accept"),
    408: ("body: nothing came for 10 s, or it was not whole after 60 s; send it again", "body"),
    409: (
        "request_id: 'q-17' was used with another body; use a new id for a new request",
        "request_id",
    ),
    413: ("body: it has more than 16777216 bytes; send less, or raise --max-body-mib", "body"),
    415: ("body: send JSON with Content-Type: application/json", "body"),
    416: ("range: this file has 1048576 bytes", "range"),
    422: ("plan.branch_factors.0: Input should be greater than or equal to 1", "plan.branch_factors.0"),
    429: ("this server is full; try again after the seconds that Retry-After names", None),
    500: ("an unexpected error; the server's log has the traceback", None),
    503: ("this server is stale: it holds version 3, the run is at 7, at most 1 behind may serve", None),
}  # fmt: skip
_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    403: {"WWW-Authenticate": "Bearer, with the scope that is needed"},
    405: {"Allow": "Methods of this path."},
    416: {"Content-Range": "`bytes */` and the file's size."},
    429: {"Retry-After": "Seconds."},
    503: {"Retry-After": "Seconds."},
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route adds to its `responses`: problem documents by status, each with an example."""
    return {status: _refusal(status) for status in statuses}


def _refusal(status: int) -> dict[str, Any]:
    detail, field = _DETAILS[status]
    example = {"type": "about:blank", "title": TITLES[status], "status": status, "detail": detail}
    described: dict[str, Any] = {
        "description": TITLES[status],
        "content": {
            MEDIA_TYPE: {
                "schema": _PROBLEM,
                "example": example | ({} if field is None else {"field": field}),
            }
        },
    }
    if status in _HEADERS:
        described["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS[status].items()
        }
    return described


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application: made once, what the middleware answers added to every route."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, defined = models_json_schema(
            [(Problem, "serialization")], ref_template="#/components/schemas/{model}"
        )
        components = made.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas.update(defined["$defs"])
        components["securitySchemes"] = {
            "bearer": {
                "type": "http",
                "scheme": "bearer",
                "description": "A token of the server's owner, with scopes: rollout, admin, metrics, weights.",
            }
        }
        for path, operations in made["paths"].items():
            for operation in operations.values():
                _complete(path, operation)
        if "HTTPValidationError" not in str(made["paths"]):
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        app.openapi_schema = made
    return app.openapi_schema


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Add what the middleware answers, and put problem documents where FastAPI puts its own kind."""
    answers = operation.setdefault("responses", {})
    scope = needed(path)
    operation["security"] = [] if scope is None else [{"bearer": []}]
    statuses = [404, 405] if scope is None else [401, 403, 404, 405]
    statuses += [400, 408, 413, 415, 422] if "requestBody" in operation else [408, 413]
    ours = not path.startswith("/v1/")  # those answer as OpenAI does
    known = [int(status) for status in answers if str(status).isdigit() and int(status) in _DETAILS]
    for status in {*statuses, *(known if ours else [])}:
        if ours or str(status) not in answers:
            answers[str(status)] = _refusal(status)
    operation["responses"] = dict(sorted(answers.items()))
