"""Follows a run: hears of heads, takes the newest, acknowledges; and keeps this server's record alive.

Two things go on beside each other. One hears: an event of Redis or a few seconds wake it, it reads the head, and a
server that is too far behind stops serving at that moment. The other takes the newest version known, as often as
it must; where a trainer broadcasts versions, it gives them a moment to come so. Redis may come and go: what was
heard is remembered, and a Redis that lost its head is given it again.
"""

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import dataclass, field

from server.engines.base import Engine, transfer_of
from server.live import rounded
from server.metrics import Metrics
from server.repeats import Repeats
from server.states import Began, Failed, Heard
from server.status import Status
from server.taking import Taker
from server.waiting import patiently
from shared.coordination import RECORD_S, Coordinator
from shared.errors import CoordinationError, SpokeError
from shared.fleet import Head, ServerRecord
from shared.transfer import TransferBackend

log = logging.getLogger("spoke.follower")

HEARTBEAT_S = RECORD_S / 3
RETRY_S = 0.5
"""Pause after the first failure; doubled with each one that follows."""
LONGEST_RETRY_S = 15.0
WAIT_S = 4.0
"""The head is read this often even where no event comes."""


def pause_s(failures: int) -> float:
    """Seconds until a version is tried again after so many failures.

    >>> [pause_s(failures) for failures in (0, 1, 2, 3, 100)]
    [0.0, 0.5, 1.0, 2.0, 15.0]
    """
    return min(LONGEST_RETRY_S, RETRY_S * 2 ** (min(failures, 20) - 1)) if failures else 0.0


