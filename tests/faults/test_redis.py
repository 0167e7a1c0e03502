"""Redis goes away, comes back empty, repeats itself, tells old news, and has a clock that jumps.

1. Redis killed and started again empty: rollouts go on meanwhile, the version that is published waits, and
   afterwards head, lease and fleet table are as if nothing had happened.
2. With no trainer left, the servers give an empty Redis the head again, and no number is used twice.
3. Repeated and reordered events and an old head change nothing; a number that stands for other weights is refused.
4. Clocks that jump by a day, Redis' own included, delay nothing and lose nothing.
"""

import asyncio
import time

import httpx
import redis
from faults.conftest import Run
from faults.parts import until

from shared.coordination import RedisCoordinator
from shared.fleet import Head
from shared.keys import Keys

PLAN = {"kind": "group", "samples": 2}


def tree_version(url: str) -> int:
    """The version of a tree that the server samples now."""
    body = {"prompt": "2 + 2 =", "plan": PLAN, "sampling": {"max_tokens": 4}}
    answer = httpx.post(f"{url}/rollout_tree", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["weight_versions"]["max"])


def head_of(run: Run) -> Head | None:
    async def read() -> Head | None:
        coordinator = RedisCoordinator(run.redis.url, run.name)
        try:
            return await coordinator.head()
        finally:
            await coordinator.close()

    return asyncio.run(read())


def test_redis_restarts_empty(run: Run) -> None:
    leader = run.leader()
    members = [run.member("one"), run.member("two")]
    run.publish(leader, 2)
    for one in members:
        one.wait_ready()
        one.wait_version(1)
    run.redis.kill()
    leader.tell("publish")
    leader.says("status")
    assert [tree_version(one.url) for one in members] == [1, 1]
    time.sleep(6)  # longer than a server's record, and than a call to Redis: it is really away
    assert [tree_version(one.url) for one in members] == [1, 1]
    run.redis.start()
    said = leader.says("weights_digest", nth=3)
    run.published[said["version"]] = said["tensors"]
    newest = run.publish(leader)
    assert newest == 3
    for one in members:
        one.wait_version(newest)
    run.check(*members)
    until(lambda: run.table().keys() == {"one", "two"}, "both servers are in the table again")
    head = head_of(run)
    assert head is not None
    assert head.version == newest


def test_servers_remember_the_head_for_a_redis_without_a_trainer(run: Run) -> None:
    leader = run.leader()
    one = run.member("one")
    newest = run.publish(leader, 2)
    one.wait_ready()
    one.wait_version(newest)
    leader.end()
    run.redis.kill()
    run.redis.start()
    head = until(lambda: head_of(run), "the head is back")
    assert head.version == newest
    assert run.publish(run.leader()) == newest + 1
    one.wait_version(newest + 1)
    run.check(one)


def test_old_news_changes_nothing(run: Run) -> None:
    leader = run.leader()
    one = run.member("one")
    run.publish(leader)
    one.wait_ready()
    old = head_of(run)
    assert old is not None
    newest = run.publish(leader, 2)
    one.wait_version(newest)
    keys = Keys(run.name)
    with redis.Redis.from_url(run.redis.url, decode_responses=True) as raw:
        for version in (0, newest, newest, 1, 0, newest):
            raw.xadd(keys.events, {"version": version})
        raw.hset(keys.head, mapping=old.fields())
        until(lambda: raw.hget(keys.head, "version") == str(newest), "the head is corrected")
        run.check(one)
        assert one.live()["version"] == newest
        other = old.model_copy(update={"version": newest, "weights_digest": "other"})
        raw.hset(keys.head, mapping=other.fields())
        raw.xadd(keys.events, {"version": newest})
        error = until(lambda: run.failure("one"), "the other weights are refused")
        assert "never used twice" in error
        run.check(one)
        raw.delete(keys.head)
    assert run.publish(leader) == newest + 1
    one.wait_version(newest + 1)
    run.check(one)


def test_clocks_that_jump(run: Run) -> None:
    one = run.member("one", faults="clock")
    leader = run.leader("--skew", str(one.signs))
    run.publish(leader)
    one.wait_ready()
    keys = Keys(run.name)
    for offset in (86400.0, -86400.0, 0.0):
        new = one.signs / "offset.new"
        new.write_text(str(offset))
        new.rename(one.signs / "offset")  # it is read all the time
        newest = run.publish(leader)
        one.wait_version(newest, bound_s=20)
        run.check(one)
        until(lambda: run.table().keys() == {"one"}, "it is in the table")
    with redis.Redis.from_url(run.redis.url, decode_responses=True) as raw:
        # As a Redis whose clock was a year ahead for a moment: its own ids are lower afterwards.
        raw.xadd(keys.events, {"version": newest}, id=f"{int((time.time() + 3e7) * 1000)}-0")
        newest = run.publish(leader)
        one.wait_version(newest, bound_s=20)
        raw.delete(keys.events)
    for _ in range(2):
        newest = run.publish(leader)
        one.wait_version(newest, bound_s=20)
    run.check(one)
