"""FakeServer: a rollout server that answers as scripted, on a real uvicorn and a real socket.

A real server cannot be made to refuse, stall or die on demand. It runs in a thread of its own, so that a test may
block as a caller without an event loop does.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from support import free_port

from shared.wire import GroupPlan, RolloutTreeRequest

ANSWER = {
    "request_id": "r", "server_id": "s", "model": "m",
    "nodes": [
        {"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [1]},
        {"id": 1, "parent": 0, "depth": 1, "token_ids": [2], "logprobs": [-0.5], "versions": [[0, 1]]},
    ],
    "usage": {"prompt_tokens": 1, "sampled_tokens": 1, "computed_prefill_tokens": 1, "cached_tokens": 0},
    "weight_versions": {"min": 0, "max": 0},
    "timing": {"queue_s": 0, "sample_s": 0, "reward_s": 0},
}  # fmt: skip

REQUEST = RolloutTreeRequest(request_id="r", prompt="1", plan=GroupPlan(samples=1))


def asking(prompt: str) -> RolloutTreeRequest:
    """Another question, without an id."""
    return REQUEST.model_copy(update={"prompt": prompt, "request_id": None})


def problem(status: int, field: str | None = None, **headers: str) -> JSONResponse:
    body = {"title": "t", "status": status, "detail": f"{field}: no", "field": field}
    return JSONResponse(
        body, status_code=status, headers=headers, media_type="application/problem+json"
    )


class FakeServer:
    """Answers its i-th request with `script(i)`: a response, or a coroutine that gives one."""

    def __init__(self, script: Callable[[int], Any]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[tuple[str, int]] = set()
        """The callers' ports: one for each TCP connection."""
        self.asked = threading.Event()
        self.left = threading.Event()
        """Set when a caller has gone away without its answer."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def ids(self) -> list[str]:
        return [body["request_id"] for body in self.bodies]

    async def ready(self) -> Any:
        """What it says at `/readyz`; a test may put something else in its place."""
        return {"status": "ready"}

    async def stall(self) -> Any:
        """An answer that never comes; notes a caller that goes away."""
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()

    async def _answer(self, request: Request) -> Any:
        self.connections.add(tuple(request.scope["client"]))
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        given = self.script(len(self.bodies) - 1)
        self.asked.set()
        if not asyncio.iscoroutine(given):
            return given
        work, gone = asyncio.ensure_future(given), asyncio.ensure_future(_gone(request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        work.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        return JSONResponse({}) if work.cancelled() else work.result()

    @contextlib.contextmanager
    def running(self) -> Iterator["FakeServer"]:
        app = FastAPI()
        app.add_api_route("/rollout_tree", self._answer, methods=["POST"], response_model=None)
        app.add_api_route("/readyz", self.ready, methods=["GET"])
        app.add_api_route("/info", lambda: {"server_id": "fake"}, methods=["GET"])
        config = uvicorn.Config(app, port=self.port, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        started = threading.Event()
        server_startup = server.startup

        async def startup(*args: Any, **kwargs: Any) -> None:
            await server_startup(*args, **kwargs)
            started.set()

        server.startup = startup  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            assert started.wait(10)
            yield self
        finally:
            server.should_exit = True
            server.force_exit = True
            thread.join(10)


Fake = Callable[[Callable[[int], Any]], FakeServer]
"""Starts a server with a script: the fixture `fake`."""


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def dies_mid_answer() -> StreamingResponse:
    """Half an answer, then the connection ends as if the process had been killed."""

    async def half() -> AsyncIterator[bytes]:
        yield b'{"request_id": "r", '
        raise RuntimeError("killed")

    return StreamingResponse(half(), media_type="application/json")
