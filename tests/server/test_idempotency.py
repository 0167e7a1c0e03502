"""The same id and body gives one result, made once; another body is a conflict."""

import asyncio

import pytest

from server.idempotency import OnlyOnce
from shared.errors import RequestError


class Maker:
    def __init__(self) -> None:
        self.calls = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.calls += 1
        await self.go.wait()
        return self.calls


async def test_two_that_wait_share_one_computation() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 1)
    make = Maker()
    both = asyncio.gather(once.get("a", "body", make), once.get("a", "body", make))
    make.go.set()
    assert await both == [1, 1]
    assert await once.get("a", "body", make) == 1
    assert make.calls == 1


async def test_another_body_is_a_conflict() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 1)
    make = Maker()
    make.go.set()
    await once.get("a", "body", make)
    with pytest.raises(RequestError, match="request_id") as caught:
        await once.get("a", "other body", make)
    assert caught.value.status == 409


async def test_another_caller_has_ids_of_its_own() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 1)
    make = Maker()
    make.go.set()
    assert await once.get("a", "body", make, "one") == 1
    assert await once.get("a", "other body", make, "other") == 2
    assert await once.get("a", "body", make, "one") == 1
    assert ("one", "a") in once
    assert ("", "a") not in once


async def test_a_failure_may_be_tried_again() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 1)

    async def fail() -> int:
        raise OSError("once")

    with pytest.raises(OSError, match="once"):
        await once.get("a", "body", fail)
    make = Maker()
    make.go.set()
    assert await once.get("a", "body", make) == 1


async def test_one_that_leaves_does_not_take_the_result_from_the_other() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 1)
    make = Maker()
    leaving = asyncio.create_task(once.get("a", "body", make))
    staying = asyncio.create_task(once.get("a", "body", make))
    await asyncio.sleep(0)
    leaving.cancel()
    make.go.set()
    assert await staying == 1


async def test_results_are_kept_for_a_bounded_size_and_time() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 1, keep_most=2)
    make = Maker()
    make.go.set()
    for name in "abc":
        await once.get(name, "body", make)
    assert await once.get("c", "body", make) == 3
    assert await once.get("a", "body", make) == 4
    forgetful: OnlyOnce[int] = OnlyOnce(size=lambda _: 1, keep_s=0.0)
    await forgetful.get("a", "body", make)
    assert await forgetful.get("a", "body", make) == 6


async def test_the_largest_go_when_there_are_too_many_bytes() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 40, keep_bytes=100)
    make = Maker()
    make.go.set()
    assert [await once.get(name, "body", make) for name in "abc"] == [1, 2, 3]
    assert await once.get("b", "body", make) == 2
    assert await once.get("c", "body", make) == 3
    assert await once.get("a", "body", make) == 4


async def test_when_the_last_caller_has_gone_the_work_is_cancelled() -> None:
    once: OnlyOnce[int] = OnlyOnce(size=lambda _: 1)
    cancelled = asyncio.Event()

    async def make() -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 0

    first = asyncio.create_task(once.get("a", "body", make))
    second = asyncio.create_task(once.get("a", "body", make))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    assert not cancelled.is_set()
    second.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)
    # Nobody joins what is being cancelled: the same id starts anew.
    maker = Maker()
    maker.go.set()
    assert await once.get("a", "body", maker) == 1
