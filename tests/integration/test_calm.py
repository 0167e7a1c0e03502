"""A server that can be left alone: full, abandoned, stopped, broken. Real processes on real sockets.

1. Beyond its capacity and a short line a server says 429 with Retry-After; whoever comes back then gets a tree.
2. A tree over the budget is 413 and names the plan, also where only its growth could tell.
3. A client that goes away takes its tree with it within a second, unless another waits for the same tree.
4. A server told to stop leaves the fleet first, ends what it has, hands back what does not end in time, exits 0.
5. A dead or silent engine takes the server down with one clear line.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
from support import ServerProcess, running_server

from shared.coordination import RedisCoordinator

PROMPT = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
SMALL = {"kind": "tree", "branch_factors": [3, 2, 2], "segment_tokens": 8}
LONG = {"kind": "group", "samples": 4000}
"""Minutes of work for a batch of two rows."""
START = ("--engine", "transformers", "--dtype", "float32", "--reward-workers", "1")


def body(plan: dict[str, Any] = SMALL, **changes: Any) -> dict[str, Any]:
    reward = {"name": "gsm8k", "reference": "17"}
    return {"prompt": PROMPT, "plan": plan, "reward": reward, "return_text": False} | changes


@contextlib.contextmanager
def server(model: Path, folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    with running_server(model, folder / "server.log", *START, *arguments) as process:
        yield process


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


async def until(condition: Any, timeout_s: float = 20.0) -> float:
    """Seconds until a condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "it did not come to that"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_full_server_says_when_to_come_back(tiny_math: Path, tmp_path: Path) -> None:
    # Three trees of 21 nodes at once, and three in line.
    with server(tiny_math, tmp_path, "--max-nodes-in-flight", "63") as process:
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            first = await asyncio.gather(
                *(client.post("/rollout_tree", json=body()) for _ in range(40))
            )
            busy = [answer for answer in first if answer.status_code == 429]
            assert {answer.status_code for answer in first} == {200, 429}
            assert len(busy) >= 20
            for answer in busy:
                assert answer.headers["content-type"] == "application/problem+json"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["status"] == 429
            again = await client.post("/rollout_tree", json=body())
            assert again.status_code == 200
        assert metric(process.url, 'spoke_trees_total{outcome="busy"}') == len(busy)
        assert metric(process.url, "spoke_nodes_in_flight") == 0


async def test_a_tree_over_the_budget_is_413(tiny_math: Path, tmp_path: Path) -> None:
    bounds = ("--max-tree-nodes", "50", "--max-tree-tokens", "6000")
    with server(tiny_math, tmp_path, *bounds) as process:
        chain = {"kind": "chain", "samples": 6, "value_rollouts": 40,
                 "partition": {"kind": "delimiter", "delimiter": "."}}  # fmt: skip
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            for plan in ({"kind": "group", "samples": 51}, chain):
                answer = await client.post("/rollout_tree", json=body(plan))
                assert answer.status_code == 413, answer.text
                assert answer.json()["field"] == "plan"
                assert "50 nodes" in answer.json()["detail"]
            assert (await client.post("/rollout_tree", json=body())).status_code == 200
            # A probe counts as what its responses may have, not as whole contexts.
            probed = body(savings={"probe": 20}, sampling={"max_tokens": 24})
            assert (await client.post("/rollout_tree", json=probed)).status_code == 200
            probed = body(savings={"probe": 40}, sampling={"max_tokens": 24})
            assert (await client.post("/rollout_tree", json=probed)).status_code == 413
            assert (await client.get("/info")).json()["limits"]["tree_nodes"] == 50


async def test_a_client_that_goes_away_takes_its_tree_with_it(
    tiny_math: Path, tmp_path: Path
) -> None:
    with server(tiny_math, tmp_path, "--max-batch", "2") as process:
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            leaving = asyncio.create_task(client.post("/rollout_tree", json=body(LONG)))
            await until(lambda: metric(process.url, "spoke_trees_in_flight") == 1)
            leaving.cancel()
            took = await until(lambda: metric(process.url, "spoke_trees_in_flight") == 0)
            assert took < 10
            assert metric(process.url, 'spoke_trees_total{outcome="cancelled"}') == 1
            # To the last engine request: 4,000 samples would keep both rows for minutes.
            began = time.monotonic()
            assert (await client.post("/rollout_tree", json=body())).status_code == 200
            assert time.monotonic() - began < 20


async def test_a_reader_that_leaves_a_stream_takes_its_tree_with_it(
    tiny_math: Path, tmp_path: Path
) -> None:
    with server(tiny_math, tmp_path, "--max-batch", "2") as process:
        headers = {"accept": "application/x-ndjson"}
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            request = client.stream("POST", "/rollout_tree", json=body(LONG), headers=headers)
            async with request as answer:
                await anext(answer.aiter_lines())  # nodes come while 4,000 others wait
                assert metric(process.url, "spoke_trees_in_flight") == 1
            assert await until(lambda: metric(process.url, "spoke_trees_in_flight") == 0) < 10
            assert (await client.post("/rollout_tree", json=body())).status_code == 200
        assert "was destroyed" not in process.log.read_text()


async def test_many_readers_that_leave_streams_leave_nothing(
    tiny_math: Path, tmp_path: Path
) -> None:
    async def leave(client: httpx.AsyncClient) -> None:
        headers = {"accept": "application/x-ndjson"}
        request = client.stream("POST", "/rollout_tree", json=body(LONG), headers=headers)
        async with request as answer:
            await anext(answer.aiter_lines())

    with server(tiny_math, tmp_path, "--max-batch", "2") as process:
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            tasks = metric(process.url, "spoke_tasks")
            for _ in range(6):
                await leave(client)
                await until(lambda: metric(process.url, "spoke_engine_sequences") == 0)
        assert await until(lambda: metric(process.url, "spoke_tasks") <= tasks, 30) < 10
        assert "was destroyed" not in process.log.read_text()


