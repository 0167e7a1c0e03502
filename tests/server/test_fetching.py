"""Servers fetch what they lack: real sockets, real files, a real Redis.

1. Afterwards everything is on the own disk, byte for byte, whatever way it came.
2. The trainer's uplink carries few copies, however many servers there are.
3. A source that dies, lies or is away costs time, and nothing else; a disk that is full leaves nothing behind.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from support import on_a_socket
from versions import Versions
from weight_servers import Peer, peer, relay

from server import turns
from server.fetching import Fetcher
from shared import coordination, sources
from shared.coordination import RedisCoordinator
from shared.errors import RoomError, WeightsError
from shared.fleet import Head
from shared.http_store import open_peer
from shared.manifest import Manifest
from shared.open_store import open_store
from shared.sources import Part, Sources
from shared.store import MANIFEST
from trainer.file_server import create_app

TOKEN = "store-0123456789abcdef"


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path, run=f"run-{uuid.uuid4().hex[:8]}")


@contextlib.asynccontextmanager
async def trainer(versions: Versions, token: str | None = None) -> AsyncIterator[str]:
    """URL of the trainer's file server."""
    async with on_a_socket(create_app(versions.root, token)) as port:
        yield f"http://127.0.0.1:{port}"


async def uploaded(url: str, token: str | None = None) -> float:
    """Bytes that the trainer's file server has sent."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(headers=headers) as client:
        said = (await client.get(f"{url}/metrics")).text
    lines = [line for line in said.splitlines() if line.startswith("spoke_store_sent_bytes_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def size(manifest: Manifest, *, delta: bool = False) -> int:
    """Bytes of a version, its manifest included."""
    step = manifest.delta
    files = step.files if delta and step is not None else manifest.files
    return sum(entry.size for entry in files) + len(manifest.encode())


def check(one: Peer, versions: Versions, head: Head) -> list[int]:
    """Versions of the chain that a server holds, each file compared with the store's."""
    chain = one.holdings.chain(head.version)
    assert chain is not None
    assert chain.manifest.digest == head.manifest_digest
    files = [(chain.anchor, chain.anchor.manifest.files)]
    files += [(held, held.manifest.delta.files) for held in chain.deltas if held.manifest.delta]
    for held, entries in files:
        for entry in entries:
            stored = versions.folder(held.manifest.version) / entry.name
            assert (held.folder / entry.name).read_bytes() == stored.read_bytes()
    return [held.manifest.version for held, _ in files]


@pytest.mark.parametrize("over_http", [True, False])
async def test_a_late_joiner_takes_the_anchor_and_what_follows(
    versions: Versions, redis_url: str, tmp_path: Path, over_http: bool
) -> None:
    for version in range(19):
        versions.publish(anchor=version == 3)
    async with (
        trainer(versions, TOKEN) as url,
        peer(tmp_path / "a", redis_url, run=versions.run, token=TOKEN) as one,
    ):
        head = versions.head(store=url if over_http else "")
        chain = await one.fetcher.chain_to(head)
        assert chain.manifest == versions.manifests[-1]
        assert check(one, versions, head) == list(range(3, 19))
        before = await uploaded(url, TOKEN)
        assert await one.fetcher.chain_to(head) == chain  # nothing is fetched twice
        assert await uploaded(url, TOKEN) == before
        head = Head(**(versions.publish().model_dump() | {"store": head.store}))
        await one.fetcher.chain_to(head)
        assert check(one, versions, head) == list(range(3, 20))
        sent = await uploaded(url, TOKEN) - before
        assert sent == (size(versions.manifests[-1]) if over_http else 0)


