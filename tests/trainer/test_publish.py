"""Publishing, on a real Redis and real files.

1. Files, then the lease once more, then the manifest, then the announcement, as seen from outside.
2. A trainer that was overtaken on the way leaves no manifest, or one that nobody hears of.
3. Redis emptied between two versions, or away during one: nothing is lost, and the wait has a bound.
4. A store that is away is tried again; one that refuses is not. An attempt whose answer was lost counts. One that
   hangs has a bound on the time in which nothing moves, and holds up neither Ctrl-C nor the end of the process.
5. No number is used twice: of what was begun, announced, held or checkpointed, the next is above all.
6. Of two publishers of one version, one succeeds, and the version is whole and that one's.
7. Cancelled on the way, it leaves no manifest.
8. The first version of a process is an anchor, and then every K-th; those between are deltas against the version
   before, in a chain from anchor to newest that gives the trainer's very bytes.
9. What no live server needs is collected, with what dead publishes left.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from described import tensor_entries, verify_tensors
from support import running_redis
from torch import Tensor

from shared import coordination
from shared.chain import Chain, Held, write_full
from shared.coordination import RedisCoordinator
from shared.digests import sha256
from shared.errors import CoordinationError, LeaseError, WeightsError
from shared.fleet import Head, ServerRecord, ServerState
from shared.fsspec_store import FsspecStore
from shared.manifest import Manifest
from trainer.collection import Collector, superseded
from trainer.encoding import encode_version
from trainer.lease import hold
from trainer.publish import Publisher

BOUND_S = 20.0
SHORT_LEASE_S = 1.5
Hook = Callable[[str], None]


class Store(FsspecStore):
    """A store on real files that tells what it does: `begin`, `files` (before the manifest), `done`."""

    def __init__(self, folder: Path, hook: Hook = lambda stage: None) -> None:
        super().__init__(f"file://{folder}", "run")
        self.hook = hook
        self.place = folder / "run"

    def publish(
        self, manifest: Manifest, folder: Path, *, before_manifest: Callable[[], None], **rest: Any
    ) -> None:
        def between() -> None:
            self.hook("files")
            before_manifest()

        self.hook("begin")
        super().publish(manifest, folder, before_manifest=between, **rest)
        self.hook("done")

    def names(self, version: int) -> set[str]:
        folder = self.place / f"v{version:06d}"
        return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisCoordinator]:
    made = RedisCoordinator(redis_url, f"test-{uuid.uuid4().hex}")
    yield made
    await made.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a": torch.randn(64, 32).bfloat16(), "b": torch.randn(64).bfloat16()}


@contextlib.asynccontextmanager
async def publishing(
    redis: RedisCoordinator, store: Store, **options: Any
) -> AsyncIterator[Publisher]:
    said = options.setdefault("status", lambda text: None)
    async with hold(redis, store.versions, redis.keys.run, said) as lease:
        yield Publisher(
            store=store, store_url=store.url, coordinator=redis, lease=lease, run="run",
            dtype="bfloat16", **options,
        )  # fmt: skip


async def overtaken(redis: RedisCoordinator, version: int) -> Head:
    """Another trainer takes the run, as if ours had been stopped for longer than its lease, and announces."""
    await redis._redis.delete(redis.keys.lease)
    token = await redis.acquire_lease("another:1")
    head = Head(version=version, manifest_digest="x", weights_digest="x", store="file:///x")
    await redis.announce(token, head)
    await redis.renew_lease(token, release=True)
    return head


def from_thread(work: Any) -> None:
    """Run a coroutine to its end on a Redis connection of its own, in a thread of the store."""
    asyncio.run(work)


async def test_bytes_are_durable_before_anyone_hears(redis: RedisCoordinator, store: Store) -> None:
    seen: list[Any] = []
    store.hook = lambda stage: seen.append((stage, sorted(store.names(0))))
    async with publishing(redis, store, max_staleness=2) as publisher:
        checked, announced = publisher._lease.check, publisher._lease.announce

        async def check() -> None:
            seen.append(("lease", sorted(store.names(0))))
            await checked()

        async def announce(head: Head) -> None:
            seen.append(("announce", store.versions(), await redis.head()))
            await announced(head)

        publisher._lease.check, publisher._lease.announce = check, announce  # type: ignore[method-assign]
        head = await publisher.publish(0, weights(0), snapshot_s=0.25)
        (report,) = publisher.reports()
    manifest = store.manifest(0)
    files = sorted(entry.name for entry in manifest.files)
    assert seen == [
        ("begin", []),
        ("files", files),
        ("lease", files),
        ("done", sorted([*files, "manifest.json"])),
        ("announce", [0], None),
    ]
    assert await redis.head() == head
    assert head == Head(
        version=0, manifest_digest=manifest.digest, weights_digest=manifest.weights_digest,
        store=store.url, max_staleness=2,
    )  # fmt: skip
    assert (report.version, report.anchor, report.delta_bytes) == (0, True, None)
    assert report.full_bytes == 2 * (64 * 32 + 64)
    assert report.stored_bytes == sum(entry.size for entry in manifest.files)
    assert report.snapshot_s == 0.25
    assert min(report.encode_s, report.store_s, report.announce_s) > 0


async def test_a_store_on_this_machine_gets_no_second_copy(
    redis: RedisCoordinator, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: set[int] = set()
    store.hook = lambda stage: made.update(
        path.stat().st_ino for path in store.place.glob(".publish-*/weights-*")
    )
    async with publishing(redis, store) as publisher:
        await publisher.publish(0, weights(0))
    (file,) = store.manifest(0).files
    kept = (store.place / "v000000" / file.name).stat()
    assert made == {kept.st_ino}
    assert (kept.st_nlink, kept.st_mode & 0o777) == (1, 0o644)
    assert [path.name for path in store.place.iterdir()] == ["v000000"]
    verify_tensors(store.fetch(store.manifest(0), tmp_path / "fetched"), store.manifest(0))


@pytest.mark.parametrize("stage", ["files", "done"])
async def test_an_overtaken_trainer_announces_nothing(
    redis: RedisCoordinator, redis_url: str, store: Store, stage: str
) -> None:
    other: list[Head] = []

    async def take() -> None:
        mine = RedisCoordinator(redis_url, redis.keys.run)
        other.append(await overtaken(mine, 8))
        await mine.close()

    async def train() -> None:
        async with publishing(redis, store) as publisher:
            await publisher.publish(6, weights(6))
            store.hook = lambda at: from_thread(take()) if at == stage else None
            await publisher.publish(7, weights(7))

    with pytest.raises(LeaseError, match="version 8 is not of this one"):
        await train()
    assert await redis.head() == other[0]
    assert store.versions() == ([6] if stage == "files" else [6, 7])


@pytest.fixture
def process(redis: RedisCoordinator, redis_url: str, store: Store) -> Iterator[Any]:
    """A trainer in a process of its own, which publishes version 7; see `publisher_process.py`."""
    script = Path(__file__).with_name("publisher_process.py")
    arguments = [redis_url, redis.keys.run, str(SHORT_LEASE_S), str(store.place.parent), "7"]
    made = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
    )  # fmt: skip
    yield made
    made.kill()
    made.wait()
    for pipe in (made.stdin, made.stdout):
        assert pipe is not None
        pipe.close()


async def says(process: Any) -> Any:
    return json.loads(
        await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 3 * BOUND_S)
    )


async def test_a_trainer_stopped_for_longer_than_its_lease_cannot_publish(
    redis: RedisCoordinator, store: Store, process: Any
) -> None:
    assert await says(process) == "files"
    process.send_signal(signal.SIGSTOP)
    async with publishing(redis, store) as publisher:  # once the lease has run out
        assert store.names(7)
        assert "manifest.json" not in store.names(7)
        assert await publisher.next_version() == 8
        head = await publisher.publish(8, weights(8))
    process.send_signal(signal.SIGCONT)
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert "version 8 is not of this one" in (await says(process))["ended"]
    assert store.versions() == [8]
    assert await redis.head() == head


async def test_a_trainer_killed_in_the_middle_leaves_a_number_that_is_skipped(
    redis: RedisCoordinator, store: Store, process: Any
) -> None:
    assert await says(process) == "files"
    process.kill()
    process.wait()
    assert list(store.place.glob(".publish-*/weights-*"))
    said: list[str] = []
    async with publishing(redis, store, status=said.append) as publisher:
        assert any("to see whether it lives" in line for line in said)
        version = await publisher.next_version()
        assert version == 8
        await publisher.publish(version, weights(8))
        await publisher.collect(version)
        assert store.numbers() == store.versions() == [8]
        assert [path.name for path in store.place.iterdir()] == ["v000008"]


async def test_redis_emptied_between_two_versions(redis: RedisCoordinator, store: Store) -> None:
    async with publishing(redis, store) as publisher:
        await publisher.publish(0, weights(0))
        keys = redis.keys
        await redis._redis.delete(keys.lease, keys.fence, keys.head, keys.events)
        head = await publisher.publish(1, weights(1))
        assert await redis.head() == head


async def test_redis_away_makes_a_version_wait(store: Store) -> None:
    with running_redis() as server:
        redis = RedisCoordinator(server.url, "run")
        waits = asyncio.Event()
        said: list[str] = []

        def status(text: str) -> None:
            said.append(text)
            if "version 1 waits" in text:
                waits.set()

        async with publishing(redis, store, status=status) as publisher:
            await publisher.publish(0, weights(0))
            server.kill()
            task = asyncio.create_task(publisher.publish(1, weights(1)))
            await asyncio.wait_for(waits.wait(), BOUND_S)
            assert store.versions() == [0]
            server.start()
            head = await asyncio.wait_for(task, BOUND_S)
            assert await redis.head() == head
            assert store.versions() == [0, 1]
            # A second outage, between the manifest and the announcement.
            store.hook = lambda stage: server.kill() if stage == "done" else None
            task = asyncio.create_task(publisher.publish(2, weights(2)))
            async with asyncio.timeout(BOUND_S):
                while not any("announcing version 2 waits" in line for line in said):
                    await asyncio.sleep(0.01)
            assert store.versions() == [0, 1, 2]
            server.start()
            assert await asyncio.wait_for(task, BOUND_S) == await redis.head()
        await redis.close()


async def test_redis_away_for_too_long(store: Store) -> None:
    with running_redis() as server:
        redis = RedisCoordinator(server.url, "run")
        async with publishing(redis, store, wait_s=0.3) as publisher:
            server.kill()
            async with asyncio.timeout(BOUND_S):
                with pytest.raises(CoordinationError, match="does not answer"):
                    await publisher.publish(0, weights(0))
        await redis.close()
    assert store.versions() == []


async def test_a_store_that_is_away_is_tried_again(redis: RedisCoordinator, store: Store) -> None:
    said: list[str] = []
    failures = [OSError("No space left on device"), OSError("Connection reset by peer")]

    def fail(stage: str) -> None:
        if stage == "files" and failures:
            raise failures.pop()

    store.hook = fail
    async with publishing(redis, store, status=said.append, wait_s=5.0) as publisher:
        head = await publisher.publish(0, weights(0))
    assert await redis.head() == head
    assert [reason for line in said for reason in ("reset", "space") if reason in line] == [
        "reset",
        "space",
    ]


async def test_a_store_that_takes_no_folder_is_tried_again(
    redis: RedisCoordinator, store: Store
) -> None:
    said: list[str] = []

    def status(text: str) -> None:
        said.append(text)
        store.place.unlink(missing_ok=True)

    store.place.parent.mkdir()
    store.place.write_text("in the way")
    async with publishing(redis, store, status=status) as publisher:
        head = await publisher.publish(0, weights(0))
    assert await redis.head() == head
    assert "version 0 waits: files of version 0" in said[0]


async def test_an_attempt_whose_answer_was_lost_counts(
    redis: RedisCoordinator, store: Store
) -> None:
    def fail(stage: str) -> None:
        if stage == "done":
            raise WeightsError("the connection ended before the answer") from OSError()

    store.hook = fail
    async with publishing(redis, store) as publisher:
        head = await publisher.publish(0, weights(0))
    assert await redis.head() == head


async def test_a_store_that_hangs_has_a_bound(redis: RedisCoordinator, store: Store) -> None:
    hangs = threading.Event()
    said: list[str] = []

    def hang(stage: str) -> None:
        if stage == "files":
            hangs.wait(BOUND_S)

    async with publishing(redis, store, wait_s=0.5, status=said.append) as publisher:
        store.hook = hang
        async with asyncio.timeout(BOUND_S / 2):
            with pytest.raises(WeightsError, match=r"version 0: nothing has moved for 0\.5 s"):
                await publisher.publish(0, weights(0))
        hangs.set()
        async with asyncio.timeout(BOUND_S):
            while any(thread.name == "spoke-work" for thread in threading.enumerate()):
                await asyncio.sleep(0.01)
        assert store.versions() == []  # who was left behind makes no manifest
        for name, call in (("numbers", publisher.next_version), ("numbers", publisher.collect)):
            hangs.clear()
            setattr(store, name, lambda: [hangs.wait(BOUND_S)])
            arguments = [0] if call == publisher.collect else []
            async with asyncio.timeout(BOUND_S / 2):
                with contextlib.suppress(WeightsError):
                    await call(*arguments)
                    assert "has not answered for 0.5 s" in said.pop()
        await publisher.collect(0)
        assert "still hangs" in said.pop()
        hangs.set()


async def test_a_slow_store_that_moves_is_waited_for(
    redis: RedisCoordinator, tmp_path: Path
) -> None:
    class Slow(FsspecStore):
        def publish(self, *args: Any, moved: Callable[[], None], **rest: Any) -> None:
            for _ in range(6):
                threading.Event().wait(0.3)
                moved()
            super().publish(*args, moved=moved, **rest)

    store: Any = Slow(f"file://{tmp_path / 'store'}", "run")
    async with publishing(redis, store, wait_s=1.2) as publisher:
        await publisher.publish(0, weights(0))
    assert store.versions() == [0]


async def test_a_store_that_hangs_does_not_hold_up_an_interrupt(process: Any) -> None:
    assert await says(process) == "files"  # and now it hangs
    process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(process.wait, BOUND_S) in (1, 130, -signal.SIGINT)


async def test_a_number_that_is_taken_is_refused_at_once(
    redis: RedisCoordinator, store: Store
) -> None:
    async with publishing(redis, store) as publisher:
        await publisher.publish(0, weights(0))
        async with asyncio.timeout(BOUND_S):
            with pytest.raises(WeightsError, match="in the store already"):
                await publisher.publish(0, weights(1))
        assert (await redis.head() or Head).weights_digest == store.manifest(0).weights_digest  # type: ignore[union-attr]


async def test_who_was_overtaken_hears_of_that_and_not_of_the_number(
    redis: RedisCoordinator, redis_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped for longer than its lease; the other one lives, and has used the number."""
    monkeypatch.setattr(coordination, "LEASE_S", SHORT_LEASE_S)
    other = RedisCoordinator(redis_url, redis.keys.run)
    async with publishing(redis, store) as publisher:
        await publisher.publish(0, weights(0))
        await redis._redis.delete(redis.keys.lease)
        async with publishing(other, Store(store.place.parent)) as overtakes:
            await overtakes.publish(1, weights(2))
            with pytest.raises(LeaseError, match="taken over"):
                await publisher.publish(1, weights(1))
    await other.close()


