"""The trainer's hold on its run: one trainer at a time, and none that was overtaken goes on unknowingly.

A lease that is gone (Redis restarted empty, or this process was stopped for longer than it lasts) is taken again.
Then the versions decide: where one is not ours, another trainer has trained meanwhile and this run stops; else the
head that Redis may have lost is restored and the run goes on.

A holder that was killed leaves its lease behind for at most `LEASE_S`. It is waited for, not taken for dead by its
host and process id: containers share both. A holder that lives is known by its renewals, by Redis' clock: the time
that its lease has left goes up.
"""

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Collection
from typing import Protocol

from shared import coordination
from shared.coordination import Coordinator, Leases
from shared.errors import CoordinationError, LeaseError, LeaseHeldError, WeightsError
from shared.fleet import Head
from trainer.storing import asked

POLL_S = 0.1
RETRY_S = 1.0
STORED_S = 30.0
"""Longest wait for the store's list of versions."""


class RunCoordinator(Leases, Coordinator, Protocol):
    """What a trainer needs of Redis."""


class Lease:
    """A run's lease. Made by `hold`, which renews it.

    Args:
        coordinator: Redis.
        stored: the versions with a manifest in the store; called in a thread.
        run: name of the run, for messages.
        status: shows what is waited for.
    """

    def __init__(
        self,
        coordinator: RunCoordinator,
        stored: Callable[[], Collection[int]],
        run: str,
        status: Callable[[str], None],
    ) -> None:
        self._coordinator = coordinator
        self._stored = stored
        self._run = run
        self._status = status
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._token: str | None = None
        self._released = False
        self._found = -1
        """The newest version when the run was taken."""
        self._begun: set[int] = set()
        self._head: Head | None = None
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Become the run's trainer; what a dead one left is waited for.

        Raises:
            LeaseHeldError: another trainer lives.
            CoordinationError: Redis is away.
            WeightsError: the store is away.
        """
        self._token = await self._acquire()
        known, _ = await self._known()
        self._found = max(known, default=-1)

    def begin(self, version: int) -> None:
        """From now on this version in the store is ours."""
        self._begun.add(version)

    @property
    def _last(self) -> int:
        return max(self._begun, default=self._found)

    async def check(self) -> None:
        """Return only if the run is ours now; a lease that is gone is taken again where nobody else has trained.

        Raises:
            LeaseError: another trainer has taken over: this run is to stop.
            CoordinationError: Redis is away.
            WeightsError: the store is away while it is needed to decide.
        """
        async with self._lock:
            if self._released:
                raise LeaseError(f"the lease on run {self._run!r} is given back")
            if self._token is None:
                await self._take_again()
            else:
                try:
                    await self._coordinator.renew_lease(self._token)
                except LeaseError:
                    self._token = None
                    await self._take_again()
            if self._head is not None:
                # A Redis that came back from an old copy of its memory has our lease and an old head.
                await self._coordinator.restore(self._head)

    async def announce(self, head: Head) -> None:
        """Make a version the head, once its bytes are durable.

        Raises:
            LeaseError: another trainer has taken over.
            CoordinationError: Redis is away; the same call may be made again.
        """
        try:
            await self._coordinator.announce(self._token or "", head)
        except LeaseError:
            await self.check()
            await self._coordinator.announce(self._token or "", head)
        self._head = head

    async def keep(self) -> None:
        """Renew for ever. A Redis that is away is waited for; nothing can be published meanwhile.

        Raises:
            LeaseError: another trainer has taken over.
        """
        pause = coordination.LEASE_S / 3
        while True:
            await asyncio.sleep(pause)
            try:
                await self.check()
                pause = coordination.LEASE_S / 3
            except LeaseError:
                raise
            except (CoordinationError, WeightsError) as error:
                if pause != RETRY_S:
                    self._status(f"{error}; the run goes on, publishing waits")
                pause = RETRY_S

    async def release(self) -> None:
        """Let another trainer have the run at once. Nothing is published after this."""
        self._released = True
        if self._token is not None:
            # Nobody is there to be told: the lease ends by itself.
            with contextlib.suppress(CoordinationError):
                await self._coordinator.renew_lease(self._token, release=True)

    async def _acquire(self) -> str:
        """The lease, once it is free; raises LeaseHeldError as soon as its holder is seen to live."""
        held: LeaseHeldError | None = None
        while True:
            try:
                return await self._coordinator.acquire_lease(self._owner)
            except LeaseHeldError as error:
                # It always ends: each turn without a renewal leaves less of a time that is bounded.
                renewed = held is not None and error.left_s > held.left_s - POLL_S / 2
                other = held is not None and error.owner != held.owner
                if renewed or other or not 0 <= error.left_s <= coordination.LEASE_S:
                    raise
                if held is None:
                    self._status(
                        f"run {self._run!r} is held by {error.owner}; waiting up to {error.left_s:.0f} s "
                        "to see whether it lives"
                    )
                held = error
            await asyncio.sleep(POLL_S)

    async def _known(self) -> tuple[set[int], Head | None]:
        """(versions that are announced or stored, the head)."""
        head = await self._coordinator.head()
        place = f"the weight store of run {self._run!r}"
        try:
            stored = await asked(place, STORED_S, self._stored)
        except OSError as error:
            raise WeightsError(f"{place}: {error}") from error
        return {*stored, *([head.version] if head else [])}, head

    async def _take_again(self) -> None:
        self._status(f"the lease on run {self._run!r} is gone; taking it again")
        try:
            token = await self._acquire()
        except LeaseHeldError as error:
            raise LeaseError(
                f"run {self._run!r} was taken over by {error.owner}: this trainer was stopped for longer than its "
                f"lease of {coordination.LEASE_S:.0f} s, or Redis lost it; its last version is {self._last}"
            ) from None
        known, head = await self._known()
        ours = self._head
        # Not by what is newest: a number of ours may lie above those that another trainer used meanwhile.
        strange = {version for version in known if version > self._found} - self._begun
        replaced = (
            head is not None
            and ours is not None
            and head.version == ours.version
            and head.manifest_digest != ours.manifest_digest
        )
        if strange or replaced:
            with contextlib.suppress(CoordinationError):
                await self._coordinator.renew_lease(token, release=True)
            raise LeaseError(
                f"run {self._run!r} was trained by another trainer meanwhile: version {max(strange or known)} "
                f"is not of this one, whose last is {self._last}; go on from the other's checkpoints, or use "
                "another --run"
            )
        self._token = token


@contextlib.asynccontextmanager
async def hold(
    coordinator: RunCoordinator,
    stored: Callable[[], Collection[int]],
    run: str,
    status: Callable[[str], None],
) -> AsyncIterator[Lease]:
    """Hold the run while the block runs. The block is cancelled, and LeaseError raised, when another took over.

    Args: see `Lease`.

    Raises:
        LeaseError: another trainer holds the run, or has taken it over.
        CoordinationError: Redis is away at the start.
        WeightsError: the store is away at the start.
    """
    lease = Lease(coordinator, stored, run, status)
    body = asyncio.current_task()
    assert body is not None

    def stop(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            body.cancel()

    try:
        await lease.take()
        keeping = asyncio.create_task(lease.keep())
        keeping.add_done_callback(stop)
        try:
            yield lease
        except asyncio.CancelledError:
            # Ours, unless somebody else cancelled as well.
            if not keeping.done() or keeping.cancelled() or body.uncancel() > 0:
                raise
            error = keeping.exception()
            assert error is not None
            raise error from None
        finally:
            keeping.remove_done_callback(stop)
            keeping.cancel()
    finally:
        await lease.release()
