"""A version into the world: durable bytes first, announcement last (DESIGN.md section 6).

Nothing here needs the model: once its weights are copied, a step need not wait for encoding, storing and
announcing. A Redis or a store that is away makes a version wait, for a bounded time.
"""

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from shared.coordination import Coordinator
from shared.errors import CoordinationError, WeightsError
from shared.fleet import Head
from shared.manifest import Manifest
from shared.scratch import Scratch
from shared.store import WeightStore
from shared.threads import in_daemon_thread
from trainer.collection import Collector
from trainer.encoding import MOST_CHANGED, EncodedVersion, encode_version
from trainer.lease import Lease
from trainer.publish_report import PublishReport
from trainer.storing import StoreHangsError, asked, patiently, write

T = TypeVar("T")

CLOSE_S = 5.0
"""Longest wait for a version's files to be deleted where they were made."""
ENCODE_S = 3600.0
"""Least bound of making a version's files: a disk may hang."""


class Broadcasts(Protocol):
    """A second way of versions to servers nearby (`trainer.broadcasting.Broadcasting`). It raises nothing."""

    async def meet(self) -> None:
        """Be ready for the version that is about to be announced."""
        ...

    async def send(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> bool:
        """Send the version that was announced; whether anybody took it."""
        ...


class Publisher:
    """Publishes the versions of one run.

    Args:
        store: takes the bytes.
        store_url: how servers reach it.
        coordinator: knows the head and the live servers.
        lease: without it nothing is published.
        run: name of the run.
        dtype: of the published tensors, for the manifest.
        keep: newest versions that stay in the store.
        anchor_every: versions from one anchor to the next.
        most_changed: share of elements above which no delta is tried.
        max_staleness: of the announced heads; see `Head`.
        wait_s: bound of the wait for a store or a Redis that is away, or for a store in which nothing moves.
        status: shows what is waited for.
        broadcasts: the second way; None is the store alone.
    """

    def __init__(
        self,
        *,
        store: WeightStore,
        store_url: str,
        coordinator: Coordinator,
        lease: Lease,
        run: str,
        dtype: str,
        keep: int = 3,
        anchor_every: int = 10,
        most_changed: float = MOST_CHANGED,
        max_staleness: int | None = None,
        wait_s: float = 300.0,
        status: Callable[[str], None] = lambda text: None,
        broadcasts: Broadcasts | None = None,
    ) -> None:
        self._store, self._store_url = store, store_url
        self._place = f"weight store {store.url}"
        self._coordinator, self._lease = coordinator, lease
        self._collector = Collector(store=store, coordinator=coordinator, keep=keep, wait_s=wait_s)
        self._run, self._dtype, self._anchor_every = run, dtype, anchor_every
        self._most_changed = most_changed
        self._max_staleness, self._wait_s, self._status = max_staleness, wait_s, status
        self._broadcasts = broadcasts
        self._previous: EncodedVersion | None = None
        self._turn = asyncio.Lock()
        self._reports: list[PublishReport] = []
        self._collecting: asyncio.Task[None] | None = None

    def start_from(self, version: EncodedVersion) -> None:
        """Publish the next version against one that another process published: see `as_published`."""
        self._previous = version

    async def next_version(self, after: int = -1) -> int:
        """One more than every version that was begun in the store, announced, or that a live server knows.

        Args:
            after: of a checkpoint; -1 without.

        Raises:
            WeightsError: the store is away, or hangs.
            CoordinationError: Redis is away.
        """
        head = await self._coordinator.head()
        servers = await self._coordinator.servers()
        known = [v for r in servers for v in (r.version if r.digest else -1, r.head or -1)]
        stored = await asked(self._place, self._wait_s, self._store.numbers)
        return max([after, *stored, *known, -1 if head is None else head.version]) + 1

    async def publish(
        self, version: int, tensors: Mapping[str, Tensor], *, snapshot_s: float = 0.0
    ) -> Head:
        """Write a version, then announce it, then broadcast it where that is asked for.

        One version at a time: another call waits for its turn.

        Cancelled, it leaves no version behind, or one that is whole and not announced.

        Args:
            version: higher than every version before.
            tensors: by checkpoint name, contiguous, on the CPU, in the published dtype; nobody changes them later.
            snapshot_s: what the copy took, for the report.

        Raises:
            WeightsError: the store refused, or was away too long; nothing is announced.
            LeaseError: another trainer has the run.
            CoordinationError: Redis was away too long.
        """
        async with self._turn:
            return await self._publish(version, tensors, snapshot_s)

    def reports(self) -> list[PublishReport]:
        """What the versions cost that were announced since the last call."""
        taken, self._reports = self._reports, []
        return taken

    async def _publish(
        self, version: int, tensors: Mapping[str, Tensor], snapshot_s: float
    ) -> Head:
        started, name = time.monotonic(), f"version {version}"
        made, scratch = await self._patiently(lambda: self._encoded(version, tensors), name)
        manifest = made.manifest
        encoded = time.monotonic()
        try:
            self._lease.begin(version)
            await self._patiently(lambda: self._write(manifest, scratch.folder), name)
        finally:
            with contextlib.suppress(TimeoutError):  # what is left is deleted by the next one
                async with asyncio.timeout(CLOSE_S):
                    await in_daemon_thread(scratch.close)
        # The version exists, whether or not it is announced: the next one may build on it.
        self._previous = made
        self._collector.note(manifest)
        stored = time.monotonic()
        head = Head(
            version=version,
            manifest_digest=manifest.digest,
            weights_digest=manifest.weights_digest,
            store=self._store_url,
            max_staleness=self._max_staleness,
        )
        if self._broadcasts is not None:
            await self._broadcasts.meet()
        met = time.monotonic()
        # Only now: a server that hears of a version must find its bytes.
        await self._patiently(lambda: self._lease.announce(head), f"announcing version {version}")
        announced = time.monotonic()
        sent = self._broadcasts is not None and await self._broadcasts.send(manifest, tensors)
        self._reports.append(
            PublishReport.of(
                manifest,
                full_bytes=sum(tensor.nbytes for tensor in tensors.values()),
                snapshot_s=snapshot_s,
                encode_s=encoded - started,
                store_s=stored - encoded,
                announce_s=announced - met,
                broadcast_s=met - stored + time.monotonic() - announced if sent else None,
            )
        )
        return head

    async def _encoded(
        self, version: int, tensors: Mapping[str, Tensor]
    ) -> tuple[EncodedVersion, Scratch]:
        """A version in files: beside the store where that is a folder here, so that they need only be linked."""
        bound, given_up = max(self._wait_s, ENCODE_S), threading.Event()
        try:
            return await asked(self._place, bound, self._encode, version, tensors, given_up)
        except BaseException:
            given_up.set()
            raise

    def _encode(
        self, version: int, tensors: Mapping[str, Tensor], given_up: threading.Event
    ) -> tuple[EncodedVersion, Scratch]:
        beside, previous = self._store.beside, self._previous
        root = Path(tempfile.gettempdir()) if beside is None else beside
        try:
            scratch = Scratch(root, "spoke-publish-" if beside is None else ".publish-")
        except OSError as error:
            raise WeightsError(f"files of version {version}: {error}") from error
        try:
            made = encode_version(
                tensors,
                run=self._run,
                version=version,
                dtype=self._dtype,
                folder=scratch.folder,
                previous=previous,
                # The first of a process has nothing to start from, mostly, and is one too.
                anchor_due=previous is None or previous.deltas + 1 >= self._anchor_every,
                most_changed=self._most_changed,
            )
        except WeightsError:
            scratch.close()
            raise
        if given_up.is_set():
            scratch.close()
        return made, scratch

    async def _write(self, manifest: Manifest, folder: Path) -> None:
        """Files, then the lease once more, then the manifest: a trainer that was overtaken leaves no version."""

        async def check() -> None:
            await self._patiently(self._lease.check, f"version {manifest.version}")

        try:
            await write(
                self._store, manifest, folder,
                check=check, still_s=self._wait_s, status=self._status,
            )  # fmt: skip
        except StoreHangsError:
            raise
        except WeightsError as error:
            if await asked(self._place, self._wait_s, self._is_stored, manifest):
                return
            if not isinstance(error.__cause__, OSError):
                # Refused: who was overtaken is told of that, and not of the number that the other one used.
                await check()
            raise

    def _is_stored(self, manifest: Manifest) -> bool:
        """Did an earlier attempt succeed, whose answer was lost?"""
        try:
            return self._store.manifest(manifest.version).digest == manifest.digest
        except WeightsError:
            return False

    async def _patiently(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        return await patiently(call, what, wait_s=self._wait_s, status=self._status)

    async def collect(self, newest: int) -> None:
        """Delete from the store what no live server needs; see `Collector`. What goes wrong is a line of `status`.

        Args:
            newest: the newest version that is announced; nothing after it is touched.
        """
        try:
            await self._collector.collect(newest)
        except (CoordinationError, WeightsError, OSError) as error:
            # Away just now: the next call does it.
            self._status(f"old versions stay: {error}")
        except Exception as error:  # beside the training nobody waits for it: it must be said
            self._status(f"old versions stay: {error!r}")

    def collect_soon(self, newest: int) -> None:
        """Let `collect` run beside whatever comes next; where one runs already, the next call does it."""
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.create_task(self.collect(newest))

    async def give_up(self) -> None:
        """End the collection that runs, if any."""
        if self._collecting is not None:
            self._collecting.cancel()
            await asyncio.gather(self._collecting, return_exceptions=True)

    async def close(self) -> None:
        """Wait for the collection that runs. It has a bound, and may be cancelled."""
        if self._collecting is not None:
            await self._collecting
