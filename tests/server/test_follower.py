"""A server that follows a run, on a real Redis and store: it serves nothing stale, nothing mixed, and comes back.

1. It takes the newest version at once, however many it missed; a late joiner comes by anchor and deltas.
2. What fails (bytes, manifest, engine) leaves the old weights serving, is in the fleet table, and is tried again.
3. Behind the bound it is stale at once, and back when it has caught up.
4. Late, repeated and lower heads change nothing; a Redis that lost its head is given it again.
5. What went bad on its own disk is fetched again. An anchor that came by its shortcut is made whole on the spot.
   What is held under another manifest than the announced one is taken all the same.
   A long chain is shortened by what the server rebuilt for itself; where that goes bad, the anchor serves.
"""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from support import RedisProcess, running_redis

from server.app import Holder
from server.engines.base import ApplyReport, Weights
from server.engines.settings import EngineSettings
from server.follower import Follower
from server.following import open_follower
from server.holdings import Holdings
from server.settings import ServerSettings
from server.states import CaughtUp
from server.status import Status
from server.waiting import patiently
from shared.coordination import RedisCoordinator
from shared.errors import BusyError, CoordinationError, EngineError, RoomError, WeightsError
from shared.fleet import ServerRecord, ServerState
from shared.fsspec_store import FsspecStore
from shared.sources import Part, Sources
from tests.server.weight_run import TIMEOUT, FakeEngine, Run, digests, service_of
from trainer.collection import Collector


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.follower.LONGEST_RETRY_S", 0.05)
    monkeypatch.setattr("server.follower.WAIT_S", 0.2)


@pytest.fixture
async def run(tmp_path: Path, redis_url: str) -> AsyncIterator[Run]:
    made = Run(tmp_path, redis_url)
    yield made
    await made.coordinator.close()


@pytest.fixture
def own_redis() -> Iterator[RedisProcess]:
    with running_redis() as process:
        yield process


