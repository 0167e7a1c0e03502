"""Trees while the fleet comes and goes: a real client and a fake server, under a scripted fleet table.

1. A shortage is told, and its bound kept, while trees wait; not only at their own bound.
2. After a pause a tree is asked for again, however long ago it was first asked for.
3. A tree that the servers die of every time is given up in the end.
4. While Redis is away, the servers known so far are asked; then those that are there once it is back.
5. Without patience, a tree is lost only where a server is ready.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from fake_rollouts import ANSWER, REQUEST, Fake
from support import free_port

from shared.errors import CoordinationError, FleetError, NoTreeError
from shared.fleet import ServerRecord, ServerState
from trainer import watch
from trainer.client import Target
from trainer.fleet import Fleet, fixed
from trainer.patience import Patience

ONE = [
    ServerRecord(
        server_id="a", url="http://a", state=ServerState.READY, version=0, digest="", model="m", engine="e",
        updated_at=0.0,
    )
]  # fmt: skip
AWAY = CoordinationError("Redis at redis://r does not answer: refused")
AWAY.__cause__ = ConnectionError("refused")


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WATCH_S", 0.05)


@asynccontextmanager
async def opened(
    url: str | None,
    servers: Callable[[], Awaitable[list[ServerRecord]]],
    said: list[str],
    *,
    timeout_s: float,
    pause_s: float,
) -> AsyncIterator[Fleet]:
    """A fleet whose client is told of the server at `url` while `servers` knows of one, or cannot be asked."""

    async def listed() -> list[Target]:
        try:
            alive = await servers()
        except CoordinationError:
            alive = ONE
        return [Target(url=url)] if url and alive else []

    patience = Patience(
        servers=servers, min_servers=1, wait_s=5.0, pause_s=pause_s, tell=said.append
    )
    fleet = Fleet(listed, timeout_s=timeout_s, patience=patience)
    async with asyncio.timeout(30):
        yield fleet
    await fleet.close()


async def test_1_a_shortage_is_told_while_a_tree_waits(fake: Fake) -> None:
    said: list[str] = []

    async def servers() -> list[ServerRecord]:
        return ONE if said else []

    server = fake(lambda i: ANSWER)
    async with opened(server.url, servers, said, timeout_s=60.0, pause_s=60.0) as fleet:
        assert (await fleet.rollout_tree(REQUEST)).request_id == "r"
    assert said[0] == "0 of 1 servers serve; waiting, at most 60 s"


async def test_1_the_bound_of_a_pause_ends_a_tree_that_waits() -> None:
    async def servers() -> list[ServerRecord]:
        return []

    async with opened(None, servers, [], timeout_s=60.0, pause_s=0.2) as fleet:
        begun = time.monotonic()
        with pytest.raises(FleetError, match="0 of 1 servers serve after a pause") as raised:
            await fleet.rollout_tree(REQUEST)
        assert not isinstance(raised.value, NoTreeError)
        assert time.monotonic() - begun < 10


async def test_2_a_pause_ends_with_another_try(fake: Fake) -> None:
    """The tree began longer ago than a pause may take; the pause took less."""
    said: list[str] = []
    stuck = asyncio.Event()

    async def servers() -> list[ServerRecord]:
        return [] if stuck.is_set() and not said else ONE

    server = fake(lambda i: server.stall() if i == 0 else ANSWER)
    async with opened(server.url, servers, said, timeout_s=0.8, pause_s=0.6) as fleet:
        task = asyncio.create_task(fleet.rollout_tree(REQUEST))
        await asyncio.to_thread(server.asked.wait, 10)
        await asyncio.to_thread(server.left.wait, 10)  # given up at its bound
        stuck.set()
        assert (await task).request_id == "r"
    assert len(server.bodies) == 2


async def test_3_what_the_servers_die_of_is_given_up() -> None:
    said: list[str] = []
    looks = 0

    async def servers() -> list[ServerRecord]:
        nonlocal looks
        looks += 1
        return ONE if looks % 3 == 0 else []

    async with opened(None, servers, said, timeout_s=0.05, pause_s=0.5) as fleet:
        with pytest.raises(NoTreeError):
            await fleet.rollout_tree(REQUEST)
    assert said.count("enough servers serve (1); going on") > 3


async def test_4_while_redis_is_away_the_known_servers_are_asked_again(fake: Fake) -> None:
    said: list[str] = []

    async def servers() -> list[ServerRecord]:
        raise AWAY

    server = fake(lambda i: server.stall() if i == 0 else ANSWER)
    async with opened(server.url, servers, said, timeout_s=0.5, pause_s=60.0) as fleet:
        assert (await fleet.rollout_tree(REQUEST)).request_id == "r"
    assert (len(server.bodies), said) == (2, [])


async def test_4_then_redis_is_waited_for_and_asked_who_is_there(fake: Fake) -> None:
    said: list[str] = []

    async def servers() -> list[ServerRecord]:
        if not said:
            raise AWAY
        return ONE

    server = fake(lambda i: server.stall() if i < 2 else ANSWER)
    async with opened(server.url, servers, said, timeout_s=0.5, pause_s=60.0) as fleet:
        assert (await fleet.rollout_tree(REQUEST)).request_id == "r"
    assert len(server.bodies) == 3
    assert said == [f"{AWAY}; the run waits, at most 60 s", "Redis answers; the run goes on"]


async def test_5_without_patience_a_tree_is_lost_where_a_server_is_ready(fake: Fake) -> None:
    server = fake(lambda i: server.stall())
    for url, kind in ((server.url, NoTreeError), (f"http://127.0.0.1:{free_port()}", FleetError)):
        fleet = Fleet(fixed(url), timeout_s=0.4)
        with pytest.raises(FleetError, match="no tree within") as raised:
            await fleet.rollout_tree(REQUEST)
        assert type(raised.value) is kind
        await fleet.close()
