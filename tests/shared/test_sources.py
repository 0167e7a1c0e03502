"""Who fetches from whom, on a real Redis.

1. While nobody holds a version, the store has so many claimants and the others wait.
2. Once a server holds it, the store has no new ones; servers have so many each.
3. A claim ends when it is given back, or by Redis' own clock; renewing keeps it.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest

from shared import sources as module
from shared.coordination import RedisCoordinator
from shared.errors import CoordinationError
from shared.sources import ORIGIN, Sources


@contextlib.asynccontextmanager
async def fleet(redis_url: str, count: int) -> AsyncIterator[list[Sources]]:
    """Sources of servers `http://0` and so on, of one run."""
    run = f"run-{uuid.uuid4().hex[:8]}"
    coordinators = [RedisCoordinator(redis_url, run) for _ in range(count)]
    yield [Sources(coordinator=c, claimant=f"http://{n}") for n, c in enumerate(coordinators)]
    for coordinator in coordinators:
        await coordinator.close()


async def ask(
    one: Sources,
    *,
    holders: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    origin: bool = True,
) -> str | None:
    return await one.claim(7, holders=holders, without=without, origin=origin)


async def test_the_store_serves_a_few_at_once(redis_url: str) -> None:
    async with fleet(redis_url, 4) as (a, b, c, d):
        assert [await ask(one) for one in (a, b, c, d)] == [ORIGIN, ORIGIN, "", ""]
        assert await ask(a) == ORIGIN  # its own slot, still
        await a.release(7, ORIGIN, holds=False)
        assert await ask(c) == ORIGIN
        assert await ask(d) == ""


async def test_many_at_once_get_no_more_slots_than_there_are(redis_url: str) -> None:
    async with fleet(redis_url, 12) as all_of_them:
        answers = await asyncio.gather(*(ask(one) for one in all_of_them))
        assert sorted(map(str, answers)) == [""] * 10 + [ORIGIN] * 2


async def test_whoever_holds_it_is_asked_instead_of_the_store(redis_url: str) -> None:
    async with fleet(redis_url, 6) as (a, *others):
        assert await ask(a) == ORIGIN
        await a.release(7, ORIGIN, holds=True)
        answers = [await ask(one) for one in others]
        assert answers == ["http://0", "http://0", "", "", ""]
        await others[0].release(7, "http://0", holds=True)
        now = [await ask(one) for one in others[2:]]
        assert sorted(map(str, now)) == ["http://0", "http://1", "http://1"]
        assert (
            await a.claim(8, holders=(), without=(), origin=True) == ORIGIN
        )  # of that version alone


async def test_the_fleet_tables_holders_count(redis_url: str) -> None:
    async with fleet(redis_url, 2) as (a, b):
        assert await ask(a, holders=("http://9", "http://0")) == "http://9"
        assert await ask(b, holders=("http://9",), without=("http://9",)) == ORIGIN
        assert await ask(b, holders=("http://9",), without=("http://9",), origin=False) is None


async def test_claims_expire_by_themselves(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLAIM_S", 0.3)
    async with fleet(redis_url, 3) as (a, b, c):
        assert [await ask(one) for one in (a, b, c)] == [ORIGIN, ORIGIN, ""]
        async with asyncio.timeout(10):
            while await ask(c) != ORIGIN:  # both died
                await asyncio.sleep(0.02)


async def test_a_claim_that_is_renewed_stays(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLAIM_S", 0.4)
    async with fleet(redis_url, 3) as (a, b, c):
        assert [await ask(one) for one in (a, b)] == [ORIGIN, ORIGIN]
        until = asyncio.get_running_loop().time() + 1.2
        while asyncio.get_running_loop().time() < until:
            await asyncio.gather(a.keep(7, ORIGIN), b.keep(7, ORIGIN))
            assert await ask(c) == ""
            await asyncio.sleep(0.02)


async def test_a_claim_made_before_the_clock_was_set_back_does_not_stay(redis_url: str) -> None:
    async with fleet(redis_url, 3) as (a, b, c):
        keys = a.coordinator.keys
        far = 4_000_000_000_000  # ms: the year 2096
        for n in range(2):
            await a.coordinator._redis.zadd(keys.slots(ORIGIN), {f"http://dead-{n}": far})
        assert [await ask(one) for one in (a, b, c)] == [ORIGIN, ORIGIN, ""]


async def test_nobody_takes_from_itself(redis_url: str) -> None:
    async with fleet(redis_url, 1) as (a,):
        await a.release(7, ORIGIN, holds=True)
        assert await ask(a) == ORIGIN


async def test_a_redis_that_is_away_is_said() -> None:
    coordinator = RedisCoordinator("redis://127.0.0.1:1/0", "run")
    with pytest.raises(CoordinationError, match="does not answer"):
        await ask(Sources(coordinator=coordinator, claimant="http://0"))
    await coordinator.close()
