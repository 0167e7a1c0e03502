"""Follows a run's head: fetch, verify, swap, acknowledge; and keeps this server's record alive.

The order is the point: everything slow or fallible (fetch, hashes) is done before the engine is touched, and the
acknowledgement comes after the swap. Whatever fails leaves the old weights serving, is shown in the fleet table,
and is tried again.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.engines.base import Engine, Weights
from server.metrics import Metrics
from server.status import Status
from server.threads import in_daemon_thread
from shared.coordination import RECORD_S, Coordinator
from shared.errors import CoordinationError, SpokeError, WeightsError
from shared.fleet import Head, ServerRecord, ServerState
from shared.manifest import Manifest
from shared.shards import verify_tensors
from shared.store import WeightStore

log = logging.getLogger("spoke.follower")

HEARTBEAT_S = RECORD_S / 3
RETRY_S = 1.0
WAIT_S = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """Keeps one server at the head of its run.

    Args:
        coordinator: Redis.
        open_store: the weight store at a URL.
        store_url: this server's own URL of the store; None takes what the head names.
        status: this server's state, shared with the service.
        engine: takes the weights; its version is the truth.
        url: how trainers reach this server.
        scratch: folder for fetched versions; a RAM disk where there is one.
        metrics: counts updates.
    """

    coordinator: Coordinator
    open_store: Callable[[str], WeightStore]
    store_url: str | None
    status: Status
    engine: Engine
    url: str
    scratch: Path
    metrics: Metrics

    async def catch_up(self) -> None:
        """Take the head's weights before serving anything; wait until that works.

        Raises:
            CoordinationError: Redis is away.
        """
        while not await self._follow_once():  # noqa: ASYNC110  # a retry with a pause, not a wait for a flag
            await asyncio.sleep(RETRY_S)

    async def run(self) -> None:
        """Follow the head for ever. Redis may come and go meanwhile."""
        last_event = "0-0"
        while True:
            try:
                # Events only wake us: the head is the truth, so lost or repeated ones do no harm.
                last_event = await self.coordinator.wait_event(last_event, WAIT_S)
                done = await self._follow_once()
            except CoordinationError as error:
                log.warning("%s; serving on with version %d", error, self.engine.version)
                done = False
            if not done:
                await asyncio.sleep(RETRY_S)

    async def heartbeat(self) -> None:
        """Renew this server's record for ever."""
        while True:
            try:
                await self.report()
            except CoordinationError as error:
                log.warning("%s; this server is not in the fleet table", error)
            await asyncio.sleep(HEARTBEAT_S)

    async def report(self) -> None:
        """Write this server's record now.

        Raises:
            CoordinationError: Redis is away.
        """
        info = self.engine.info
        await self.coordinator.report(
            ServerRecord(
                server_id=self.status.server_id,
                url=self.url,
                state=self.status.state,
                version=self.engine.version,
                digest=self.status.weights_digest,
                model=info.model,
                engine=info.engine,
                in_flight=self.status.in_flight,
                sampled_tokens=self.status.sampled_tokens,
                last_error=self.status.last_error,
                updated_at=time.time(),
            )
        )

    async def _follow_once(self) -> bool:
        """Take the head's weights if ours are others. False when that failed and is to be tried again."""
        head = await self.coordinator.head()
        if head is None or self._holds(head):
            return True
        if self.status.state is ServerState.READY:
            self.status.state = ServerState.UPDATING
        try:
            await self._take(head)
            self.status.last_error = None
        except SpokeError as error:
            self.status.last_error = f"version {head.version}: {error}"
            log.warning("%s; version %d stays", self.status.last_error, self.engine.version)
        finally:
            if self.status.state is ServerState.UPDATING:
                self.status.state = ServerState.READY
        taken = self.status.last_error is None
        self.metrics.updates.labels("ok" if taken else "failed").inc()
        # Not in the `finally`: a stop must not be turned into an error of Redis.
        await self.report()
        return taken

    def _holds(self, head: Head) -> bool:
        return (self.engine.version, self.status.weights_digest) == (
            head.version,
            head.weights_digest,
        )

    async def _take(self, head: Head) -> None:
        started = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix=f"v{head.version:06d}-", dir=self.scratch))
        try:
            manifest, files = await in_daemon_thread(self._fetch, head, folder)
            fetched = time.monotonic()
            report = await self.engine.load_weights(
                Weights(version=head.version, digest=manifest.weights_digest, files=files)
            )
            self.status.swapped(manifest.weights_digest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for phase, seconds in (
            ("fetch", fetched - started),
            ("pause", report.pause_s),
            ("apply", report.apply_s),
        ):
            self.metrics.update_s.labels(phase).observe(seconds)
        log.info(
            "version %d: fetched and verified in %.0f ms, paused %.0f ms, of these applied in %.0f ms",
            head.version,
            1e3 * (fetched - started),
            1e3 * report.pause_s,
            1e3 * report.apply_s,
        )

    def _fetch(self, head: Head, folder: Path) -> tuple[Manifest, tuple[Path, ...]]:
        """Fetch and verify, in a thread of its own: nothing here may touch the engine."""
        store = self.open_store(self.store_url or head.store)
        manifest = store.manifest(head.version)
        if manifest.digest != head.manifest_digest:
            raise WeightsError("the store's manifest is not the one that was announced")
        files = store.fetch(manifest, folder)
        verify_tensors(files, manifest)
        return manifest, files