async def test_an_anchor_comes_by_its_shortcut_to_who_holds_its_base(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    versions.publish()
    async with trainer(versions) as url, peer(tmp_path / "a", redis_url, run=versions.run) as one:
        await one.fetcher.chain_to(versions.head(store=url))
        before = await uploaded(url)
        versions.publish(anchor=True)
        await one.fetcher.chain_to(versions.head(store=url))
        assert check(one, versions, versions.head()) == [0, 1]
        assert await uploaded(url) - before == size(versions.manifests[1], delta=True)


@pytest.mark.parametrize("peers", [True, False])
async def test_the_uplink_carries_few_copies(
    versions: Versions, redis_url: str, tmp_path: Path, peers: bool
) -> None:
    head = versions.publish()
    async with trainer(versions) as url, contextlib.AsyncExitStack() as stack:
        fleet = [
            await stack.enter_async_context(
                peer(tmp_path / f"{n}", redis_url, run=versions.run, peers=peers)
            )
            for n in range(8)
        ]
        head = versions.head(store=url)
        await asyncio.gather(*(one.fetcher.chain_to(head) for one in fleet))
        for one in fleet:
            check(one, versions, head)
        copies = await uploaded(url) / size(versions.manifests[0])
        manifests = 8 * len(versions.manifests[0].encode()) / size(versions.manifests[0])
        assert copies <= 2 + manifests if peers else copies == 8
        from_peers = sum(one.sent_bytes for one in fleet) / size(versions.manifests[0])
        assert from_peers == 8 - copies


async def test_without_the_store_the_servers_have_it(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    """A store on a disk that is gone, and an HTTP store that is gone."""
    versions.publish()
    async with (
        peer(tmp_path / "a", redis_url, run=versions.run) as one,
        peer(tmp_path / "b", redis_url, run=versions.run) as two,
        peer(tmp_path / "c", redis_url, run=versions.run) as three,
    ):
        async with trainer(versions) as url:
            await one.fetcher.chain_to(versions.head(store=url))
        await one.report()
        kept = Versions(tmp_path / "kept", run=versions.run)
        shutil.copytree(versions.root, kept.root)
        shutil.rmtree(versions.root)
        for other, store in ((two, url), (three, versions.store.given)):
            await other.fetcher.chain_to(versions.head(store=store))
            check(other, kept, versions.head())


async def test_redis_away_leaves_the_store(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    versions.publish()
    versions.publish()
    async with trainer(versions) as url, peer(tmp_path / "a", redis_url, run=versions.run) as one:
        away = RedisCoordinator("redis://127.0.0.1:1/0", versions.run)
        fetcher = Fetcher(
            holdings=one.holdings,
            coordinator=away,
            open_store=lambda store_url: open_store(store_url, versions.run),
            open_peer=lambda peer_url: open_peer(peer_url, versions.run),
            store_url=None,
            url=one.url,
        )
        await fetcher.chain_to(versions.head(store=url))
        assert check(one, versions, versions.head()) == [0, 1]
        await away.close()


async def test_a_wait_for_a_slot_has_an_end(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    """Slots that nobody gives back while their claims are alive."""
    versions.publish()
    async with (
        trainer(versions) as url,
        peer(tmp_path / "a", redis_url, run=versions.run, patience_s=0.3) as one,
    ):
        keys = one.coordinator.keys
        time_s, _ = await one.coordinator._redis.time()
        claims = {f"http://{n}": time_s * 1000 + 14_000 for n in range(2)}
        await one.coordinator._redis.zadd(keys.slots("origin"), claims)
        started = asyncio.get_running_loop().time()
        # Not from the store all the same: ten servers that did so would send ten copies over its uplink.
        with pytest.raises(WeightsError, match="no source had a slot free"):
            await one.fetcher.chain_to(versions.head(store=url))
        assert 0.2 < asyncio.get_running_loop().time() - started < 10
        assert await uploaded(url) == len(versions.manifests[0].encode())
        await one.coordinator._redis.delete(keys.slots("origin"))
        await one.fetcher.chain_to(versions.head(store=url))
        check(one, versions, versions.head())


async def test_a_slow_uplink_carries_few_copies_too(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    """Each copy takes longer than a manifest is waited for, and claims are renewed several times meanwhile."""
    versions.publish()
    sending = asyncio.Semaphore(2)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        async def later(message: Message) -> None:
            if len(message.get("body", b"")) > 50_000:
                async with sending:
                    await asyncio.sleep(0.6)
            await send(message)

        await create_app(versions.root, None)(scope, receive, later)

    app, seen = _counted(slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "MANIFEST_S", 0.2)
        patch.setattr(turns, "CLAIM_S", 0.6)
        patch.setattr(sources, "CLAIM_S", 0.6)
        async with on_a_socket(app) as port, contextlib.AsyncExitStack() as stack:
            fleet = [
                await stack.enter_async_context(
                    peer(tmp_path / f"{n}", redis_url, run=versions.run)
                )
                for n in range(10)
            ]
            head = versions.head(store=f"http://127.0.0.1:{port}")
            await asyncio.gather(*(one.fetcher.chain_to(head) for one in fleet))
    for one in fleet:
        check(one, versions, head)
    assert sum("weights-0" in path for path in seen) == 2


async def test_many_manifests_are_given_without_waiting_for_files(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    """All slots for manifests are taken too, and nobody gives them back."""
    versions.publish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "MANIFEST_S", 0.2)
        async with (
            trainer(versions) as url,
            peer(tmp_path / "a", redis_url, run=versions.run) as one,
        ):
            keys = one.coordinator.keys
            time_s, _ = await one.coordinator._redis.time()
            claims = {f"http://{n}": time_s * 1000 + 14_000 for n in range(16)}
            await one.coordinator._redis.zadd(keys.slots("manifest:origin"), claims)
            async with asyncio.timeout(10):
                await one.fetcher.chain_to(versions.head(store=url))
            check(one, versions, versions.head())


async def test_late_joiners_wait_for_those_who_can_give_an_anchor(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    """Those who took the anchor by its shortcut are not asked for its shards, nor is the store by everybody."""
    versions.publish()
    app, seen = _counted(create_app(versions.root, None))
    async with on_a_socket(app) as port, contextlib.AsyncExitStack() as stack:
        url = f"http://127.0.0.1:{port}"
        fleet = [
            await stack.enter_async_context(peer(tmp_path / f"{n}", redis_url, run=versions.run))
            for n in range(10)
        ]
        old, new = fleet[:4], fleet[4:]
        for one in old:
            await one.fetcher.chain_to(versions.head(store=url))
        versions.publish(anchor=True)
        head = versions.head(store=url)
        for one in old:
            await one.fetcher.chain_to(head)
            await one.report()
        assert old[0].holdings.parts() == {(0, Part.FULL), (1, Part.DELTA)}
        before = len(seen)
        await asyncio.gather(*(one.fetcher.chain_to(head) for one in new))
        for one in new:
            assert check(one, versions, head) == [1]
        shards = [path for path in seen[before:] if "weights-0" in path]
        assert 1 <= len(shards) <= 2


async def test_what_a_server_has_no_more_is_asked_of_the_next(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    """More of them than may fail: it is no fault of theirs, and none is asked twice by anybody."""
    versions.publish()
    app, seen = _counted(create_app(versions.root, None))
    async with on_a_socket(app) as port, contextlib.AsyncExitStack() as stack:
        url = f"http://127.0.0.1:{port}"
        fleet = [
            await stack.enter_async_context(peer(tmp_path / f"{n}", redis_url, run=versions.run))
            for n in range(8)
        ]
        holder, *empty, joiner = fleet
        await holder.fetcher.chain_to(versions.head(store=url))
        for part in (Part.FULL, Part.DELTA):
            await _instead_of(holder, *(one.url for one in empty), part=part)
        await holder.report()
        # Its slots are taken until the others have been asked.
        keys = holder.coordinator.keys
        time_s, _ = await holder.coordinator._redis.time()
        claims = {f"http://{n}": time_s * 1000 + 1_500 for n in range(4)}
        await holder.coordinator._redis.zadd(keys.slots(holder.url), claims)
        await holder.coordinator._redis.zadd(keys.slots(f"manifest:{holder.url}"), claims)
        before = len(seen)
        await joiner.fetcher.chain_to(versions.head(store=url))
        check(joiner, versions, versions.head())
        assert len(seen) == before
        left = await holder.coordinator._redis.zrange(keys.holders(0, "full"), 0, -1)
        assert sorted(left) == sorted([holder.url, joiner.url])


async def test_the_store_has_slots_after_servers_failed(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    """Many servers that cannot reach any other still fetch in turn."""
    versions.publish()
    app, seen = _counted(create_app(versions.root, None))
    async with (
        on_a_socket(app) as port,
        peer(tmp_path / "a", redis_url, run=versions.run, patience_s=0.3) as one,
    ):
        await _instead_of(one, *(f"http://127.0.0.1:{n}" for n in range(1, 7)))
        keys = one.coordinator.keys
        time_s, _ = await one.coordinator._redis.time()
        claims = {f"http://{n}": time_s * 1000 + 14_000 for n in range(2)}
        await one.coordinator._redis.zadd(keys.slots("origin"), claims)
        with pytest.raises(WeightsError, match="no source had a slot free"):
            await one.fetcher.chain_to(versions.head(store=f"http://127.0.0.1:{port}"))
        assert not any("weights" in path for path in seen)


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "http://a b", "/etc", "http://[::1", "http://me:secret@host", "x"]
)
async def test_a_url_that_cannot_be_asked_is_a_bad_server(
    versions: Versions, redis_url: str, tmp_path: Path, url: str
) -> None:
    versions.publish()
    async with trainer(versions) as store, peer(tmp_path / "a", redis_url, run=versions.run) as one:
        await _instead_of(one, url)
        await one.fetcher.chain_to(versions.head(store=store))
        check(one, versions, versions.head())
        assert one.fetcher._trouble.servers == [url]


async def test_a_server_that_failed_is_left_alone_for_other_versions_too(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    versions.publish()
    connections: list[bytes] = []

    def refuse(request: bytes) -> int:
        connections.append(request)
        return 0

    async with trainer(versions) as url, peer(tmp_path / "a", redis_url, run=versions.run) as one:
        with relay(int(url.rpartition(":")[2]), refuse) as port:
            bad = Sources(coordinator=one.coordinator, claimant=f"http://127.0.0.1:{port}")
            for version in range(3):
                parts = [(version, Part.DELTA), (version, Part.FULL)]
                await bad.advertise(parts, [])
                await one.fetcher.chain_to(versions.head(version, store=url))
                versions.publish()
        assert len(connections) == 1
        assert check(one, versions, versions.head(2)) == [0, 1, 2]


async def test_a_redis_that_hangs_is_waited_for_once(
    versions: Versions, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and answers nothing."""
    monkeypatch.setattr(coordination, "CALL_S", 0.5)
    for _ in range(6):
        versions.publish()
    with socket.create_server(("127.0.0.1", 0)) as hole:
        away = RedisCoordinator(f"redis://127.0.0.1:{hole.getsockname()[1]}/0", versions.run)
        async with (
            trainer(versions) as url,
            peer(tmp_path / "a", redis_url, run=versions.run) as one,
        ):
            fetcher = replace(one.fetcher, coordinator=away)
            started = asyncio.get_running_loop().time()
            await fetcher.chain_to(versions.head(store=url))
            assert (
                asyncio.get_running_loop().time() - started < 2.0
            )  # of 14 calls each would have taken 0.5 s
            check(one, versions, versions.head())
        await away.close()


def _counted(app: ASGIApp) -> tuple[ASGIApp, list[str]]:
    """The application, and the paths that it is asked for."""
    seen: list[str] = []

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await app(scope, receive, send)

    return counted, seen


async def test_a_peer_that_dies_midway_is_not_asked_again(
    versions: Versions, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    versions.publish()
    caplog.set_level(logging.INFO, "spoke.fetching")
    requests: list[bytes] = []

    def cut(request: bytes) -> int | None:
        requests.append(request)
        return 150_000 if b"weights-0" in request else None

    async with (
        trainer(versions) as url,
        peer(tmp_path / "a", redis_url, run=versions.run) as one,
        peer(tmp_path / "b", redis_url, run=versions.run) as two,
    ):
        await one.fetcher.chain_to(versions.head(store=url))
        with relay(int(one.url.rpartition(":")[2]), cut) as port:
            dying = f"http://127.0.0.1:{port}"
            await _instead_of(one, dying)
            before = await uploaded(url)
            await two.fetcher.chain_to(versions.head(store=url))
        check(two, versions, versions.head())
        assert sum(b"weights-0" in request for request in requests) == 1
        # The store gave the rest alone: what had come from the dying one was gone on with.
        assert await uploaded(url) - before < size(versions.manifests[0]) - 100_000
        assert dying in caplog.text


async def test_wrong_bytes_of_a_peer_are_not_taken(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    versions.publish()
    async with (
        trainer(versions) as url,
        peer(tmp_path / "a", redis_url, run=versions.run) as one,
        peer(tmp_path / "b", redis_url, run=versions.run) as two,
    ):
        await one.fetcher.chain_to(versions.head(store=url))
        file = one.holdings.folder_of(0) / "weights-1.safetensors"
        data = bytearray(file.read_bytes())
        data[1000] ^= 1
        file.write_bytes(data)
        await two.fetcher.chain_to(versions.head(store=url))
        check(two, versions, versions.head())
        assert one.sent_bytes > 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest", "other"])
async def test_damage_in_the_store_is_named_and_mended_later(
    versions: Versions, redis_url: str, tmp_path: Path, damage: str
) -> None:
    versions.publish()
    stored = versions.folder(0) / ("weights-0.safetensors" if damage != "manifest" else MANIFEST)
    if damage == "other":
        stored = versions.folder(0) / MANIFEST
    sound = stored.read_bytes()
    other = Versions(tmp_path / "other", run=versions.run, branch="other")
    other.publish()
    broken = {
        "truncated": sound[:-1],
        "flipped": bytes([sound[0] ^ 1]) + sound[1:],
        "other": other.manifests[0].encode(),
    }
    reasons = {
        "truncated": "ends after 299999 bytes",
        "flipped": "has other bytes",
        "missing": "404",
        "manifest": "no readable manifest",
        "other": "not the one that was announced",
    }
    if damage in broken:
        stored.write_bytes(broken[damage])
    else:
        stored.unlink()
    async with trainer(versions) as url, peer(tmp_path / "a", redis_url, run=versions.run) as one:
        head = versions.head(store=url)
        with pytest.raises(WeightsError, match=reasons[damage]):
            await one.fetcher.chain_to(head)
        assert one.holdings.versions() == ()
        stored.write_bytes(sound)
        await one.fetcher.chain_to(head)
        check(one, versions, head)


async def test_a_wrong_token_is_said(versions: Versions, redis_url: str, tmp_path: Path) -> None:
    versions.publish()
    async with (
        trainer(versions, TOKEN) as url,
        peer(tmp_path / "a", redis_url, run=versions.run, token=None) as one,
    ):
        with pytest.raises(WeightsError, match="SPOKE_STORE_TOKEN"):
            await one.fetcher.chain_to(versions.head(store=url))


async def test_a_fetch_that_is_cut_off_is_gone_on_with(
    versions: Versions, redis_url: str, tmp_path: Path
) -> None:
    versions.publish()
    cancelled = False
    later: list[bytes] = []

    def cut(request: bytes) -> int | None:
        if cancelled:
            later.append(request)
        return 100_000 if b"weights-" in request and not cancelled else None

    async with (
        trainer(versions) as url,
        peer(tmp_path / "a", redis_url, run=versions.run) as one,
    ):
        with relay(int(url.rpartition(":")[2]), cut) as port:
            head = versions.head(store=f"http://127.0.0.1:{port}")
            task = asyncio.create_task(one.fetcher.chain_to(head))
            async with asyncio.timeout(20):
                while len(_begun(one)) < 2:
                    await asyncio.sleep(0.005)
            cancelled = True
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert one.holdings.versions() == ()
            await _until_it_works(one, head)
        check(one, versions, head)
        assert any(b"range: bytes=" in request.lower() for request in later)
        assert await one.coordinator._redis.zcard(one.coordinator.keys.slots("origin")) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(
            "only root may mount a small disk; tests/shared/test_store.py bounds files instead"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_leaves_what_was_held(
    versions: Versions, redis_url: str, tmp_path: Path, small_disk: Path
) -> None:
    made = Versions(tmp_path / "small-one", run=versions.run, shards=(100_000,), delta=120_000)
    made.publish()
    async with trainer(made) as url, peer(small_disk, redis_url, run=made.run) as one:
        await one.fetcher.chain_to(made.head(store=url))
        free = shutil.disk_usage(small_disk).free
        made.publish()
        made.publish()
        with pytest.raises(RoomError, match=r"no room for delta-0\.zst .* free some"):
            await one.fetcher.chain_to(made.head(store=url))
        assert check(one, made, made.head(1)) == [0, 1]  # what fitted
        assert shutil.disk_usage(small_disk).free > free - 140_000
        one.holdings.forget(1)
        assert check(one, made, made.head(0)) == [0]


def _begun(one: Peer) -> list[Path]:
    """Parts with bytes in them."""
    parts = one.holdings.folder_of(0).glob("*.part")
    return [path for path in parts if path.stat().st_size > 0]


async def _instead_of(one: Peer, *urls: str, part: Part = Part.FULL) -> None:
    """Only these URLs are said to hold version 0."""
    await one.coordinator._redis.delete(one.coordinator.keys.holders(0, part))
    for url in urls:
        await Sources(coordinator=one.coordinator, claimant=url).advertise([(0, part)], [])


async def _until_it_works(one: Peer, head: Head) -> None:
    """As a follower does: the thread that was left behind may still be writing for a moment."""
    async with asyncio.timeout(20):
        while True:
            try:
                await one.fetcher.chain_to(head)
                return
            except WeightsError:
                await asyncio.sleep(0.05)
