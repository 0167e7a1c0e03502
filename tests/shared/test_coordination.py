"""Coordination on a real Redis.

1. One trainer holds a run; a second is refused and told who holds it.
2. Only the newest fencing token announces, and versions only grow.
3. An announcement wakes a follower; an event seen once does not wake it again.
4. A server's record lives as long as it is renewed.
5. A Redis that is away is one clear error, without its password.
"""

import asyncio
import uuid

import pytest
from support import free_port

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, CoordinationError, LeaseError
from shared.fleet import Head, ServerRecord, ServerState


@pytest.fixture
async def coordinator(redis_url: str):
    made = RedisCoordinator(redis_url, f"test-{uuid.uuid4().hex}")
    yield made
    await made.close()


def head(version: int) -> Head:
    return Head(
        version=version, manifest_digest="m", weights_digest=f"w{version}", store="file:///s"
    )


def record(server_id: str, version: int = 0) -> ServerRecord:
    return ServerRecord(
        server_id=server_id, url="http://x", state=ServerState.READY, version=version, digest=f"w{version}",
        model="m", engine="transformers", updated_at=0.0,
    )  # fmt: skip


async def test_a_second_trainer_is_refused(coordinator: RedisCoordinator) -> None:
    await coordinator.acquire_lease("first:1")
    with pytest.raises(LeaseError, match="first:1"):
        await coordinator.acquire_lease("second:2")


async def test_a_released_run_is_free_and_the_old_token_is_dead(
    coordinator: RedisCoordinator,
) -> None:
    old = await coordinator.acquire_lease("first:1")
    await coordinator.renew_lease(old, release=True)
    new = await coordinator.acquire_lease("second:2")
    assert int(new) > int(old)
    with pytest.raises(LeaseError):
        await coordinator.announce(old, head(0))
    with pytest.raises(LeaseError):
        await coordinator.renew_lease(old)
    assert await coordinator.head() is None
    await coordinator.announce(new, head(0))
    assert await coordinator.head() == head(0)


async def test_versions_only_grow(coordinator: RedisCoordinator) -> None:
    token = await coordinator.acquire_lease("t")
    await coordinator.announce(token, head(9))
    for version in (9, 8):
        with pytest.raises(CoordinationError, match="version 9"):
            await coordinator.announce(token, head(version))
    await coordinator.announce(token, head(10))
    assert await coordinator.head() == head(10)


async def test_an_announcement_wakes_a_follower_once(coordinator: RedisCoordinator) -> None:
    token = await coordinator.acquire_lease("t")
    waiting = asyncio.create_task(coordinator.wait_event("0-0", 5.0))
    await coordinator.announce(token, head(1))
    seen = await asyncio.wait_for(waiting, 5.0)
    assert seen != "0-0"
    assert await coordinator.wait_event(seen, 0.05) == seen


async def test_records_come_and_go(
    coordinator: RedisCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    await coordinator.report(record("b"))
    monkeypatch.setattr("shared.coordination.RECORD_S", 0.05)
    await coordinator.report(record("a"))
    async with asyncio.timeout(5.0):
        while [r.server_id for r in await coordinator.servers()] != ["b"]:
            await asyncio.sleep(0.01)
    await coordinator.leave("b")
    assert await coordinator.servers() == []


async def test_runs_do_not_see_one_another(coordinator: RedisCoordinator, redis_url: str) -> None:
    other = RedisCoordinator(redis_url, f"other-{uuid.uuid4().hex}")
    await coordinator.report(record("a"))
    await coordinator.announce(await coordinator.acquire_lease("t"), head(4))
    assert await other.servers() == []
    assert await other.head() is None
    await other.close()


def test_holding_means_the_same_bytes_under_the_same_number() -> None:
    assert head(3).held_by(record("a", 3))
    assert not head(3).held_by(record("a", 2))
    assert not head(3).held_by(record("a", 3).model_copy(update={"digest": "w2"}))


async def test_a_redis_that_is_away_is_one_clear_error() -> None:
    away = RedisCoordinator(f"redis://:secret@127.0.0.1:{free_port()}/0", "run")
    with pytest.raises(
        CoordinationError, match=r"Redis at redis://127\.0\.0\.1:\d+/0 does not answer"
    ) as caught:
        await away.ping()
    assert "secret" not in str(caught.value)
    await away.close()


def test_unusable_urls_and_names_are_named() -> None:
    with pytest.raises(ConfigError, match="redis-url"):
        RedisCoordinator("http://x", "run")
    with pytest.raises(ConfigError, match="run name"):
        RedisCoordinator("redis://127.0.0.1", "a b")