async def test_of_two_publishers_of_one_version_one_succeeds(
    redis: RedisCoordinator, redis_url: str, store: Store, tmp_path: Path
) -> None:
    """One lost its lease unknowingly, the other has it; both write version 5 at the same time."""
    mine = RedisCoordinator(redis_url, f"other-{uuid.uuid4().hex}")  # two leases of the one store
    stores = [Store(tmp_path / "store"), Store(tmp_path / "store")]
    async with publishing(redis, stores[0]) as one, publishing(mine, stores[1]) as two:
        results = await asyncio.gather(
            one.publish(5, weights(1)), two.publish(5, weights(2)), return_exceptions=True
        )
    (head,) = [r for r in results if isinstance(r, Head)]
    (error,) = [r for r in results if not isinstance(r, Head)]
    assert isinstance(error, WeightsError)
    manifest = store.manifest(5)
    assert manifest.digest == head.manifest_digest
    verify_tensors(store.fetch(manifest, tmp_path / "fetched"), manifest)
    await mine.close()


def record(server_id: str, version: int, digest: str = "w", heard: int = 0) -> ServerRecord:
    return ServerRecord(
        server_id=server_id, url="http://x", state=ServerState.READY, version=version,
        digest=digest, head=heard, model="m", engine="transformers", updated_at=0.0,
    )  # fmt: skip