async def test_a_tree_that_another_waits_for_goes_on(tiny_math: Path, tmp_path: Path) -> None:
    shared = body({"kind": "group", "samples": 60}, request_id="shared")
    with server(tiny_math, tmp_path, "--max-batch", "2") as process:
        async with (
            httpx.AsyncClient(base_url=process.url, timeout=60) as one,
            httpx.AsyncClient(base_url=process.url, timeout=60) as other,
        ):
            leaving = asyncio.create_task(one.post("/rollout_tree", json=shared))
            await until(lambda: metric(process.url, "spoke_trees_in_flight") == 1)
            staying = asyncio.create_task(other.post("/rollout_tree", json=shared))
            await until(lambda: metric(process.url, "spoke_requests_in_flight") == 2)
            leaving.cancel()
            answer = await staying
            assert answer.status_code == 200
            assert len(answer.json()["nodes"]) == 61
            # Kept: the same id again is answered from memory, token for token.
            assert (await other.post("/rollout_tree", json=shared)).json() == answer.json()
            assert metric(process.url, "spoke_tree_seconds_count") == 1
            # Two at one moment: one is sampled, and one waits for it.
            repeated = metric(process.url, 'spoke_trees_total{outcome="repeated"}')
            pair = body(request_id="pair")
            both = await asyncio.gather(
                *(client.post("/rollout_tree", json=pair) for client in (one, other))
            )
            assert both[0].json() == both[1].json()
            assert metric(process.url, "spoke_tree_seconds_count") == 2
            assert metric(process.url, 'spoke_trees_total{outcome="repeated"}') == repeated + 1


async def test_a_stopped_server_leaves_the_fleet_and_then_drains(
    tiny_math: Path, tmp_path: Path, redis_url: str
) -> None:
    follow = ("--redis-url", redis_url, "--run", "drain", "--server-id", "drains")
    with server(tiny_math, tmp_path, "--max-batch", "2", *follow) as process:
        coordinator = RedisCoordinator(redis_url, "drain")
        assert [record.server_id for record in await coordinator.servers()] == ["drains"]
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            plan = {"kind": "group", "samples": 150}
            growing = asyncio.create_task(client.post("/rollout_tree", json=body(plan)))
            await until(lambda: metric(process.url, "spoke_trees_in_flight") == 1)
            process.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while await coordinator.servers():
                    await asyncio.sleep(0.01)
            assert not growing.done()  # it left before it had ended what it does
            refused = await client.post("/rollout_tree", json=body())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["detail"] == "this server is draining"
            assert (await growing).status_code == 200
            assert len((await growing).json()["nodes"]) == 151
        await coordinator.close()
        assert await asyncio.to_thread(process.process.wait, 20) == 0


async def test_what_does_not_end_in_time_is_handed_back(tiny_math: Path, tmp_path: Path) -> None:
    with server(tiny_math, tmp_path, "--max-batch", "2", "--drain", "0.2") as process:
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            growing = asyncio.create_task(client.post("/rollout_tree", json=body(LONG)))
            await until(lambda: metric(process.url, "spoke_trees_in_flight") == 1)
            process.process.send_signal(signal.SIGTERM)
            answer = await growing
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "2"
        assert "ask another one" in answer.json()["detail"]
        assert await asyncio.to_thread(process.process.wait, 20) == 0
        assert "handed back 1 trees" in process.log.read_text()


async def test_a_background_task_that_dies_takes_the_server_down(
    tiny_math: Path, tmp_path: Path, redis_url: str
) -> None:
    key = "spoke:{dies}:server:one"
    follow = ("--redis-url", redis_url, "--run", "dies", "--server-id", "one")
    with server(tiny_math, tmp_path, *follow) as process:
        client = redis.asyncio.Redis.from_url(redis_url)
        # As if another process lived under its id: the heartbeat cannot go on, and must not end unseen.
        record = json.loads(await client.get(key)) | {"instance": "another"}
        await client.set(key, json.dumps(record), px=60_000)
        assert await asyncio.to_thread(process.process.wait, 30) == 1
        assert "this server ends: --server-id one" in process.log.read_text()
        await client.delete(key)
        await client.aclose()


def engine_of(process: subprocess.Popen[bytes]) -> int:
    """The engine's process: of the server's children the one that maps torch and serves no reward."""
    pid = process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/comm").read_text() for child in children}
    memory = {child: int(Path(f"/proc/{child}/statm").read_text().split()[1]) for child in names}
    return max(memory, key=lambda child: memory[child])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (signal.SIGKILL, "this server ends: vLLM's process is gone"),
        (signal.SIGSTOP, "this server ends: the engine gave no sign of life in 2 s"),
    ],
)
async def test_an_engine_that_is_dead_or_silent_takes_the_server_down(
    tiny_math: Path, tmp_path: Path, stop: signal.Signals, line: str
) -> None:
    vllm = ("--engine", "vllm", "--liveness-timeout", "2", "--kv-cache-gib", "0.1")
    with server(tiny_math, tmp_path, *vllm) as process:
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            assert (await client.get("/livez")).json() == {"status": "alive"}
        engine = engine_of(process.process)
        try:
            os.kill(engine, stop)
            async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
                with contextlib.suppress(httpx.TransportError):  # it may have ended already
                    async with asyncio.timeout(60):
                        while (answer := await client.get("/livez")).status_code == 200:
                            pass  # an answer stands for a second
                    assert answer.status_code == 503
            assert await asyncio.to_thread(process.process.wait, 60) == 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        assert line in process.log.read_text()
