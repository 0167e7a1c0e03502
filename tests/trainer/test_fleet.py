"""The fleet client against fake servers on real sockets: who is asked, what is retried, what is not.

The servers here are fakes: they answer as scripted, since a real one cannot be made to fail on demand.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from support import free_port

from shared.errors import FleetError, RequestError
from shared.fleet import Head, ServerRecord, ServerState
from shared.wire import GroupPlan, RolloutTreeRequest
from trainer.fleet import Fleet, Target, fixed, wait_for_head, wait_for_servers

REQUEST = RolloutTreeRequest(request_id="r", prompt="1", plan=GroupPlan(samples=1))
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


@asynccontextmanager
async def fake_server(answer: Callable[[int], Any]) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that answers its i-th request with `answer(i)`: a response, or a coroutine that gives one."""
    app, asked = FastAPI(), []

    @app.post("/rollout_tree")
    async def rollout_tree(request: Request) -> Any:
        asked.append((await request.json())["request_id"])
        given = answer(len(asked) - 1)
        return await given if asyncio.iscoroutine(given) else given

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", asked
    finally:
        server.should_exit = True
        await task


def problem(status: int, field: str | None = None, **headers: str) -> JSONResponse:
    body = {"title": "t", "status": status, "detail": f"{field}: no", "field": field}
    return JSONResponse(body, status_code=status, headers=headers)


@pytest.fixture
async def open_fleet():
    opened: list[Fleet] = []

    def make(*urls: str, timeout_s: float = 10.0) -> Fleet:
        opened.append(Fleet(fixed(*urls), timeout_s=timeout_s))
        return opened[-1]

    yield make
    for fleet in opened:
        await fleet.close()


async def test_a_dead_server_costs_time_and_no_tree(open_fleet) -> None:
    async with fake_server(lambda i: ANSWER) as (url, asked):
        fleet = open_fleet(f"http://127.0.0.1:{free_port()}", url)
        assert (await fleet.rollout_tree(REQUEST)).request_id == "r"
        assert asked == ["r"]


@pytest.mark.parametrize(
    "refusal", [problem(503, **{"Retry-After": "0"}), problem(409, "min_weight_version")]
)
async def test_passing_refusals_are_retried_by_the_same_id(
    open_fleet, refusal: JSONResponse
) -> None:
    async with fake_server(lambda i: refusal if i < 2 else ANSWER) as (url, asked):
        assert (await open_fleet(url).rollout_tree(REQUEST)).server_id == "s"
        assert asked == ["r", "r", "r"]


async def test_a_bad_request_is_raised_at_once(open_fleet) -> None:
    async with fake_server(lambda i: problem(422, "reward.name")) as (url, asked):
        with pytest.raises(RequestError, match=r"reward\.name") as caught:
            await open_fleet(url).rollout_tree(REQUEST)
        assert (caught.value.field, caught.value.status, len(asked)) == ("reward.name", 422, 1)


async def test_the_bound_holds_and_names_the_last_reason(open_fleet) -> None:
    async with fake_server(lambda i: problem(503)) as (url, _):
        with pytest.raises(FleetError, match=r"no tree within 0.6 s.*None: no"):
            await open_fleet(url, timeout_s=0.6).rollout_tree(REQUEST)
    with pytest.raises(FleetError, match="no live server"):
        await open_fleet(timeout_s=0.3).rollout_tree(REQUEST)


async def test_a_server_that_hangs_is_given_up_at_the_bound(open_fleet) -> None:
    async with fake_server(lambda i: asyncio.sleep(1.5, ANSWER)) as (url, _):
        with pytest.raises(FleetError, match="ReadTimeout"):
            await open_fleet(url, timeout_s=0.5).rollout_tree(REQUEST)


async def test_the_least_loaded_server_is_asked(open_fleet) -> None:
    gate = asyncio.Event()

    async def slow() -> Any:
        await gate.wait()
        return ANSWER

    async with (
        fake_server(lambda i: slow()) as (a, asked_a),
        fake_server(lambda i: slow()) as (b, asked_b),
    ):
        fleet = open_fleet(a, b)
        tasks = [asyncio.create_task(fleet.rollout_tree(REQUEST)) for _ in range(6)]
        async with asyncio.timeout(10):
            while len(asked_a) + len(asked_b) < 6:
                await asyncio.sleep(0.01)
        assert len(asked_a) == len(asked_b) == 3
        gate.set()
        await asyncio.gather(*tasks)


