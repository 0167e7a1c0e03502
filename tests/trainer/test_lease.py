"""The trainer's lease, on a real Redis and with real processes.

1. A second trainer of a run that is being trained is refused in one line, within a renewal.
2. What a trainer that was killed left behind is waited for, and no longer than it lasts.
3. A trainer that was stopped for longer than its lease goes on where nobody else trained, and ends where somebody
   did: while the other one trains, and after it is done.
4. A Redis that restarted empty gets lease and head back; where another trainer's version is in it, or in the
   store, the run ends. Of two that want it back, the one with the newest version gets it.
5. Redis away is waited for.
6. What is given back is not taken again by a call that comes late.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import running_redis

from shared import coordination
from shared.coordination import RedisCoordinator
from shared.errors import CoordinationError, LeaseError, LeaseHeldError, WeightsError
from shared.fleet import Head
from trainer.lease import Lease, hold

LEASE_S = 1.5
BOUND_S = 20.0
TRAINER = Path(__file__).with_name("lease_holder.py")


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordination, "LEASE_S", LEASE_S)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisCoordinator]:
    made = RedisCoordinator(redis_url, f"test-{uuid.uuid4().hex}")
    yield made
    await made.close()


def head(version: int, digest: str = "m") -> Head:
    return Head(version=version, manifest_digest=digest, weights_digest="w", store="file:///s")


def nothing(text: str) -> None:
    pass


def holding(redis: RedisCoordinator, stored: int = -1, said: Any = nothing) -> Any:
    return hold(redis, lambda: [stored], redis.keys.run, said)


class Trainer:
    """Another process that holds a run; see `lease_holder.py`."""

    def __init__(self, redis: RedisCoordinator, url: str, version: int) -> None:
        command = [sys.executable, str(TRAINER), url, redis.keys.run, str(LEASE_S), str(version)]
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip

    async def says(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), BOUND_S)
        said: dict[str, Any] = json.loads(line)
        return said

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
async def trainer(redis: RedisCoordinator, redis_url: str) -> AsyncIterator[Trainer]:
    """Holds the run, its version 3 announced."""
    made = Trainer(redis, redis_url, 3)
    try:
        assert await made.says() == {"announced": 3}
        yield made
    finally:
        made.end()


async def lease_gone(redis: RedisCoordinator) -> None:
    async with asyncio.timeout(BOUND_S):
        while await redis._redis.exists(redis.keys.lease):
            await asyncio.sleep(0.01)


async def test_a_second_trainer_is_refused(redis: RedisCoordinator, trainer: Trainer) -> None:
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(LeaseHeldError, match=f"is being trained by .*:{trainer.process.pid}:"):
            async with holding(redis):
                raise AssertionError
    trainer.tell("announce 4")
    assert await trainer.says() == {"announced": 4}


async def test_a_killed_trainer_is_waited_for(redis: RedisCoordinator, trainer: Trainer) -> None:
    trainer.process.kill()
    said: list[str] = []
    async with asyncio.timeout(BOUND_S), holding(redis, said=said.append) as lease:
        lease.begin(4)
        await lease.announce(head(4))
    (line,) = said
    assert f":{trainer.process.pid}:" in line
    assert "waiting up to" in line


async def test_a_stopped_trainer_that_nobody_replaced_goes_on(
    redis: RedisCoordinator, trainer: Trainer
) -> None:
    trainer.process.send_signal(signal.SIGSTOP)
    await lease_gone(redis)
    trainer.process.send_signal(signal.SIGCONT)
    trainer.tell("announce 4")
    assert await trainer.says() == {"announced": 4}


@pytest.mark.parametrize("still_there", [True, False])
async def test_a_stopped_trainer_that_was_replaced_ends(
    redis: RedisCoordinator, trainer: Trainer, still_there: bool
) -> None:
    trainer.process.send_signal(signal.SIGSTOP)
    await lease_gone(redis)
    async with holding(redis, stored=3) as lease:
        lease.begin(4)
        await lease.announce(head(4, "another"))
        if still_there:
            trainer.process.send_signal(signal.SIGCONT)
            assert "was taken over by" in (await trainer.says())["ended"]
    if not still_there:
        trainer.process.send_signal(signal.SIGCONT)
        assert "version 4 is not of this one" in (await trainer.says())["ended"]
    assert await asyncio.to_thread(trainer.process.wait, BOUND_S) == 1
    assert await redis.head() == head(4, "another")
    assert not await redis._redis.exists(redis.keys.lease)


async def test_an_emptied_redis_gets_lease_and_head_back(redis: RedisCoordinator) -> None:
    async with holding(redis) as lease:
        lease.begin(3)
        await lease.announce(head(3))
        await redis._redis.delete(*[getattr(redis.keys, k) for k in ("lease", "fence", "head")])
        async with asyncio.timeout(BOUND_S):
            while await redis.head() != head(3):
                await asyncio.sleep(0.01)
        lease.begin(4)
        await lease.announce(head(4))


async def test_an_announcement_into_an_emptied_redis_takes_the_lease_again(
    redis: RedisCoordinator,
) -> None:
    async with holding(redis) as lease:
        lease.begin(3)
        await lease.announce(head(3))
        await redis._redis.delete(redis.keys.lease, redis.keys.fence, redis.keys.head)
        lease.begin(4)
        await lease.announce(head(4))
        assert await redis.head() == head(4)


async def test_an_old_copy_of_redis_memory_gets_the_head_back(redis: RedisCoordinator) -> None:
    async with holding(redis) as lease:
        lease.begin(3)
        await lease.announce(head(3))
        await redis._redis.hset(redis.keys.head, mapping=head(2).fields())
        async with asyncio.timeout(BOUND_S):
            while await redis.head() != head(3):
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("where", ["head", "same number", "store", "below ours"])
async def test_versions_of_another_trainer_end_the_run(redis: RedisCoordinator, where: str) -> None:
    stored = [1]

    async def run() -> None:
        async with hold(redis, lambda: stored, redis.keys.run, nothing) as lease:
            lease.begin(3)
            await lease.announce(head(3))
            stored.append(3)
            await redis._redis.delete(redis.keys.lease, redis.keys.head)
            if where in ("store", "below ours"):
                stored.append(4 if where == "store" else 2)
            else:
                await redis.restore(head(4) if where == "head" else head(3, "another"))
            await asyncio.sleep(BOUND_S)  # the block is cancelled

    with pytest.raises(LeaseError, match=r"trained by another trainer.*whose last is 3"):
        await run()
    assert not await redis._redis.exists(redis.keys.lease)


async def test_of_two_that_want_it_back_the_newest_gets_it(redis: RedisCoordinator) -> None:
    """The one that was overtaken, being quicker after Redis was emptied, hands it on."""
    run = redis.keys.run
    behind = Lease(redis, lambda: [4], run, nothing)
    behind.begin(3)
    async with holding(redis, stored=4) as ahead:
        await redis._redis.delete(redis.keys.lease)
        with pytest.raises(LeaseError, match="version 4 is not of this one"):
            await behind.check()
        await ahead.check()


async def test_redis_away_is_waited_for() -> None:
    with running_redis() as server:
        redis = RedisCoordinator(server.url, "run")
        said: list[str] = []
        async with holding(redis, said=said.append) as lease:
            lease.begin(3)
            await lease.announce(head(3))
            server.kill()
            with pytest.raises(CoordinationError, match="does not answer"):
                await lease.announce(head(4))
            async with asyncio.timeout(BOUND_S):
                while not any("publishing waits" in line for line in said):
                    await asyncio.sleep(0.01)
            server.start()
            async with asyncio.timeout(BOUND_S):
                while await redis.head() != head(3):
                    await asyncio.sleep(0.01)
            lease.begin(4)
            await lease.announce(head(4))
        await redis.close()


async def test_a_store_that_is_away_at_the_start_is_one_clear_error(
    redis: RedisCoordinator,
) -> None:
    def away() -> int:
        raise OSError("Connection refused")

    with pytest.raises(WeightsError, match=r"weight store.*Connection refused"):
        async with hold(redis, away, redis.keys.run, nothing):
            raise AssertionError
    assert not await redis._redis.exists(redis.keys.lease)


async def test_a_store_that_hangs_at_the_start_has_a_bound(
    redis: RedisCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.lease.STORED_S", 0.3)
    hangs = threading.Event()
    async with asyncio.timeout(BOUND_S / 2):
        with pytest.raises(WeightsError, match=r"weight store.*has not answered for 0\.3 s"):
            async with hold(redis, lambda: [hangs.wait(BOUND_S)], redis.keys.run, nothing):
                raise AssertionError
    hangs.set()


async def test_what_is_given_back_is_not_taken_again(redis: RedisCoordinator) -> None:
    async with holding(redis) as lease:
        pass
    with pytest.raises(LeaseError, match="given back"):
        await lease.check()
    assert not await redis._redis.exists(redis.keys.lease)


async def test_a_cancelled_block_is_cancelled(redis: RedisCoordinator) -> None:
    """Ctrl-C in a run is no error of the lease."""
    inside = asyncio.Event()

    async def run() -> None:
        async with holding(redis):
            inside.set()
            await asyncio.sleep(BOUND_S)

    task = asyncio.create_task(run())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await redis._redis.exists(redis.keys.lease)