async def test_no_number_is_used_twice(redis: RedisCoordinator, store: Store) -> None:
    async with publishing(redis, store) as publisher:
        await redis.report(record("fresh", 0, digest=""))
        assert await publisher.next_version() == 0
        assert await publisher.next_version(after=3) == 4
        await publisher.publish(4, weights(0))
        assert await publisher.next_version() == 5
        # A publish that died: some of its files, no manifest.
        died = store.place / "v000007"
        died.mkdir()
        (died / "weights-00000.safetensors").write_bytes(b"half")
        assert await publisher.next_version() == 8
        await redis.report(record("ahead", 11))
        assert await publisher.next_version() == 12
        await redis.report(record("heard", 4, heard=14))
        assert await publisher.next_version() == 15
        await redis.restore(
            Head(version=20, manifest_digest="m", weights_digest="w", store="file:///s")
        )
        assert await publisher.next_version() == 21
        assert await publisher.next_version(after=30) == 31


async def test_a_cancelled_publish_leaves_no_version(redis: RedisCoordinator, store: Store) -> None:
    loop = asyncio.get_running_loop()
    async with publishing(redis, store) as publisher:
        begun, ended = asyncio.Event(), asyncio.Event()
        cancelled = asyncio.Event()

        def hook(stage: str) -> None:
            if stage == "files":
                loop.call_soon_threadsafe(begun.set)
                asyncio.run_coroutine_threadsafe(cancelled.wait(), loop).result(BOUND_S)
                loop.call_soon_threadsafe(ended.set)

        store.hook = hook
        task = asyncio.create_task(publisher.publish(0, weights(0)))
        await asyncio.wait_for(begun.wait(), BOUND_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()
        await asyncio.wait_for(ended.wait(), BOUND_S)
        store.hook = lambda stage: None
        assert await publisher.next_version() == 1
        await publisher.publish(1, weights(1))
        await publisher.collect(1)
    assert store.versions() == store.numbers() == [1]


async def test_a_publish_cancelled_while_its_files_are_made_leaves_none(
    redis: RedisCoordinator, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def encode(*args: Any, **options: Any) -> Any:
        begun.set()
        go_on.wait(BOUND_S)
        return encode_version(*args, **options)

    monkeypatch.setattr("trainer.publish.encode_version", encode)
    async with publishing(redis, store) as publisher:
        task = asyncio.create_task(publisher.publish(0, weights(0)))
        assert await asyncio.to_thread(begun.wait, BOUND_S)
        task.cancel()
        await asyncio.wait({task})
        assert len(made_in(store.place)) == 1
        go_on.set()
        async with asyncio.timeout(BOUND_S):
            while made_in(store.place):
                await asyncio.sleep(0.01)


def made_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def steps(count: int) -> list[dict[str, Tensor]]:
    """Weights of which a few elements change from one version to the next."""
    torch.manual_seed(0)
    made = [{"a": torch.randn(256, 64).bfloat16(), "b": torch.randn(64).bfloat16()}]
    for step in range(1, count):
        tensors = {name: tensor.clone() for name, tensor in made[-1].items()}
        tensors["a"][step, ::7] += 0.5
        made.append(tensors)
    return made


async def test_anchors_and_the_deltas_between_them(
    redis: RedisCoordinator, store: Store, tmp_path: Path
) -> None:
    snapshots = steps(8)
    async with publishing(redis, store, anchor_every=3) as publisher:
        for version in range(5):
            await publisher.publish(version, snapshots[version])
        reports = publisher.reports()
    assert [store.manifest(version).is_anchor for version in range(5)] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert [report.anchor for report in reports] == [True, False, False, True, False]
    # The anchor is there for those that hold the version before as a delta too.
    assert [store.manifest(v).delta and store.manifest(v).delta.base_version for v in range(5)] == [  # type: ignore[union-attr]
        None, 0, 1, 2, 3,
    ]  # fmt: skip
    assert reports[0].delta_bytes is None
    assert 0 < (reports[1].delta_bytes or 0) == reports[1].stored_bytes < reports[0].stored_bytes
    assert reports[3].stored_bytes > reports[0].full_bytes + (reports[3].delta_bytes or 0)
    # A trainer that came back has nothing to start from: an anchor, without a shortcut.
    async with publishing(redis, store, anchor_every=3) as publisher:
        version = await publisher.next_version()
        await publisher.publish(version, snapshots[5])
        await publisher.publish(version + 1, snapshots[6])
    assert (version, store.manifest(5).delta) == (5, None)
    assert not store.manifest(6).is_anchor
    assert bytes_of(store, 0, 2, tmp_path) == digests(snapshots[2])
    assert bytes_of(store, 3, 4, tmp_path) == digests(snapshots[4])
    assert bytes_of(store, 5, 6, tmp_path) == digests(snapshots[6])


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: sha256(t.view(torch.int16).numpy().tobytes()) for name, t in tensors.items()}


def bytes_of(store: Store, anchor: int, newest: int, scratch: Path) -> dict[str, str]:
    """Hashes of a version's tensors, made from the files of its chain as a server would."""

    def held(version: int) -> Held:
        folder = scratch / f"{anchor}-{version}"
        manifest = store.manifest(version)
        store.fetch(manifest, folder)
        return Held(manifest=manifest, folder=folder)

    deltas = tuple(held(version) for version in range(anchor + 1, newest + 1))
    made = write_full(Chain(anchor=held(anchor), deltas=deltas), scratch / f"full-{newest}")
    return {entry.name: entry.sha256 for path in made for entry in tensor_entries(path)}


async def test_a_version_that_was_not_stored_is_no_base(
    redis: RedisCoordinator, store: Store
) -> None:
    """The next one builds on what is in the store."""
    snapshots = steps(3)
    async with publishing(redis, store, wait_s=0.1) as publisher:
        await publisher.publish(0, snapshots[0])

        def fail(stage: str) -> None:
            if stage == "files":
                raise OSError("away")

        store.hook = fail
        with pytest.raises(WeightsError, match="away"):
            await publisher.publish(1, snapshots[1])
        store.hook = lambda stage: None
        await publisher.publish(2, snapshots[2])
    delta = store.manifest(2).delta
    assert delta is not None
    assert delta.base_version == 0


def anchors(*numbers: int, until: int) -> dict[int, bool]:
    return {version: version in numbers for version in range(until + 1)}


@pytest.mark.parametrize(
    ("versions", "held", "keep", "first"),
    [
        (anchors(0, until=9), [9], 3, 0),  # one anchor: everything builds on it
        (anchors(0, 10, until=12), [12, 12], 3, 10),
        (anchors(0, 10, until=12), [12, 9], 3, 0),  # a server holds 9 and takes 10, 11, 12
        (anchors(0, 10, until=12), [12, 10], 3, 10),
        (anchors(0, 10, until=11), [11], 3, 0),  # of the three newest, 9 builds on 0
        (anchors(0, 10, until=11), [11], 2, 10),
        (anchors(0, 10, until=10), [10], 1, 10),
        (anchors(0, 10, 20, until=23), [23, 4], 3, 20),  # 4 comes back by the newest anchor
        (anchors(0, 10, 20, until=23), [23, 19], 3, 10),
        (anchors(0, 10, 20, until=23), [23, 10], 3, 10),
        (anchors(0, 10, 20, until=23), [], 3, 20),  # nobody is there: the newest anchor stays
        (anchors(0, 10, 20, until=23), [23], 9, 10),
        (anchors(*range(8), until=7), [7, 6], 1, 6),  # anchors alone
        (anchors(*range(8), until=7), [7, 5], 1, 7),
        (anchors(*range(8), until=7), [7, 5], 3, 5),
        ({5: True, 6: False, 9: True, 10: False}, [10], 1, 9),  # numbers that were skipped
        ({5: False, 6: False}, [6], 1, 5),  # no anchor: nothing is touched
        ({3: False, 4: False, 5: True, 6: False}, [6], 1, 5),
        ({}, [1], 1, 0),
    ],
)  # fmt: skip
def test_what_can_go(versions: dict[int, bool], held: list[int], keep: int, first: int) -> None:
    gone = superseded(versions, held, keep)
    assert gone == [version for version in sorted(versions) if version < first]


@pytest.mark.parametrize(
    ("needed", "first"),
    [([20], 20), ([10], 10), ([15], 10), ([9], 20), ([9, 20, 15], 10), ([], 20)],
)
def test_what_is_being_fetched_stays_for_two_anchors(needed: list[int], first: int) -> None:
    versions = anchors(0, 10, 20, 30, until=33)
    gone = superseded(versions, [29], 1, needed)  # 29 keeps its anchor, 20
    assert gone == [version for version in sorted(versions) if version < first]


async def test_collection_spares_what_live_servers_need(
    redis: RedisCoordinator, store: Store
) -> None:
    async with publishing(redis, store, keep=1) as publisher:
        for version in (0, 1, 2, 4):
            await publisher.publish(version, weights(version))
        (store.place / "v000003").mkdir()  # begun and never finished
        (store.place / "v000005").mkdir()  # being published now
        await redis.report(record("behind", 2))
        await redis.report(record("fresh", 0, digest=""))
        joiner = record("joiner", 0, digest="").model_copy(update={"needs": 1})
        await redis.report(joiner)
        await publisher.collect(4)
        assert store.versions() == [1, 2, 4]
        await redis.report(joiner.model_copy(update={"needs": None}))
        await publisher.collect(4)
        assert store.versions() == [2, 4]
        assert store.numbers() == [2, 4, 5]
        await redis.leave("behind")
        await publisher.collect(4)
        assert store.versions() == [4]


async def test_collection_waits_for_a_redis_that_is_away(store: Store) -> None:
    with running_redis() as server:
        redis = RedisCoordinator(server.url, "run")
        said: list[str] = []
        async with publishing(redis, store, keep=1, status=said.append) as publisher:
            await publisher.publish(0, weights(0))
            await publisher.publish(1, weights(1))
            server.kill()
            await publisher.collect(1)
            assert any("old versions stay" in line for line in said)
            assert store.versions() == [0, 1]
            server.start()
            await publisher.collect(1)
            assert store.versions() == [1]
        await redis.close()


async def test_collecting_asks_the_store_once(redis: RedisCoordinator, store: Store) -> None:
    """One listing, however many versions are kept: an object store is asked over a network."""
    calls: list[str] = []

    def count(name: str) -> None:
        plain = getattr(store, name)

        def counted(*args: Any) -> Any:
            calls.append(name)
            return plain(*args)

        setattr(store, name, counted)

    for name in ("numbers", "versions", "manifest"):
        count(name)
    async with publishing(redis, store, keep=5) as publisher:
        for version in range(8):
            await publisher.publish(version, weights(version))
            calls.clear()
            if version < 5:
                await publisher.collect(version)
                assert calls == ["numbers"]
        await publisher.collect(7)
        assert store.versions() == [3, 4, 5, 6, 7]


async def test_collecting_holds_nobody_up(redis: RedisCoordinator, store: Store) -> None:
    hangs, asked, plain = threading.Event(), threading.Semaphore(0), store.numbers
    said: list[str] = []

    def numbers() -> list[int]:
        asked.release()
        hangs.wait(BOUND_S)
        return plain()

    async with publishing(redis, store, keep=1, status=said.append) as publisher:
        for version in range(3):
            await publisher.publish(version, weights(version))
        store.numbers = numbers  # type: ignore[method-assign]
        publisher.collect_soon(1)
        publisher.collect_soon(2)  # never two at once
        assert await asyncio.to_thread(asked.acquire, timeout=BOUND_S)
        await publisher.publish(3, weights(3))
        assert not asked.acquire(blocking=False)
        hangs.set()
        await publisher.close()
        assert store.versions() == [1, 2, 3]
        store.numbers = plain  # type: ignore[method-assign]
        delete = store.delete
        store.delete = away  # type: ignore[method-assign]
        publisher.collect_soon(3)
        await publisher.close()
        assert said == ["old versions stay: away"]
        store.delete = delete  # type: ignore[method-assign]
        publisher.collect_soon(3)
        await publisher.close()
    assert store.versions() == [3]


def away(version: int) -> None:
    raise WeightsError("away")


async def test_a_manifest_that_could_not_be_read_is_read_again(
    redis: RedisCoordinator, store: Store
) -> None:
    async with publishing(redis, store) as publisher:
        for version in range(2):
            await publisher.publish(version, weights(version))
    collector = Collector(store=store, coordinator=redis, keep=1)
    manifest = store.place / "v000001" / "manifest.json"
    sound = manifest.read_bytes()
    manifest.write_text("{}")
    await collector.collect(1)
    assert store.versions() == [0, 1]
    manifest.write_bytes(sound)
    await collector.collect(1)
    assert store.versions() == [1]


async def test_a_damaged_manifest_is_no_anchor(redis: RedisCoordinator, store: Store) -> None:
    async with publishing(redis, store) as publisher:
        for version in range(3):
            await publisher.publish(version, weights(version))
    (store.place / "v000002" / "manifest.json").write_text("{}")
    await Collector(store=store, coordinator=redis, keep=1).collect(2)
    assert store.versions() == [1, 2]
