"""FakeFollower: a server that follows a run in a real Redis and answers tree requests over a real socket.

What it samples is made up from the request alone, so that a run can be compared bit for bit with a loop written
down in a test, and it can be told to hold its answers, to lag, to lie or to die at a moment of the test's choice.
"""

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from support import free_port

from shared.coordination import RedisCoordinator
from shared.errors import CoordinationError
from shared.fleet import ServerRecord, ServerState

REPORT_S = 0.02


def made_up_tree(request: dict[str, Any], version: int) -> dict[str, Any]:
    """A group of four short responses: tokens and rewards from the request's question and seed alone."""
    rng = random.Random(f"{request['prompt']}/{request['sampling'].get('seed')}")
    prompt = [2 + byte % 300 for byte in hashlib.sha256(request["prompt"].encode()).digest()[:5]]
    nodes: list[dict[str, Any]] = [
        {"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": prompt, "value": 0.5}
    ]
    for place in range(1, 5):
        count = rng.randint(2, 6)
        nodes.append(
            {
                "id": place, "parent": 0, "depth": 1,
                "token_ids": [rng.randint(2, 300) for _ in range(count)],
                "logprobs": [rng.uniform(-7.0, -5.0) for _ in range(count)],
                "versions": [[version, count]], "finish_reason": "stop",
                "reward": float(rng.random() < 0.5), "value": None,
            }
        )  # fmt: skip
    sampled = sum(len(node["token_ids"]) for node in nodes[1:])
    return {
        "request_id": request["request_id"], "server_id": "fake", "model": "m", "nodes": nodes,
        "usage": {
            "prompt_tokens": 5, "sampled_tokens": sampled, "computed_prefill_tokens": 5, "cached_tokens": 0,
        },
        "weight_versions": {"min": version, "max": version},
        "timing": {"queue_s": 0, "sample_s": 0, "reward_s": 0},
    }  # fmt: skip


class FakeFollower:
    """One fake server.

    Args:
        redis_url: of the run's Redis.
        run: that it follows.
        name: its id.
    """

    def __init__(self, redis_url: str, run: str, name: str = "fake") -> None:
        self.coordinator = RedisCoordinator(redis_url, run)
        self.name = name
        self.version, self.digest = -1, ""
        self.asked: list[dict[str, Any]] = []
        """Tree requests, in the order they came; those of evaluations too."""
        self.came = asyncio.Event()
        self.may_answer: Callable[[dict[str, Any]], bool] = lambda request: True
        self.follows = True
        """False: new versions are heard of and not taken."""
        self.lies = 0
        """Trees are said to be of a version so much older."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def steps(self) -> list[str]:
        """The step of each training request, by arrival."""
        ids = [request["request_id"] for request in self.asked]
        return [id_.split("/")[-2] for id_ in ids if "/step-" in id_]

    async def until(self, true: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait for something that requests or reports bring about."""
        async with asyncio.timeout(timeout_s):
            while not true():
                self.came.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REPORT_S):
                        await self.came.wait()

    async def _answer(self, http: Request) -> Any:
        request = await http.json()
        if request["min_weight_version"] > self.version:
            problem = {
                "title": "stale", "status": 409, "field": "min_weight_version",
                "detail": f"holds {self.version}",
            }  # fmt: skip
            return JSONResponse(problem, status_code=409, headers={"Retry-After": "0"})
        self.asked.append(request)
        self.came.set()
        version = self.version - self.lies
        async with asyncio.timeout(60):
            while not self.may_answer(request):
                await asyncio.sleep(0.005)
        return JSONResponse(made_up_tree(request, version))

    async def _report(self) -> None:
        while True:
            with contextlib.suppress(CoordinationError):
                head = await self.coordinator.head()
                if head is not None and self.follows and head.version > self.version:
                    self.version, self.digest = head.version, head.weights_digest
                await self.coordinator.report(
                    ServerRecord(
                        server_id=self.name, url=self.url, state=ServerState.READY,
                        version=max(0, self.version), digest=self.digest, model="m", engine="fake",
                        updated_at=time.time(),
                    )
                )  # fmt: skip
            await asyncio.sleep(REPORT_S)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FakeFollower"]:
        """Answers and reports while the block runs; then its record is gone, as when it dies and time passes."""
        app = FastAPI()
        app.add_api_route("/rollout_tree", self._answer, methods=["POST"], response_model=None)
        config = uvicorn.Config(app, port=self.port, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        reporting = asyncio.create_task(self._report())
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.01)
        try:
            yield self
        finally:
            reporting.cancel()
            self.may_answer = lambda request: True
            server.should_exit = True
            await serving
            with contextlib.suppress(CoordinationError):
                await self.coordinator.leave(self.name)
            await self.coordinator.close()