async def test_a_server_with_the_wanted_version_is_preferred() -> None:
    async with (
        fake_server(lambda i: ANSWER) as (old, asked_old),
        fake_server(lambda i: ANSWER) as (new, asked_new),
    ):

        async def servers() -> list[Target]:
            return [Target(url=old, version=1), Target(url=new, version=2, load=9)]

        fleet = Fleet(servers)
        await fleet.rollout_tree(REQUEST.model_copy(update={"min_weight_version": 2}))
        await fleet.close()
        assert (asked_old, asked_new) == ([], ["r"])


HEAD = Head(version=2, manifest_digest="m", weights_digest="w", store="s")


class FakeCoordinator:
    """Scripted fleet tables, one a call; the last one stays."""

    def __init__(self, *tables: list[ServerRecord]) -> None:
        self.tables = list(tables)

    async def servers(self) -> list[ServerRecord]:
        return self.tables.pop(0) if len(self.tables) > 1 else self.tables[0]


def record(
    name: str, version: int = 2, state: ServerState = ServerState.READY, error: str | None = None
):
    return ServerRecord(
        server_id=name, url="u", state=state, version=version, digest="w" if version == 2 else "x",
        model="m", engine="e", last_error=error, updated_at=0.0,
    )  # fmt: skip


async def test_waiting_ends_when_every_live_server_holds_the_head() -> None:
    slow = FakeCoordinator(
        [record("a"), record("b", 1)], [record("a"), record("b", 1)], [record("a"), record("b")]
    )
    holders = await wait_for_head(slow, HEAD, min_servers=1, timeout_s=5)  # type: ignore[arg-type]
    assert [r.server_id for r in holders] == ["a", "b"]


async def test_a_server_that_dies_is_waited_for_no_longer() -> None:
    dying = FakeCoordinator([record("a"), record("b", 1)], [record("a")])
    holders = await wait_for_head(dying, HEAD, min_servers=1, timeout_s=5)  # type: ignore[arg-type]
    assert [r.server_id for r in holders] == ["a"]


async def test_a_laggard_is_left_behind_at_the_bound() -> None:
    lagging = FakeCoordinator([record("a"), record("b", 1)])
    holders = await wait_for_head(lagging, HEAD, min_servers=1, timeout_s=0.1)  # type: ignore[arg-type]
    assert [r.server_id for r in holders] == ["a"]


async def test_too_few_holders_is_an_error_that_says_what_the_others_say() -> None:
    broken = FakeCoordinator([record("a"), record("b", 1, error="disk full")])
    with pytest.raises(FleetError, match=r"1 of at least 2 servers hold it.*b: disk full"):
        await wait_for_head(broken, HEAD, min_servers=2, timeout_s=0.1)  # type: ignore[arg-type]


async def test_waiting_for_servers_has_a_bound() -> None:
    loading = FakeCoordinator([record("a", state=ServerState.LOADING)])
    with pytest.raises(FleetError, match="0 of 1 servers are ready"):
        await wait_for_servers(loading, 1, 0.1)  # type: ignore[arg-type]


async def test_a_wait_for_servers_that_takes_long_is_told_once(monkeypatch: Any) -> None:
    monkeypatch.setattr("trainer.fleet.QUIET_S", 0.0)
    told: list[str] = []
    loading = FakeCoordinator([record("a", state=ServerState.LOADING)])
    with pytest.raises(FleetError):
        await wait_for_servers(loading, 1, 0.3, told.append)  # type: ignore[arg-type]
    assert told == ["0 of 1 servers are ready (a loading); waiting, at most 0 s"]


async def test_servers_that_cannot_take_the_head_are_enough_to_begin_with() -> None:
    """Its bytes may be gone for good: who waited for them to serve would never publish what they need."""
    stuck = FakeCoordinator(
        [
            record("a", state=ServerState.LOADING, error="other bytes"),
            record("b", state=ServerState.DRAINING, error="x"),
        ]
    )
    found = await wait_for_servers(stuck, 1, 5)  # type: ignore[arg-type]
    assert [r.server_id for r in found] == ["a"]
