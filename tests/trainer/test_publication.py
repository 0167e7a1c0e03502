"""Versions in the background: who waits for one, and what is left of those who gave up waiting."""

import asyncio
from typing import Any

import pytest

from shared.errors import WeightsError
from shared.fleet import Head
from trainer.publication import Publication

TIMEOUT_S = 10.0


class FakePublisher:
    """Publishes a version once it is allowed to, or fails."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    async def publish(self, version: int, tensors: Any, *, snapshot_s: float) -> Head:
        self.begun.append(version)
        await self.may_end.wait()
        if self.error is not None:
            raise self.error
        return Head(version=version, manifest_digest="m", weights_digest="w", store="file:///s")


class FakePatience:
    """Every server holds every version at once."""

    async def followed(self, head: Head, *, all_within_s: float) -> list[Any]:
        return []


def started(*versions: int) -> tuple[Publication, FakePublisher]:
    publisher = FakePublisher()
    publication = Publication(publisher, FakePatience())  # type: ignore[arg-type]
    for version in versions:
        publication.start(version, {}, 0.0)
    return publication, publisher


async def test_who_gives_up_waiting_leaves_nothing_behind() -> None:
    publication, _ = started(1)
    before = asyncio.all_tasks()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(publication.holds(1), 0.01)
    assert asyncio.all_tasks() == before
    await publication.close()


async def test_versions_go_one_after_the_other_and_each_waits_for_its_own() -> None:
    publication, publisher = started(1, 2)
    told: list[int] = []
    publication.followed = lambda head, holders: told.append(head.version)
    waiting = asyncio.create_task(publication.holds(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert publisher.begun == [1]
    assert not waiting.done()
    publisher.may_end.set()
    await asyncio.wait_for(waiting, TIMEOUT_S)
    await asyncio.wait_for(publication.settled(), TIMEOUT_S)
    await publication.holds(1)
    assert (publication.held, told) == (2, [1, 2])
    await publication.close()


async def test_what_goes_wrong_is_raised_to_all_who_wait_for_it_or_for_what_follows() -> None:
    publication, publisher = started(1, 2)
    publisher.error = WeightsError("full")
    publisher.may_end.set()
    for version in (1, 2):
        with pytest.raises(WeightsError, match="full"):
            await asyncio.wait_for(publication.holds(version), TIMEOUT_S)
    with pytest.raises(WeightsError, match="full"):
        await asyncio.wait_for(publication.settled(), TIMEOUT_S)
    assert publisher.begun == [1]
    await publication.close()
