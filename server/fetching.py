"""Brings the versions that this server lacks to its disk: from other servers that hold them, or from the store."""

import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from server.holdings import Holdings
from server.planning import Step, plan
from server.trouble import Trouble
from server.turns import Source, Turns
from shared.chain import Chain
from shared.coordination import RedisCoordinator
from shared.errors import AbsentError, LocalError, RoomError, SpokeError, WeightsError
from shared.fleet import Head
from shared.manifest import Manifest
from shared.sources import Part, Sources
from shared.store import WeightReader
from shared.store_url import is_http, shown
from shared.threads import in_daemon_thread

log = logging.getLogger("spoke.fetching")

PATH = "/weights"
"""Below a server's URL: what it holds, laid out as a store."""
MOST_BAD = 3
"""Servers that may fail for one thing that is wanted before the store alone is asked, in its turn."""
MOST_ABSENT = 16
"""Servers that may turn out not to have it; that costs next to nothing."""

T = TypeVar("T")


async def _nobody(lowest: int | None) -> None:
    """Is told nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """Fetches versions into a server's holdings. One call at a time.

    A store over HTTP is the trainer's own uplink: it is asked by a few servers at once, and the others fetch from
    those. Any other store is asked first and by all; the servers help where it fails. Manifests are small: many
    servers are given them at once.

    Args:
        holdings: take them.
        coordinator: knows who holds what.
        open_store: the reader of a store at a URL.
        open_peer: the reader of another server at its URL and `PATH`.
        store_url: this server's own URL of the store; None takes what the head names.
        url: how the other servers reach this one.
        needs: is told of the lowest version whose files are being fetched, and of None once they are here.
        peers: take files from other servers.
        patience_s: longest wait for slots in one call, seconds; well below `taking.TAKE_S`.
    """

    holdings: Holdings
    coordinator: RedisCoordinator
    open_store: Callable[[str], WeightReader]
    open_peer: Callable[[str], WeightReader]
    store_url: str | None
    url: str
    needs: Callable[[int | None], Awaitable[None]] = _nobody
    peers: bool = True
    patience_s: float = 900.0
    count: Callable[[str, int], None] = lambda source, size: None
    """Is told of bytes that came from the `store` or a `peer`."""
    _trouble: Trouble = field(default_factory=Trouble)

    async def chain_to(self, head: Head) -> Chain:
        """Fetch what is missing of a head, and of what it builds upon; then everything is on this disk, verified.

        Cancelling it is harmless: what is half there is gone on with by the next call.

        Returns:
            Anchor and deltas whose newest manifest is the head's.

        Raises:
            RoomError: this disk is full; what had come of the version is deleted.
            WeightsError: a file cannot be had, or is damaged wherever it is, or others are before us for too long.
        """
        held = self.holdings.chain(head.version)
        if held is not None and held.manifest.digest == head.manifest_digest:
            return held
        async with self._session(head) as session:
            wanted = await session.head()
            await in_daemon_thread(self.holdings.adopt, wanted)
            steps = await plan(
                wanted,
                held=self.holdings.makes,
                lowest=min(self.holdings.versions(), default=None),
                manifest_of=session.base,
            )
            if steps:  # the store keeps them for us from now on
                await self.needs(steps[0].manifest.version)
            for step in steps:
                await session.take(step)
        await self.needs(None)
        chain = self.holdings.chain(head.version)
        if chain is None:
            raise WeightsError(f"version {head.version} is not whole although it was fetched")
        return chain

    @contextlib.asynccontextmanager
    async def _session(self, head: Head) -> AsyncIterator["_Session"]:
        turns = Turns(
            sources=Sources(coordinator=self.coordinator, claimant=self.url),
            peers=self.peers,
            direct=not is_http(self.store_url or head.store),
            patience_s=self.patience_s,
            trouble=self._trouble,
        )
        stop = threading.Event()
        try:
            yield _Session(
                holdings=self.holdings,
                head_record=head,
                turns=turns,
                open_store=self.open_store,
                open_peer=self.open_peer,
                origin=self.store_url or head.store,
                trouble=self._trouble,
                stop=stop,
                count=self.count,
            )
        finally:
            stop.set()  # a thread that is left behind ends soon
            await turns.release(holds=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """What one `chain_to` asks of sources."""

    holdings: Holdings
    head_record: Head
    turns: Turns
    open_store: Callable[[str], WeightReader]
    open_peer: Callable[[str], WeightReader]
    origin: str
    trouble: Trouble
    stop: threading.Event
    count: Callable[[str, int], None]

    async def head(self) -> Manifest:
        """The head's manifest."""
        digest = self.head_record.manifest_digest
        return await self._manifest(
            self.head_record.version,
            lambda manifest: manifest.digest == digest,
            "is not the one that was announced",
        )

    async def base(self, version: int, weights_digest: str) -> Manifest:
        """The manifest of a version that a delta starts from."""
        return await self._manifest(
            version,
            lambda manifest: manifest.weights_digest == weights_digest,
            "has other weights than the version after it starts from",
        )

    async def _manifest(
        self, version: int, is_right: Callable[[Manifest], bool], wrong: str
    ) -> Manifest:
        """A version's manifest, held or fetched; a source whose manifest is not right is asked no more for it."""
        held = self.holdings.manifest(version)
        if held is not None and is_right(held):
            return held

        def read(reader: WeightReader) -> Manifest:
            manifest = reader.manifest(version)
            if not is_right(manifest):
                raise WeightsError(f"version {version}: the manifest at {reader.url} {wrong}")
            return manifest

        found = await self._from_somebody(version, Part.MANIFEST, 0, read)
        await self.turns.release(holds=False)
        return found

    async def take(self, step: Step) -> None:
        """Fetch a step's files and hold them."""
        manifest = step.manifest
        folder = await in_daemon_thread(self.holdings.incoming, manifest)

        def read(reader: WeightReader) -> None:
            reader.fetch(manifest, folder, step.files, stop=self.stop)

        try:
            await self._from_somebody(manifest.version, step.part, step.size, read)
            await in_daemon_thread(self.holdings.add, manifest, step.files)
        except RoomError:
            await in_daemon_thread(self.holdings.abandon, manifest.version)
            raise
        await self.turns.release(holds=True)

    async def _from_somebody(
        self, version: int, part: Part, size: int, read: Callable[[WeightReader], T]
    ) -> T:
        """What some source gives. The claim on it is kept: `turns.release` says whether it is held now.

        Raises:
            WeightsError: of the store, once nobody else is left; or nobody has a slot free.
        """
        bad, absent = 0, list[str]()
        failed: SpokeError | None = None
        while True:
            source = await self.turns.source(
                version,
                part,
                without=[*self.trouble.servers, *absent],
                peers=bad < MOST_BAD
                and len(absent) < MOST_ABSENT
                and not self.trouble.reaches_nobody,
                origin=failed is None,
            )
            if source is None:
                raise failed or WeightsError(f"version {version}: nobody has it")
            try:
                found = await self._ask(source, read)
            except LocalError:
                raise
            except (
                SpokeError
            ) as error:  # of a server's URL too: whoever writes to Redis may write anything there
                if not source.is_store:
                    log.info("%s", error)
                absent_there = isinstance(error, AbsentError)
                await self.turns.release(holds=False, absent=absent_there)
                if source.is_store:
                    failed = error
                elif absent_there:
                    absent.append(source.url)
                else:
                    bad += 1
                    self.trouble.failed(source.url)
                continue
            if not source.is_store:
                self.trouble.worked(source.url)
                if failed is not None:
                    log.info("%s; %s has it", failed, source.url)
            self.count("store" if source.is_store else "peer", size)
            return found

    async def _ask(self, source: Source, read: Callable[[WeightReader], T]) -> T:
        def work() -> T:
            reader = (
                self.open_store(self.origin)
                if source.is_store
                else self.open_peer(source.url.rstrip("/") + PATH)
            )
            with contextlib.closing(reader):
                return read(reader)

        log.debug("asking %s", shown(self.origin if source.is_store else source.url))
        return await in_daemon_thread(work)
