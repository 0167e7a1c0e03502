"""Coordination on a real Redis.

1. One trainer holds a run; a second is refused and told who holds it.
2. Only the newest fencing token announces, and versions only grow. Announcing the same again changes nothing.
3. An announcement wakes a follower; an event seen once does not wake it again.
4. A server's record lives as long as it is renewed; whoever finds it gone takes its id off the table.
5. A Redis that is away is one clear error, without its password.
6. A Redis that restarted empty, or whose clock jumped back: no token is given twice, the head comes back and is
   never lowered, and a follower that waits for later events is woken by new ones with lower ids.
7. What another version of Spoke wrote ends nobody: a record that cannot be read is left out, a head is one clear
   error.
8. A server's id belongs to one living process: another one is refused, and takes nothing away when it leaves.
"""

import asyncio
import gc
import json
import sys
import uuid

import pytest
from support import RedisProcess, free_port, running_redis

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, CoordinationError, LeaseError, LeaseHeldError
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
    with pytest.raises(LeaseHeldError, match="first:1") as refused:
        await coordinator.acquire_lease("second:2")
    assert refused.value.owner == "first:1"
    assert 9.0 < refused.value.left_s <= 10.0


async def test_a_released_run_is_free_and_the_old_token_is_dead(
    coordinator: RedisCoordinator,
) -> None:
    old = await coordinator.acquire_lease("first:1")
    await coordinator.renew_lease(old, release=True)
    new = await coordinator.acquire_lease("second:2")
    assert new != old
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
    for other in (head(9).model_copy(update={"manifest_digest": "other"}), head(8)):
        with pytest.raises(CoordinationError, match="version 9"):
            await coordinator.announce(token, other)
    await coordinator.announce(token, head(10))
    assert await coordinator.head() == head(10)


async def test_an_announcement_whose_answer_was_lost_is_sent_again(
    coordinator: RedisCoordinator,
) -> None:
    token = await coordinator.acquire_lease("t")
    await coordinator.announce(token, head(9))
    seen = await coordinator.wait_event("0-0", 1.0)
    await coordinator.announce(token, head(9))
    assert await coordinator.head() == head(9)
    assert await coordinator.wait_event(seen, 0.05) == seen


async def test_no_field_of_an_earlier_head_survives(coordinator: RedisCoordinator) -> None:
    token = await coordinator.acquire_lease("t")
    bounded = head(1).model_copy(update={"max_staleness": 3})
    await coordinator.announce(token, bounded)
    assert await coordinator.head() == bounded
    await coordinator.announce(token, head(2))
    assert await coordinator.head() == head(2)


async def test_restoring_never_lowers_the_head(coordinator: RedisCoordinator) -> None:
    assert await coordinator.restore(head(5))
    woken = await coordinator.wait_event("0-0", 1.0)
    assert woken != "0-0"
    for version in (5, 4):
        assert not await coordinator.restore(head(version))
    assert await coordinator.head() == head(5)
    assert await coordinator.wait_event(woken, 0.05) == woken
    assert await coordinator.restore(head(6))
    assert await coordinator.head() == head(6)


async def test_lower_event_ids_wake_a_follower(coordinator: RedisCoordinator) -> None:
    """As after a restart with a clock that was set back: the follower's last id is larger than every new one."""
    later = "99999999999999-0"
    waiting = asyncio.create_task(coordinator.wait_event(later, 3.0))
    async with asyncio.timeout(2.0):
        while not waiting.done():
            await coordinator.restore(head(1))
            await asyncio.sleep(0.01)
    seen = await waiting
    assert int(seen.partition("-")[0]) < 99999999999999
    assert await coordinator.wait_event(later, 0.05) == seen


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
    assert await coordinator._redis.smembers(coordinator.keys.servers) == {"b"}
    await coordinator.leave("b")
    assert await coordinator.servers() == []


async def test_a_record_that_cannot_be_read_is_left_out_and_told_once(
    coordinator: RedisCoordinator, caplog: pytest.LogCaptureFixture
) -> None:
    await coordinator.report(record("good"))
    good = record("newer").model_dump(mode="json") | {"unheard_of": {"a": 1}}
    # A field that nobody here knows is ignored; a state is not, nor one that is missing, nor what is no JSON.
    bad = {
        "newer": good,
        "hot": good | {"state": "hibernating"},
        "less": {k: v for k, v in good.items() if k != "url"},
    }
    texts = {name: json.dumps(fields) for name, fields in bad.items()} | {"torn": "{"}
    for name, text in texts.items():
        await coordinator._redis.set(coordinator.keys.server(name), text, px=60_000)
        await coordinator._redis.sadd(coordinator.keys.servers, name)
    for _ in range(2):
        assert [r.server_id for r in await coordinator.servers()] == ["good", "newer"]
    told = [entry.getMessage() for entry in caplog.records]
    assert [line.partition(" cannot be read")[0] for line in told] == [
        f"the record of server {name}" for name in ("hot", "less", "torn")
    ]
    assert "state: Input should be" in told[0]
    assert "url: Field required" in told[1]


