"""A follower beside a trainer that broadcasts: each version is taken once, whichever way it comes first.

Real follower, routes, Redis and store; the engine and its place in a group are fakes.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import on_a_socket

from server.app import create_app
from server.engines.base import ApplyReport
from shared.chain import Chain
from shared.fleet import Head
from shared.transfer import TransferBackend, TransferGroup, TransferOffer
from tests.server.test_follower import Member
from tests.server.weight_run import TIMEOUT, FakeEngine, Run


class FakeTransfer:
    """A place in a group without a group: the bytes are at hand."""

    backend = TransferBackend.GLOO
    verifies = True

    def __init__(self, engine: FakeEngine, run: Run) -> None:
        self.engine, self.run, self.joined, self.left = engine, run, False, 0

    async def join(self, group: TransferGroup) -> None:
        self.joined = True

    def check(self, offer: TransferOffer) -> None:
        assert self.joined

    async def receive(self, offer: TransferOffer) -> ApplyReport:
        manifest = offer.manifest
        await asyncio.sleep(0)
        self.engine.tensors = dict(self.run.tensors)
        self.engine.version, self.engine.digest = manifest.version, manifest.weights_digest
        return ApplyReport(stage_s=0.0, pause_s=0.002, apply_s=0.001)

    async def leave(self) -> None:
        self.joined = False
        self.left += 1


class Server:
    """A member of the run that takes broadcasts, at version 0."""

    def __init__(self, member: Member, client: httpx.AsyncClient) -> None:
        self.member, self.client = member, client
        self.engine: Any = member.engine
        self.transfer: FakeTransfer = self.engine.transfer

    async def post(self, path: str, head: Head) -> httpx.Response:
        manifest = self.member.run.store.manifest(head.version)
        offer = TransferOffer(manifest=manifest).model_dump(mode="json")
        return await self.client.post(f"/weight_transfer/{path}", json=offer)

    @property
    def loaded(self) -> list[int]:
        """Versions that the follower gave to the engine."""
        return [weights.version for weights in self.engine.loads]


class Slow:
    """A fetcher that keeps what it fetched until it is told to give it."""

    def __init__(self, fetcher: Any) -> None:
        self.fetcher, self.fetched, self.give = fetcher, asyncio.Event(), asyncio.Event()

    async def chain_to(self, head: Head) -> Chain:
        chain: Chain = await self.fetcher.chain_to(head)
        self.fetched.set()
        await self.give.wait()
        return chain


@pytest.fixture
async def server(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    monkeypatch.setattr("server.follower.HEARTBEAT_S", 4.0)  # acknowledges nothing in these tests
    run = Run(tmp_path, redis_url)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(run.coordinator.close)
        member = Member(run, tmp_path / "server", stack)
        engine: Any = member.engine
        engine.transfer = FakeTransfer(member.engine, run)
        await run.publish(max_staleness=None)
        await member.start()
        await run.record(lambda r: r.version == 0 and r.transfer is TransferBackend.GLOO)
        member.holder.service = type("Service", (), {"engine": engine})()
        app = create_app(member.holder, transfers=True)
        port = await stack.enter_async_context(on_a_socket(app))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT)
        yield Server(member, await stack.enter_async_context(client))


async def test_what_comes_by_broadcast_is_not_fetched_and_acknowledged_at_once(
    server: Server,
) -> None:
    server.transfer.joined = True
    run = server.member.run
    head = await run.publish(max_staleness=None)
    assert (await server.post("check", head)).status_code == 200
    assert (await server.post("receive", head)).status_code == 200
    async with asyncio.timeout(1.5):  # a heartbeat takes longer
        await server.member.holds(1)
    assert (server.loaded, server.member.holdings.versions()) == ([0], (0,))
    assert server.member.status.update.encoding == "broadcast"
    # Its files are nowhere here; the next version comes as a patch on it all the same.
    server.transfer.joined = False
    await run.publish(max_staleness=None)
    await server.member.holds(2)
    assert server.engine.loads[-1].base_digest == head.weights_digest


async def test_a_broadcast_that_does_not_come_costs_a_moment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.swaps.COMING_S", 0.2)
    server.transfer.joined = True
    await server.member.run.publish(max_staleness=None)
    await server.member.holds(1)
    assert (server.loaded, server.transfer.left) == ([0, 1], 1)


@pytest.mark.parametrize("newer", [False, True])
async def test_a_broadcast_under_the_followers_own_fetch_is_the_last_word(
    server: Server, newer: bool
) -> None:
    run, taker = server.member.run, server.member.follower.taker
    slow = Slow(taker.fetcher)
    taker.fetcher = slow
    head = await run.publish(max_staleness=None)
    await asyncio.wait_for(slow.fetched.wait(), TIMEOUT)
    server.transfer.joined = True
    if newer:
        head = await run.publish(max_staleness=None)
    assert (await server.post("check", head)).status_code == 200
    slow.give.set()
    # The follower has all that it needs, and may not touch the engine that was promised.
    await asyncio.wait_for(_until_patched(taker.folder), TIMEOUT)
    assert server.loaded == [0]
    assert (await server.post("receive", head)).status_code == 200
    await server.member.holds(head.version)
    await asyncio.wait_for(_until_patched(taker.folder, never=True), TIMEOUT)
    assert server.loaded == [0]
    server.transfer.joined = False
    taker.fetcher = slow.fetcher
    await run.publish(max_staleness=None)
    await server.member.holds(head.version + 1)


async def _until_patched(folder: Path, *, never: bool = False) -> None:
    """Wait until a patch lies in the folder, or none."""
    while _patches(folder) == never:
        await asyncio.sleep(0.01)


def _patches(folder: Path) -> bool:
    return any(folder.glob("*/patch/*"))


async def test_a_server_at_a_swap_of_its_own_says_so_before_any_byte_goes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.transfer_routes.TURN_S", 0.1)
    swapping, go_on, load = asyncio.Event(), asyncio.Event(), server.engine.load_weights

    async def slow(weights: Any) -> ApplyReport:
        swapping.set()
        await go_on.wait()
        report: ApplyReport = await load(weights)
        return report

    server.engine.load_weights = slow
    head = await server.member.run.publish(max_staleness=None)
    await asyncio.wait_for(swapping.wait(), TIMEOUT)
    server.transfer.joined = True
    answer = await server.post("check", head)
    assert (answer.status_code, "from the store just now" in answer.text) == (409, True)
    go_on.set()
    await server.member.holds(1)


async def test_a_group_that_is_left_after_a_promise_frees_the_follower_at_once(
    server: Server,
) -> None:
    server.transfer.joined = True
    head = await server.member.run.publish(max_staleness=None)
    assert (await server.post("check", head)).status_code == 200
    assert (await server.client.post("/weight_transfer/leave")).status_code == 200
    async with asyncio.timeout(4.0):  # less than the wait for a broadcast
        await server.member.holds(1)
    assert server.loaded == [0, 1]


async def test_an_engine_of_another_number_format_is_offered_to_nobody(server: Server) -> None:
    server.engine.info.dtype = "bfloat16"
    server.transfer.joined = True
    head = await server.member.run.publish(max_staleness=None)
    answer = await server.post("check", head)
    assert (answer.status_code, "dtype: float32 is published" in answer.text) == (409, True)
    await server.transfer.leave()
    await server.member.holds(1)
    await server.member.run.record(lambda r: r.transfer is None)
