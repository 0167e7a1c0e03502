"""The OpenAI routes as the server sees them: forwarded, refused, counted. They themselves are vLLM's."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from server.app import Holder, create_app
from server.costs import Cost
from server.openai_routes import ROUTES, add_openai_routes, cost
from server.states import Phase, Standing
from server.status import Status
from shared.errors import BusyError, RequestError


async def test_another_engine_says_which_one_has_them(server_url: str) -> None:
    async with httpx.AsyncClient(base_url=server_url) as client:
        for path, verb in ROUTES.items():
            answer = await client.request(verb, path)
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "application/problem+json"
            assert "--engine vllm" in answer.json()["detail"]


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.DRAINING])
async def test_a_server_that_does_not_serve_says_so(phase: Phase) -> None:
    holder = Holder(Status(server_id="one", standing=Standing(phase=phase)))
    transport = httpx.ASGITransport(create_app(holder))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for path, verb in ROUTES.items():
            answer = await client.request(verb, path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["detail"] == f"this server is {phase}"


@contextlib.asynccontextmanager
async def forwarded(enter) -> AsyncIterator[httpx.AsyncClient]:
    """A client of routes that forward to an application which answers with the request's path and body."""

    async def answer(request: Request) -> StreamingResponse:
        body = await request.body()

        async def parts():
            yield request.url.path
            yield body

        return StreamingResponse(parts())

    # More than a server forwards, as vLLM's own application would have it.
    paths = [*ROUTES, "/v1/chat/completions/batch", "/pause"]
    engine = Starlette(routes=[Route(path, answer, methods=["GET", "POST"]) for path in paths])
    app = create_app(Holder(Status(server_id="one")))
    app.router.routes = [r for r in app.router.routes if getattr(r, "path", "") not in ROUTES]
    add_openai_routes(app, lambda: (engine, 512), enter)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


async def test_requests_are_entered_with_their_cost_and_others_never_arrive() -> None:
    entered, left = [], []

    @contextlib.asynccontextmanager
    async def enter(cost: Cost) -> AsyncIterator[None]:
        entered.append(cost)
        yield
        left.append(cost)

    async with forwarded(enter) as client:
        body = {"prompt": "Ana", "n": 2, "max_tokens": 7}
        assert (await client.get("/v1/models")).text == "/v1/models"
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = await client.post(path, json=body)
            assert answer.text == path + answer.request.content.decode()
        costs = [Cost(nodes=0, tokens=0), Cost(nodes=2, tokens=14), Cost(nodes=2, tokens=14)]
        assert entered == left == costs
        assert (await client.get("/v1/completions")).status_code == 405
        for path in ("/v1/chat/completions/batch", "/pause", "/v1/models/x"):
            assert (await client.post(path)).status_code == 404
    assert len(entered) == 3


async def test_a_full_server_is_a_429_before_the_request_is_read_by_the_engine() -> None:
    @contextlib.asynccontextmanager
    async def full(cost: Cost) -> AsyncIterator[None]:
        raise BusyError("this server is full", status=429, retry_after_s=7)
        yield

    async with forwarded(full) as client:
        answer = await client.post("/v1/completions", json={"prompt": "Ana", "stream": True})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["detail"] == "this server is full"


@pytest.mark.parametrize(
    ("body", "nodes", "tokens"),
    [
        ({"prompt": "a"}, 1, 16),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 1, 5 + 3),
        ({"prompt": [[1, 2], [3]], "max_tokens": 5, "n": 4}, 8, 40 + 3),
        ({"prompt": ["a"] * 30, "max_tokens": 2**70}, 30, 30 * 512),
        ({"prompt": "a", "n": -1, "max_tokens": 0}, 1, 16),
        ({"prompt": "a", "n": None, "max_tokens": None}, 1, 16),
        ({"prompt": "a", "max_tokens": 500, "max_completion_tokens": 1}, 1, 500),
        ({"prompt": ["a"] * 2048}, 2048, 2048 * 16),
        ({"prompt": [5] * 100_000, "max_tokens": 1}, 1, 1 + 100_000),
        ({"prompt": []}, 0, 0),
        ([], 0, 0),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_completion_can_cost(body: Any, nodes: int, tokens: int) -> None:
    found = cost("/v1/completions", body, 512)
    assert found == Cost(nodes=nodes, tokens=tokens)


def test_a_chat_may_bound_its_tokens_in_two_ways() -> None:
    for body, tokens in (
        ({"max_tokens": 9}, 9),
        ({"max_tokens": 9, "max_completion_tokens": 400}, 400),
        ({"max_tokens": 9, "max_completion_tokens": 0}, 512),
        ({"max_tokens": 9, "max_completion_tokens": None}, 9),
    ):
        assert cost("/v1/chat/completions", body, 512) == Cost(nodes=1, tokens=tokens)


@pytest.mark.parametrize("name", ["n", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", ["30000", 30000.0, 1e9, True, [1], {}], ids=str)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_numbers_that_are_written_otherwise_do_not_pass_by(
    path: str, name: str, value: Any
) -> None:
    async with forwarded(lambda cost: contextlib.nullcontext()) as client:
        answer = await client.post(path, json={"prompt": "a", name: value})
    assert (answer.status_code, answer.json()["field"]) == (400, name)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": [[1]] * 2049}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], [1, "a"]]}, "prompt"),
        ({"prompt": [True, 1]}, "prompt"),
        ({"prompt": [{}]}, "prompt"),
        ({"stop": ["a"] * 20_001}, "body"),
        ({"logit_bias": {str(i): "a" for i in range(20_001)}}, "body"),
        ({"messages": [{"role": 1, "content": [{"type": 1}] * 100}] * 200}, "body"),
        ({str(i): 1 for i in range(20_001)}, "body"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_costs_much_to_refuse_never_arrives(body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as refused:
        cost("/v1/completions", body, 512)
    assert (refused.value.status, refused.value.field) == (400, field)


def test_what_is_no_object_costs_nothing() -> None:
    assert cost("/v1/completions", ["{"], 512) == Cost(nodes=0, tokens=0)


@pytest.mark.parametrize(
    "content",
    [b"{", b"[" * 50_000, b'{"stop": ["\\ud800"]}', b'{"n": 1, "n": 2}', b'{"n": NaN}', b"\xff"],
    ids=str,
)
async def test_what_is_no_json_never_arrives(content: bytes) -> None:
    async with forwarded(lambda cost: contextlib.nullcontext()) as client:
        answer = await client.post("/v1/completions", content=content)
        assert (answer.status_code, answer.json()["field"]) == (400, "body")
        assert answer.headers["content-type"] == "application/problem+json"
        assert (await client.post("/v1/completions", content=b"{}")).status_code == 200