async def test_a_head_that_cannot_be_read_is_one_clear_error(
    coordinator: RedisCoordinator,
) -> None:
    await coordinator._redis.hset(coordinator.keys.head, mapping={"version": "seven"})
    with pytest.raises(CoordinationError, match=r"the head of run .* cannot be read: version: "):
        await coordinator.head()


async def test_an_id_belongs_to_one_living_process(
    coordinator: RedisCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = (
        record("gpu").model_copy(update={"instance": name, "url": f"http://{name}"})
        for name in ("mine", "other")
    )
    await coordinator.report(mine)
    await coordinator.report(mine)
    with pytest.raises(ConfigError, match="--server-id gpu: the server at http://mine"):
        await coordinator.report(other)
    await coordinator.leave("gpu", "other")
    assert await coordinator.servers() == [mine]
    await coordinator.leave("gpu", "mine")
    assert await coordinator.servers() == []
    # One that died holds its id for as long as its record lives; what cannot be read holds nothing.
    monkeypatch.setattr("shared.coordination.RECORD_S", 0.05)
    await coordinator.report(mine)
    async with asyncio.timeout(5.0):
        while await coordinator.servers():
            await asyncio.sleep(0.01)
    for text in ("{", "[]", '{"instance": 3}'):
        await coordinator._redis.set(coordinator.keys.server("gpu"), text)
        monkeypatch.setattr("shared.coordination.RECORD_S", 5.0)
        await coordinator.report(other)
        assert await coordinator.servers() == [other]
        await coordinator.leave("gpu", "other")


async def test_a_server_that_came_back_is_not_forgotten(coordinator: RedisCoordinator) -> None:
    """Between reading the records and taking out the dead, one of them may report again."""
    await coordinator.report(record("a"))
    keys = coordinator.keys
    await coordinator._redis.sadd(keys.servers, "dead")
    gone = await coordinator.script(
        "forget_servers", [keys.servers, keys.server("a"), keys.server("dead")], ["a", "dead"]
    )
    assert gone == 1
    assert [r.server_id for r in await coordinator.servers()] == ["a"]


async def test_a_redis_that_restarted_empty_gives_no_token_twice() -> None:
    with running_redis() as server:
        coordinator = RedisCoordinator(server.url, "run")
        old = await coordinator.acquire_lease("a")
        await coordinator.announce(old, head(3))
        seen = await coordinator.wait_event("0-0", 1.0)
        await restarted(server, coordinator)
        new = await coordinator.acquire_lease("b")
        assert new != old
        with pytest.raises(LeaseError):
            await coordinator.announce(old, head(4))
        assert await coordinator.head() is None
        waiting = asyncio.create_task(coordinator.wait_event(seen, 3.0))
        assert await coordinator.restore(head(3))
        assert await asyncio.wait_for(waiting, 2.0) != seen
        assert await coordinator.head() == head(3)
        await coordinator.close()


async def restarted(server: RedisProcess, coordinator: RedisCoordinator) -> None:
    """Kill Redis, see that it is away, and start it empty on the same port."""
    server.kill()
    with pytest.raises(CoordinationError, match="does not answer"):
        await coordinator.ping()
    server.start()
    await coordinator.ping()


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


@pytest.mark.parametrize("connected", [False, True])
def test_a_call_that_is_given_up_leaves_no_connection(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    """Cancelled at any moment, also while it connects, and closed at once: nothing is left for the collector."""
    left: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: left.append(what.exc_value))

    async def given_up(after_s: float) -> None:
        made = RedisCoordinator(redis_url, "given-up")
        if connected:
            await made.ping()
        call = asyncio.create_task(made.servers())
        await asyncio.sleep(after_s)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await made.close()

    gc.collect()
    gc.freeze()  # what other tests made is not looked through sixty times
    try:
        for moment in range(60):
            asyncio.run(given_up(moment * 5e-5))
            gc.collect()
    finally:
        gc.unfreeze()
    assert left == []