@dataclass(slots=True, kw_only=True)
class Follower:
    """Keeps one server at the head of its run.

    Args:
        coordinator: Redis.
        taker: takes a version.
        status: where this server stands, shared with the service.
        engine: what it is goes into the record.
        url: how trainers and other servers reach this server.
        metrics: counts updates.
    """

    coordinator: Coordinator
    taker: Taker
    status: Status
    engine: Engine
    url: str
    metrics: Metrics
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _reporting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One record at a time: an older one must not overtake a newer one."""
    _acknowledged: tuple[int, str] | None = None
    """Version and digest of the last record."""
    _missing: asyncio.Event = field(default_factory=asyncio.Event)
    """Redis does not take this server's record, and that was said."""
    _failures: Repeats = field(default_factory=Repeats)

    async def catch_up(self, bound_s: float) -> None:
        """Take the head's weights before serving anything; wait until that works.

        A head that moves on meanwhile is followed while serving, as far as what is held may be served.

        Args:
            bound_s: how long Redis may be away before the head is known, seconds.

        Raises:
            CoordinationError: it was away for longer.
        """
        await patiently(self._hear, bound_s)
        while not self.status.standing.holds_head:
            head = self.status.standing.head
            taken = await self._take_newest()
            with contextlib.suppress(CoordinationError):  # the head that is known is still good
                await self._hear()
            if taken and not self.status.standing.is_stale:
                return
            await self._pause(head)

    async def run(self) -> None:
        """Follow the head for ever."""
        self.status.on_swap.append(self._news.set)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear_for_ever())
            group.create_task(self._take_for_ever())

    async def heartbeat(self) -> None:
        """Renew this server's record for ever.

        Raises:
            ConfigError: another living server has this one's id.
        """
        while True:
            await self._tell()
            await asyncio.sleep(HEARTBEAT_S)

    async def report(self) -> None:
        """Write this server's record now: it acknowledges what is held.

        Raises:
            ConfigError: another living server has this one's id.
            CoordinationError: Redis is away.
        """
        async with self._reporting:
            record = self._record()
            await self.coordinator.report(record)
            self._acknowledged = (record.version, record.digest)

    async def needs(self, lowest: int | None) -> None:
        """Put into the record what is being fetched, at once: the trainer deletes what nobody holds or needs.

        Args:
            lowest: version whose files are needed, and those of what follows; None for none.
        """
        self.status.needs = lowest
        if lowest is not None:
            await self._tell()

    def _record(self) -> ServerRecord:
        info, standing = self.engine.info, self.status.standing
        return ServerRecord(
            server_id=self.status.server_id,
            instance=self.status.instance,
            url=self.url,
            state=standing.state,
            version=standing.version,
            digest=standing.digest,
            model=info.model,
            engine=info.engine,
            in_flight=self.status.in_flight,
            sampled_tokens=self.status.sampled_tokens,
            head=0 if standing.head is None else standing.head.version,
            needs=self.status.needs,
            transfer=self._takes(),
            last_error=standing.failure,
            updated_at=time.time(),
        )

    def _takes(self) -> TransferBackend | None:
        """What a broadcast may come by. Only a version that is held proves that the run's tensors fit the model,
        and that the live ones will have the hashes that were announced."""
        transfer, held = transfer_of(self.engine), self.status.manifest
        if transfer is None or not transfer.verifies or held is None:
            return None
        return transfer.backend if held.dtype == self.engine.info.dtype else None

    async def _hear_for_ever(self) -> None:
        last_event, away = "0-0", False
        while True:
            try:
                # Events only wake us: the head is the truth, so lost or repeated ones do no harm.
                last_event = await self.coordinator.wait_event(last_event, WAIT_S)
                await self._hear()
            except CoordinationError as error:
                if not away:
                    log.warning("%s; serving on with %s", error, self._held())
                away = True
                await asyncio.sleep(RETRY_S)
            else:
                if away:
                    log.info("Redis answers again")
                away = False

    async def _hear(self) -> None:
        """Read the head; a Redis that knows less than we do is told.

        Raises:
            CoordinationError: Redis is away.
        """
        head, before = await self.coordinator.head(), self.status.standing
        if head is not None:
            self.status.note(Heard(head))
        standing = self.status.standing
        known = standing.head
        self._news.set()
        if standing.failure not in (before.failure, None):
            log.error("%s", standing.failure)
        behind = known is not None and (head is None or head.version < known.version)
        if known is not None and behind and await self.coordinator.restore(known):
            log.warning("Redis had lost version %d; it has it again", known.version)
        if standing.state is not before.state:
            if not standing.state.serves:
                # A checkpoint is what every server begins with: nothing is wrong.
                log.log(
                    logging.WARNING if standing.digest else logging.INFO, "%s", standing.refusal
                )
            await self.report()  # nobody may choose a server that is stale

    async def _take_for_ever(self) -> None:
        while True:
            self._news.clear()
            standing = self.status.standing
            if standing.holds_head:
                self.status.needs = None  # of a fetch that failed
                if self._acknowledged != (standing.version, standing.digest):
                    await self._tell()  # it came by broadcast
                await self.taker.tidy()
                await self._news.wait()
            elif not await self._broadcast_came():
                head = self.status.standing.head
                if not await self._take_newest():
                    await self._pause(head)
                elif self.taker.untidy:
                    # A server that is always one version behind would otherwise never come to it.
                    await self.taker.tidy()

    async def _broadcast_came(self) -> bool:
        """Where the engine is in a group, wait a moment for the newest version to come so. A trainer that
        announces and does not broadcast is gone: then the group is left."""
        transfer = transfer_of(self.engine)
        if transfer is None or not transfer.joined:
            return False
        status = self.status
        await status.swaps.coming(lambda: status.standing.holds_head or not transfer.joined)
        if not status.standing.holds_head and transfer.joined:
            log.warning("the newest version did not come by broadcast: the group is left")
            with contextlib.suppress(SpokeError):  # of an engine that has died, which others see
                await transfer.leave()
        return status.standing.holds_head

    async def _pause(self, failed: Head | None) -> None:
        """Wait as long as the failures so far ask for; a newer head ends it.

        Args:
            failed: the head that could not be taken: a newer one may have come while it was tried.
        """
        # Not in step with the rest of the fleet.
        seconds = pause_s(self.status.standing.failures) * random.uniform(0.7, 1.3)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.status.standing.head == failed:
                    self._news.clear()
                    await self._news.wait()

    async def _take_newest(self) -> bool:
        """Take the newest version known. False where that failed and is to be tried again."""
        head = self.status.standing.head
        assert head is not None, "only what was heard of is taken"
        self.status.note(Began(head.version))
        await self._tell()
        taken, first = False, not self.status.weights_digest
        try:
            await self.taker.take(head)
            taken = True
            self._failures.over()
            if first:
                self._warn_of_rounding()
        except (SpokeError, OSError) as error:  # OSError: no room on the disk, or too slow
            reason = str(error) or type(error).__name__
            named = f"version {head.version}"
            reason = (
                reason if reason.startswith((f"{named} ", f"{named}:")) else f"{named}: {reason}"
            )
            self.status.note(Failed(reason))
            if line := self._failures.line(f"{reason}; {self._held()} stays"):
                log.warning("%s", line)
        self.metrics.updates.labels("ok" if taken else "failed").inc()
        await self._tell()
        return taken

    def _held(self) -> str:
        return f"version {self.engine.version}" if self.status.weights_digest else "the checkpoint"

    def _warn_of_rounding(self) -> None:
        manifest = self.status.manifest
        loss = None if manifest is None else rounded(manifest.dtype, self.engine.info.dtype)
        if loss is not None:
            log.warning("%s", loss)

    async def _tell(self) -> None:
        try:
            await self.report()
        except CoordinationError as error:
            if not self._missing.is_set():
                log.warning("%s; this server is not in the fleet table until it does", error)
            self._missing.set()
        else:
            self._missing.clear()
