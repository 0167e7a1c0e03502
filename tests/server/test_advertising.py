"""What Redis says of a server's files is what the server has, and no longer than it lives: a real Redis."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest

from server import advertising
from server.advertising import Advertiser
from shared import sources
from shared.coordination import RedisCoordinator
from shared.sources import ORIGIN, Part, Sources


@contextlib.asynccontextmanager
async def advertised(redis_url: str, parts: set[tuple[int, Part]]) -> AsyncIterator[Sources]:
    """Another server's sources, while `http://0` advertises what is in the set."""
    run = f"run-{uuid.uuid4().hex[:8]}"
    async with contextlib.AsyncExitStack() as stack:
        one, two = RedisCoordinator(redis_url, run), RedisCoordinator(redis_url, run)
        for coordinator in (one, two):
            stack.push_async_callback(coordinator.close)
        advertiser = Advertiser(
            sources=Sources(coordinator=one, claimant="http://0"), parts=lambda: frozenset(parts)
        )
        task = asyncio.create_task(advertiser.run())
        yield Sources(coordinator=two, claimant="http://1")
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled(), task.exception()
        await advertiser.leave()
        assert await one._redis.keys(f"spoke:{{{run}}}:holders:*") == []


async def until(other: Sources, version: int, part: Part, source: str) -> None:
    async with asyncio.timeout(10):
        while (
            await other.claim(version, part, without=(), peers=True, origin=True)
        ).source != source:
            await other.release(version, part, ORIGIN, holds=False)
            await asyncio.sleep(0.01)


async def test_what_is_new_and_what_is_gone_is_said_soon(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advertising, "LOOK_S", 0.02)
    parts = {(3, Part.DELTA)}
    async with advertised(redis_url, parts) as other:
        await until(other, 3, Part.DELTA, "http://0")
        await until(other, 3, Part.FULL, ORIGIN)
        parts.add((3, Part.FULL))
        await until(other, 3, Part.FULL, "http://0")
        parts.remove((3, Part.DELTA))
        await until(other, 3, Part.DELTA, ORIGIN)


async def test_it_is_said_again_before_it_is_forgotten(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advertising, "LOOK_S", 0.02)
    for module in (advertising, sources):
        monkeypatch.setattr(module, "HOLDS_S", 0.6)
    async with advertised(redis_url, {(3, Part.DELTA)}) as other:
        await until(other, 3, Part.DELTA, "http://0")
        end = asyncio.get_running_loop().time() + 1.5
        while asyncio.get_running_loop().time() < end:
            answer = await other.claim(3, Part.DELTA, without=(), peers=True, origin=True)
            assert answer.source == "http://0"
            await asyncio.sleep(0.02)
        # A Redis that forgot is told again.
        await other.coordinator._redis.delete(other.coordinator.keys.holders(3, "delta"))
        await until(other, 3, Part.DELTA, "http://0")
