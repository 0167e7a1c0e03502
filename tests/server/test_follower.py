"""A server that follows a run, on a real Redis and a real store: it serves nothing stale, nothing mixed, and comes back.

1. It takes the newest version at once, however many it missed; a late joiner comes by anchor and deltas.
2. What fails (bytes, manifest, engine) leaves the old weights serving and is in the fleet table; then it is tried again.
3. Behind the bound it is stale at once, and back when it has caught up.
4. Late, repeated and lower heads change nothing; a Redis that lost its head is given it again.
5. What went bad on its own disk is fetched again. An anchor that came by its shortcut is made whole from what is here.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import RedisProcess, running_redis
from weight_run import TIMEOUT, FakeEngine, Run, digests, service_of

from server.app import Holder
from server.engines.settings import EngineSettings
from server.follower import Follower
from server.following import open_follower
from server.settings import ServerSettings
from server.states import CaughtUp
from server.status import Status
from shared.coordination import RedisCoordinator
from shared.errors import BusyError, CoordinationError, EngineError, WeightsError
from shared.fleet import ServerState


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.follower.LONGEST_RETRY_S", 0.05)
    monkeypatch.setattr("server.follower.WAIT_S", 0.2)


@pytest.fixture
async def run(tmp_path: Path, redis_url: str) -> AsyncIterator[Run]:
    made = Run(tmp_path, redis_url)
    yield made
    await made.coordinator.close()


class Member:
    """One server's follower on a fake engine."""

    def __init__(self, run: Run, folder: Path, stack: contextlib.AsyncExitStack) -> None:
        self.run, self.folder, self.stack = run, folder, stack
        self.engine = FakeEngine()
        self.status = Status(server_id="s")
        self.holder = Holder(self.status)
        self.follower: Follower

    async def start(self) -> None:
        """Catch up, then serve and follow until the stack ends."""
        settings = ServerSettings(
            engine="fake", engine_settings=EngineSettings(model="m"), run=self.run.name,
            weights_dir=self.folder,
        )  # fmt: skip
        coordinator = RedisCoordinator(self.run.redis_url, self.run.name)
        self.stack.push_async_callback(coordinator.close)
        self.follower = await open_follower(
            settings, self.holder, service_of(self.engine), coordinator, "http://s", self.stack
        )
        await asyncio.wait_for(self.follower.catch_up(1.0), TIMEOUT)
        self.status.note(CaughtUp())
        for work in (self.follower.run(), self.follower.heartbeat()):
            task = asyncio.create_task(work)
            self.stack.push_async_callback(self._ended, task)

    async def _ended(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled(), task.exception()  # a follower that died is a failure of the test

    async def holds(self, version: int) -> None:
        """Wait until the fleet table says so, and compare every live tensor."""
        await self.run.record(lambda r: r.version == version and r.last_error is None)
        assert (self.engine.version, self.status.standing.version) == (version, version)
        assert digests(self.engine.tensors) == self.run.digests[version]

    async def fails(self, text: str) -> None:
        """Wait until the fleet table says so."""
        await self.run.record(lambda r: text in (r.last_error or ""))


@pytest.fixture
async def member(run: Run, tmp_path: Path) -> AsyncIterator[Member]:
    """Not started yet."""
    async with contextlib.AsyncExitStack() as stack:
        yield Member(run, tmp_path / "server", stack)


async def test_a_late_joiner_comes_by_an_anchor_and_fifteen_deltas(run: Run, member: Member) -> None:
    await run.publish(16)
    await member.start()
    await member.holds(15)
    assert [len(member.engine.loads), member.engine.loads[0].base_digest] == [1, None]
    assert member.holder.holdings.versions() == tuple(range(16))


async def test_missed_versions_are_taken_as_one_patch(run: Run, member: Member) -> None:
    await run.publish()
    await member.start()
    before = member.status.weights_digest
    await run.publish(4)
    await member.holds(4)
    assert [w.version for w in member.engine.loads] == [0, 4]
    assert member.engine.loads[1].base_digest == before
    update = member.status.update
    assert update.encoding == "patch"
    assert (update.pause_s, update.apply_s) == (0.002, 0.001)
    assert 0 < update.fetch_s < TIMEOUT and 0 < update.decode_s < TIMEOUT
    text = member.holder.metrics.text().decode()
    for phase in ("fetch", "decode", "pause", "apply"):
        assert f'spoke_weight_update_seconds_count{{phase="{phase}"}} 2.0' in text


async def test_a_server_without_a_run_yet_serves_its_checkpoint_until_there_is_one(
    run: Run, member: Member
) -> None:
    await member.start()
    await run.record(lambda r: r.state is ServerState.READY and r.digest == "")
    await run.publish()
    await member.holds(0)


async def test_damaged_bytes_leave_the_old_weights_until_the_store_is_mended(
    run: Run, member: Member
) -> None:
    await run.publish()
    await member.start()
    # The bytes are damaged before the head is announced.
    announce, run.coordinator.announce = run.coordinator.announce, _nothing
    head = await run.publish()
    run.coordinator.announce = announce
    file = next(path for path in run.folder(1).iterdir() if path.name != "manifest.json")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    await run.announce(head)
    await member.fails("version 1")
    assert member.engine.version == 0
    assert member.status.state.serves
    assert digests(member.engine.tensors) == run.digests[0]
    file.write_bytes(good)
    await member.holds(1)


async def test_a_manifest_that_is_not_there_is_waited_for(run: Run, member: Member) -> None:
    await run.publish()
    await member.start()
    head = await run.publish(announce=False)
    manifest = run.folder(1) / "manifest.json"
    aside = manifest.rename(manifest.with_suffix(".aside"))
    await run.announce(head)
    await member.fails("version 1")
    aside.rename(manifest)
    await member.holds(1)


async def test_a_head_without_a_version_is_stale_and_the_next_one_mends_it(
    run: Run, member: Member
) -> None:
    await run.publish()
    await member.start()
    gone = run.root.rename(run.root.with_name("away"))
    away = Run.at(run, gone)
    await away.publish(3)
    await run.record(lambda r: r.state is ServerState.STALE and r.head == 3 and r.version == 0)
    with pytest.raises(BusyError, match="holds version 0, the run is at 3, at most 1 behind"):
        member.status.check()
    gone.rename(run.root)
    await member.holds(3)
    member.status.check()