class Member:
    """One server's follower on a fake engine."""

    def __init__(
        self, run: Run, folder: Path | None, stack: contextlib.AsyncExitStack, name: str = "s"
    ) -> None:
        self.run, self.folder, self.stack = run, folder, stack
        self.engine = FakeEngine()
        self.status = Status(server_id=name)
        self.holder = Holder(self.status)
        self.follower: Follower
        self.peers = True

    @property
    def holdings(self) -> Holdings:
        """Versions on its disk."""
        assert self.holder.holdings is not None
        return self.holder.holdings

    async def start(self) -> None:
        """Catch up, then serve and follow until the stack ends."""
        settings = ServerSettings(
            engine="fake", engine_settings=EngineSettings(model="m"), run=self.run.name,
            weights_dir=self.folder, peers=self.peers,
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
        await asyncio.wait({task}, timeout=TIMEOUT)
        assert task.cancelled(), task.exception()  # a follower that died is a failure of the test

    async def holds(self, version: int) -> None:
        """Wait until the fleet table says so, and compare every live tensor."""
        await self.run.record(
            lambda r: bool(r.digest) and (r.version, r.last_error) == (version, None)
        )
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


async def test_a_late_joiner_comes_by_an_anchor_and_fifteen_deltas(
    run: Run, member: Member
) -> None:
    await run.publish(16)
    await member.start()
    await member.holds(15)
    assert [len(member.engine.loads), member.engine.loads[0].base_digest] == [1, None]
    assert member.holdings.versions() == tuple(range(16))


@pytest.mark.parametrize("peers", [True, False])
async def test_other_servers_are_told_what_is_here_unless_there_are_to_be_none(
    run: Run, member: Member, peers: bool
) -> None:
    await run.publish()
    member.peers = peers
    await member.start()
    await member.holds(0)
    found = Sources(coordinator=run.coordinator, claimant="http://other")
    async with asyncio.timeout(TIMEOUT):
        while (answer := await claimed(found)) != ("http://s" if peers else None):
            assert answer is None
            await asyncio.sleep(0.02)
    await member.stack.aclose()
    assert await claimed(found) is None


async def claimed(one: Sources) -> str | None:
    """Who gives version 0, but for the store."""
    return (await one.claim(0, Part.FULL, without=(), peers=True, origin=False)).source


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
    assert (update.stage_s, update.pause_s, update.apply_s) == (0.004, 0.002, 0.001)
    assert 0 < update.fetch_s < TIMEOUT
    assert 0 < update.decode_s < TIMEOUT
    text = member.holder.metrics.text().decode()
    for phase in ("fetch", "decode", "stage", "pause", "apply"):
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
    head = await run.make()
    file = next(path for path in run.folder(1).iterdir() if path.name != "manifest.json")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    await run.announce(head)
    await member.fails("version 1")
    assert member.status.state.serves
    assert (member.engine.version, digests(member.engine.tensors)) == (0, run.digests[0])
    file.write_bytes(good)
    await member.holds(1)


async def test_a_manifest_that_is_not_there_is_waited_for(run: Run, member: Member) -> None:
    await run.publish()
    await member.start()
    head = await run.make()
    manifest = run.folder(1) / "manifest.json"
    aside = manifest.rename(manifest.with_suffix(".aside"))
    await run.announce(head)
    await member.fails("version 1")
    aside.rename(manifest)
    await member.holds(1)


async def test_a_server_that_is_too_far_behind_serves_not_and_comes_back(
    run: Run, member: Member
) -> None:
    await run.publish()
    await member.start()
    head = await run.make(3)
    away = run.root.rename(run.root.with_name("away"))
    await run.announce(head)
    await run.record(lambda r: r.state is ServerState.STALE and (r.head, r.version) == (3, 0))
    with pytest.raises(BusyError, match="holds version 0, the run is at 3, at most 1 behind") as no:
        member.status.check()
    assert no.value.retry_after_s > 0
    away.rename(run.root)
    await member.holds(3)
    member.status.check()


async def test_a_newer_version_is_taken_where_the_head_cannot_be_had(
    run: Run, member: Member
) -> None:
    await run.publish()
    await member.start()
    head = await run.make()
    (run.folder(1) / "manifest.json").unlink()
    await run.announce(head)
    await member.fails("version 1")
    await run.publish(anchor=True)
    await member.holds(2)


async def test_a_version_that_came_while_another_failed_is_taken_at_once(
    run: Run, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run.publish()
    await member.start()
    monkeypatch.setattr("server.follower.RETRY_S", 10 * TIMEOUT)  # a pause would outlast the test
    monkeypatch.setattr("server.follower.LONGEST_RETRY_S", 10 * TIMEOUT)
    load = member.engine.load_weights

    async def failing(weights: Weights) -> ApplyReport:
        if weights.version == 1:
            await run.publish()
            while member.status.standing.head != await run.coordinator.head():
                await asyncio.sleep(0.01)
            raise EngineError("version 1 is bad")
        return await load(weights)

    monkeypatch.setattr(member.engine, "load_weights", failing)
    await run.publish()
    await member.holds(2)


async def test_what_a_joiner_fetches_stays_in_the_store(
    run: Run, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the fleet table before the first byte is asked for, until all are there."""
    may_fetch, fetch = threading.Event(), FsspecStore.fetch

    def held_back(*args: Any, **how: Any) -> tuple[Path, ...]:
        assert may_fetch.wait(TIMEOUT)
        return fetch(*args, **how)

    monkeypatch.setattr(FsspecStore, "fetch", held_back)
    collector = Collector(store=run.store, coordinator=run.coordinator, keep=1)
    await run.publish(12)
    joining = asyncio.create_task(member.start())
    await run.record(lambda r: r.needs == 0)
    await run.publish(anchor=True)
    await run.publish()
    await collector.collect(13)
    assert run.store.versions() == list(range(14))
    may_fetch.set()
    await asyncio.wait_for(joining, TIMEOUT)
    await member.holds(13)
    assert member.engine.loads[0].version == 11
    await run.record(lambda r: r.needs is None)
    await collector.collect(13)
    assert run.store.versions() == [12, 13]


async def test_an_engine_of_fewer_bits_than_published_is_told_of_once(
    run: Run, member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    member.engine.info.dtype = "bfloat16"
    await run.publish()
    await member.start()
    await member.holds(0)
    await run.publish()
    await member.holds(1)
    said = [
        r.getMessage() for r in caplog.records if "this engine keeps bfloat16" in r.getMessage()
    ]
    assert len(said) == 1


async def test_a_refused_patch_is_followed_by_all_of_it(run: Run, member: Member) -> None:
    await run.publish()
    await member.start()
    member.engine.failures = [WeightsError("no patches, please")]
    await run.publish()
    await member.holds(1)
    assert [w.base_digest is None for w in member.engine.loads] == [True, False, True]
    assert member.status.update.encoding == "full"


async def test_an_engine_that_fails_is_tried_again(run: Run, member: Member) -> None:
    await run.publish()
    await member.start()
    failing = [EngineError("out of memory") for _ in range(3)]
    member.engine.failures = list(failing)
    await run.publish()
    await member.fails("version 1: out of memory")
    await member.holds(1)
    assert len(member.engine.loads) == 1 + len(failing) + 1
    text = member.holder.metrics.text().decode()
    assert 'spoke_weight_updates_total{outcome="failed"} 3.0' in text
    assert 'spoke_weight_updates_total{outcome="ok"} 2.0' in text


async def test_late_repeated_and_lower_heads_change_nothing(run: Run, member: Member) -> None:
    heads = [await run.publish() for _ in range(3)]
    await member.start()
    client = redis.asyncio.Redis.from_url(run.redis_url, decode_responses=True)
    keys = run.coordinator.keys
    async with contextlib.aclosing(client):
        for head in (heads[0], heads[2], heads[1]):
            # What no script of ours does: the head is lowered by hand.
            await client.hset(keys.head, mapping=head.fields())
            for _ in range(3):
                await client.xadd(keys.events, {"version": head.version})
            async with asyncio.timeout(TIMEOUT):
                while (await run.coordinator.head()).version != 2:
                    await asyncio.sleep(0.01)
    await member.holds(2)
    assert len(member.engine.loads) == 1


async def test_a_number_that_is_used_twice_is_an_error(run: Run, member: Member) -> None:
    head = await run.publish()
    await member.start()
    other = head.model_copy(update={"weights_digest": "other"})
    client = redis.asyncio.Redis.from_url(run.redis_url)
    async with contextlib.aclosing(client):
        await client.hset(run.coordinator.keys.head, mapping=other.fields())
    await member.fails("a version number is never used twice")
    assert member.status.weights_digest == head.weights_digest
    assert len(member.engine.loads) == 1


async def test_a_redis_that_restarts_empty_gets_everything_back(
    own_redis: RedisProcess, tmp_path: Path
) -> None:
    run = Run(tmp_path, own_redis.url)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(run.coordinator.close)
        member = Member(run, tmp_path / "server", stack)
        head = await run.publish(2)
        await member.start()
        own_redis.kill()
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(CoordinationError):
                await member.follower.report()
        assert member.status.state.serves
        own_redis.start()
        await member.holds(1)
        async with asyncio.timeout(TIMEOUT):
            while (restored := await run.coordinator.head()) is None:
                await asyncio.sleep(0.01)
        assert restored == head
        await run.publish()
        await member.holds(2)


async def test_a_redis_that_is_away_is_told_once(
    own_redis: RedisProcess,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long it is away: a line of what that means for weights, and one for the fleet table."""
    monkeypatch.setattr("server.follower.HEARTBEAT_S", 0.02)
    run = Run(tmp_path, own_redis.url)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(run.coordinator.close)
        member = Member(run, tmp_path / "server", stack)
        await run.publish()
        await member.start()
        report, failed = member.follower.coordinator.report, 0

        async def counted(record: ServerRecord) -> None:
            nonlocal failed
            try:
                await report(record)
            except CoordinationError:
                failed += 1
                raise

        monkeypatch.setattr(member.follower.coordinator, "report", counted)
        own_redis.kill()
        async with asyncio.timeout(TIMEOUT):
            while failed < 10 or caplog.text.count("does not answer") < 2:
                await asyncio.sleep(0.01)
        assert caplog.text.count("does not answer") == 2


async def test_a_redis_that_is_away_at_the_start_is_waited_for_and_not_for_ever(
    own_redis: RedisProcess, tmp_path: Path
) -> None:
    run = Run(tmp_path, own_redis.url)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(run.coordinator.close)
        await run.publish()
        own_redis.kill()
        member = Member(run, tmp_path / "server", stack)
        with pytest.raises(
            CoordinationError, match=r"does not answer.*waited 1 s \(--redis-wait\)"
        ):
            await member.start()
        waiting = asyncio.create_task(patiently(run.coordinator.head, TIMEOUT))
        own_redis.start()
        assert await waiting is None


async def test_what_went_bad_on_its_own_disk_is_fetched_again(run: Run, member: Member) -> None:
    await run.publish(2)
    await member.start()
    file = next(p for p in member.holdings.folder_of(0).iterdir() if p.name != "manifest.json")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    await run.publish()
    await member.holds(2)
    assert file.read_bytes() == good


async def test_an_anchor_that_came_by_its_shortcut_is_made_whole_here(
    run: Run, member: Member
) -> None:
    await run.publish(3)
    await member.start()
    await run.publish(anchor=True)
    await member.holds(3)
    async with asyncio.timeout(TIMEOUT):
        while member.holdings.versions() != (3,):
            await asyncio.sleep(0.005)
    assert member.engine.loads[-1].base_digest is not None
    published = {p.name: p.read_bytes() for p in run.folder(3).iterdir()}
    shards = [entry.name for entry in run.store.manifest(3).files]
    for name in shards:
        assert (member.holdings.folder_of(3) / name).read_bytes() == published[name]
    await run.publish()
    await member.holds(4)


async def test_equal_weights_that_were_published_anew_are_taken_from_its_own_disk(
    run: Run, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a run is trained anew from the same checkpoint, under the same name."""
    head = await run.publish(2)
    async with contextlib.AsyncExitStack() as stack:
        first = Member(run, tmp_path / "server", stack)
        await first.start()
        await first.holds(1)
    await run.coordinator.leave("s", first.status.instance)
    anew = run.store.manifest(1).model_copy(update={"created_at": "later"}).seal()
    (run.folder(1) / "manifest.json").write_bytes(anew.encode())
    client = redis.asyncio.Redis.from_url(run.redis_url)
    async with contextlib.aclosing(client):
        changed = head.model_copy(update={"manifest_digest": anew.digest})
        await client.hset(run.coordinator.keys.head, mapping=changed.fields())
    monkeypatch.delattr(FsspecStore, "fetch")  # no file is asked for
    await member.start()
    await member.holds(1)
    assert member.status.manifest == anew


async def rebuilt(member: Member, version: int) -> list[Path]:
    """The files that the server wrote for itself of a version, once it is tidied."""
    async with asyncio.timeout(TIMEOUT):
        while (chain := member.holdings.chain(version)) is None or chain.deltas:
            await asyncio.sleep(0.005)
    return list(chain.anchor.rebuilt)


async def test_a_long_chain_starts_from_what_was_rebuilt(run: Run, member: Member) -> None:
    await run.publish()
    await member.start()
    for version in range(1, 6):
        await run.publish()
        await member.holds(version)
        if not version % 2:
            assert await rebuilt(member, version)
    assert [w.base_digest is None for w in member.engine.loads] == [True, *[False] * 5]
    assert member.holdings.versions() == tuple(range(6))


async def test_what_was_rebuilt_and_went_bad_is_forgotten(run: Run, member: Member) -> None:
    await run.publish(3)
    await member.start()
    (file,) = await rebuilt(member, 2)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    await run.publish()
    await member.holds(3)
    assert member.holdings.versions() == (0, 1, 2, 3)
    assert await rebuilt(member, 3) != [file]
    await run.publish()
    await member.holds(4)


async def test_what_was_rebuilt_makes_room(
    run: Run, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run.publish(3)
    await member.start()
    (file,) = await rebuilt(member, 2)
    add = Holdings.add

    def refused(self: Holdings, *args: object) -> None:
        """The disk is full as long as it is there."""
        if file.exists():
            raise RoomError("no room")
        add(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Holdings, "add", refused)
    await run.publish()
    await member.holds(3)
    assert not file.exists()


def temporary(folder: Path) -> list[Path]:
    return list(folder.glob("spoke-weights-*"))


async def test_what_a_killed_server_left_is_deleted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --weights-dir versions lie in the system's folder for what does not last."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "spoke-weights-killed"
    (left / "run").mkdir(parents=True)
    (left / ".lock").touch()
    (left / "run" / "weights").write_bytes(bytes(1000))
    async with contextlib.AsyncExitStack() as stack:
        one = Member(run, None, stack)
        head = await run.publish()
        await one.start()
        assert not left.exists()
        (kept,) = temporary(tmp_path)
        assert (kept / run.name / f"v{head.version:06d}" / "manifest.json").exists()
        async with contextlib.AsyncExitStack() as other_stack:
            await Member(run, None, other_stack, "other").start()
            assert len(temporary(tmp_path)) == 2
        assert temporary(tmp_path) == [kept]
    assert not kept.exists()
