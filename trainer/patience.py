"""How the trainer waits for others: with a message, and never for ever.

Below `min_servers`, or while Redis is away, the run pauses and says so; it goes on by itself when they are back,
and stops with one line after `pause_s`. Where enough servers live and all that do not serve report errors, waiting
helps nobody: it stops after `wait_s`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from shared.coordination import is_away
from shared.errors import CoordinationError, FleetError
from shared.fleet import Head, ServerRecord, ServerState
from trainer.roll_call import MOST_NAMES, named, not_serving

T = TypeVar("T")
Servers = Callable[[], Awaitable[list[ServerRecord]]]
"""The live servers' records; raises CoordinationError while Redis is away."""

POLL_S = 0.02
PAUSED_POLL_S = 0.25
"""While paused, where nothing is urgent."""
QUIET_S = 10.0
"""So long nobody is told that servers which live and report no error do not serve yet: they take a version."""
READ_SHARE = 10
"""A look at the fleet is followed by a rest of at least so many times what it took: the table may be long."""
MOST_REST_S = 1.0
MOST_PAUSED = 3
"""Times `pause_s` that one wait may pause in all: else servers that die again and again would never end it."""


def nothing(text: str) -> None:
    """Tell nobody."""


@dataclass(slots=True, kw_only=True)
class Patience:
    """Waits of one run.

    Args:
        servers: lists the live servers.
        min_servers: below so many that serve, the run pauses.
        wait_s: bound of the wait for a version to reach the servers that live, and for those that report errors.
        pause_s: bound of a pause.
        tell: shows a line that stays.
    """

    servers: Servers
    min_servers: int
    wait_s: float
    pause_s: float
    tell: Callable[[str], None] = nothing
    behind: dict[str, int] = field(default_factory=dict)
    """Servers that did not follow to a version within `wait_s`: nobody waits for them until they hold it."""
    _served: set[str] | None = field(default=None, init=False)
    """Servers that served when the last version was held; None before the first."""
    _read_s: float = field(default=0.0, init=False)
    """What the last look at the fleet took."""

    async def through_outage(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        """The result of a call to Redis, made again while Redis is away.

        Raises:
            LeaseError: another trainer has the run.
            CoordinationError: Redis refused, or was away for longer than `pause_s`; it names the address.
        """
        pause = _Pause(patience=self)
        while True:
            try:
                result = await call()
            except CoordinationError as error:
                if not is_away(error):
                    raise
                pause.begin()
                if pause.over:
                    raise CoordinationError(
                        f"{error}; given up after {self.pause_s:.0f} s"
                    ) from None
                pause.say(f"{error}; {what} waits, at most {self.pause_s:.0f} s")
                await asyncio.sleep(PAUSED_POLL_S)
            else:
                pause.end(f"Redis answers; {what} goes on")
                return result

    async def enough(self) -> bool:
        """Wait until `min_servers` serve; whether that took a pause.

        Raises:
            FleetError: they did not come back within `pause_s`, or report errors for longer than `wait_s`.
            CoordinationError: Redis was away for longer.
        """
        pause = _Pause(patience=self)
        while True:
            records = await self._records()
            serving = sum(r.state.serves for r in records)
            if serving >= self.min_servers:
                return pause.end(f"enough servers serve ({serving}); going on")
            pause.wait_for_servers(records)
            await self._rest(PAUSED_POLL_S)

    async def look(self) -> bool | None:
        """As `enough`, but a Redis that is away is not waited for: the servers known so far may live.

        Returns:
            Whether there was a pause; None while Redis is away.

        Raises:
            FleetError, CoordinationError: see `enough`.
        """
        try:
            records = await self._read()
        except CoordinationError as error:
            if not is_away(error):
                raise
            return None
        if sum(r.state.serves for r in records) >= self.min_servers:
            return False
        return await self.enough()

    async def followed(
        self, head: Head, *, all_within_s: float | None = None
    ) -> list[ServerRecord]:
        """Wait until every server that serves holds the head, and at least `min_servers` of them.

        A server that dies, is stale or still loads is not waited for; nor, once `min_servers` hold the head, is
        one that lags for longer than `wait_s`, until it has caught up. New servers count once they serve.

        Args:
            head: announced.
            all_within_s: bound of the wait for the others once `min_servers` hold the head, where those are enough
                to go on; nobody counts as left behind then. None is `wait_s` from the start.

        Returns:
            Records of the servers that hold it.

        Raises:
            FleetError: too few servers serve for longer than `pause_s`, or those that could report errors for
                longer than `wait_s`; or enough serve and too few of them hold the head within `wait_s`. It names
                what the others say.
            CoordinationError: Redis was away for longer than `pause_s`.
        """
        pause, slow = _Pause(patience=self), time.monotonic() + QUIET_S
        deadline, enough = time.monotonic() + self.wait_s, float("inf")
        while True:
            records = await self._records()
            serving = [r for r in records if r.state.serves]
            holders = [r for r in serving if head.held_by(r)]
            others = [r for r in serving if not head.held_by(r)]
            for r in serving:
                if r.version >= self.behind.get(r.server_id, r.version + 1):
                    del self.behind[r.server_id]
            if len(serving) >= self.min_servers:
                pause.end(f"enough servers serve ({len(serving)}); going on")
            now = time.monotonic()
            late = now > deadline
            if len(holders) >= self.min_servers:
                if all_within_s is not None:
                    enough = min(enough, now + all_within_s)
                if late:
                    self._leave_behind(head, others)
                if late or now > enough or all(r.server_id in self.behind for r in others):
                    self._tell_changes({r.server_id for r in serving})
                    return holders
            if len(serving) < self.min_servers:
                pause.wait_for_servers(records)
                deadline = time.monotonic() + self.wait_s  # those that come back have their time
                await self._rest(PAUSED_POLL_S)
                continue
            if now > slow and self._tell_failing(head, others):
                slow = float("inf")
            if late and len(holders) < self.min_servers:
                says = "; ".join(f"{r.server_id}: {r.last_error or r.state}" for r in others)
                raise FleetError(
                    f"version {head.version}: {len(holders)} of at least {self.min_servers} servers hold it "
                    f"after {self.wait_s:.0f} s; {says}"
                )
            await self._rest(POLL_S)

    def _tell_failing(self, head: Head, others: list[ServerRecord]) -> bool:
        """Say which servers are waited for although they cannot take a version; False where there is none."""
        failing = [f"{r.server_id} ({r.last_error})" for r in others if r.last_error]
        if failing:
            self.tell(
                f"version {head.version} waits for {'; '.join(failing[:MOST_NAMES])}, at most {self.wait_s:.0f} s"
            )
        return bool(failing)

    def _leave_behind(self, head: Head, others: list[ServerRecord]) -> None:
        new = [r for r in others if r.server_id not in self.behind]
        self.behind |= {r.server_id: head.version for r in new}
        for r in new:
            self.tell(
                f"{r.server_id} does not follow to version {head.version} "
                f"({r.last_error or r.state}); it is left behind until it does"
            )

    def _tell_changes(self, serving: set[str]) -> None:
        """Say who came and who went since the last version."""
        before, self._served = self._served, serving
        if before is not None and before != serving:
            changes = [(before - serving, "gone"), (serving - before, "new")]
            told = ", ".join(f"{named(names)} {what}" for names, what in changes if names)
            self.tell(f"servers: {told}; {len(serving)} serve")

    async def _records(self) -> list[ServerRecord]:
        return await self.through_outage(self._read, "the run")

    async def _read(self) -> list[ServerRecord]:
        begun = time.monotonic()
        records = await self.servers()
        self._read_s = time.monotonic() - begun
        return records

    async def _rest(self, least_s: float) -> None:
        await asyncio.sleep(max(least_s, min(MOST_REST_S, READ_SHARE * self._read_s)))


@dataclass(slots=True, kw_only=True)
class _Pause:
    """The pauses of one wait: each has its bound, from its own beginning, and so have all of them together."""

    patience: Patience
    since: float | None = None
    """When the pause that is on began."""
    spent_s: float = 0.0
    """In those that ended."""
    said: bool = False
    blamed: set[str] = field(default_factory=set)
    """Servers whose errors were told."""
    hopeless_since: float | None = None
    """From when on all that could serve report errors."""

    def begin(self) -> None:
        """From now on, unless a pause is on."""
        if self.since is None:
            self.since = time.monotonic()

    @property
    def over(self) -> bool:
        lasts_s = 0.0 if self.since is None else time.monotonic() - self.since
        bound_s = self.patience.pause_s
        return lasts_s > bound_s or self.spent_s + lasts_s > MOST_PAUSED * bound_s

    def say(self, text: str) -> None:
        """Once a pause."""
        if not self.said:
            self.patience.tell(text)
        self.said = True

    def end(self, text: str) -> bool:
        """Whether a pause was on; it is over, and another one has a bound of its own."""
        if self.since is None:
            return False
        if self.said:
            self.patience.tell(text)
        self.spent_s += time.monotonic() - self.since
        self.since, self.said, self.hopeless_since = None, False, None
        self.blamed.clear()
        return True

    def wait_for_servers(self, records: Sequence[ServerRecord]) -> None:
        """Too few serve: say so, and what keeps them; again when another one reports an error.

        Raises:
            FleetError: this has lasted too long.
        """
        self.begin()
        wanted, bound = self.patience.min_servers, self.patience.pause_s
        alive = [r for r in records if r.state is not ServerState.DRAINING]
        idle = [r for r in alive if not r.state.serves]
        failing = {r.server_id for r in idle if r.last_error}
        enough = len(alive) >= wanted
        text = f"{len(alive) - len(idle)} of {wanted} servers serve{not_serving(records)}"
        self._judge(text, hopeless=enough and len(failing) == len(idle))
        if self.over:
            raise FleetError(
                f"{text} after a pause of {bound:.0f} s; start servers, then --resume, or lower "
                "fleet.min_servers"
            )
        assert self.since is not None, "it has begun"
        if enough and not failing and time.monotonic() - self.since < QUIET_S:
            return
        if failing - self.blamed:
            self.blamed |= failing
            self.said = False
        self.say(f"{text}; waiting, at most {bound:.0f} s")

    def _judge(self, text: str, *, hopeless: bool) -> None:
        """Give up where nobody comes by waiting."""
        now, bound = time.monotonic(), self.patience.wait_s
        since = now if self.hopeless_since is None else self.hopeless_since
        self.hopeless_since = since if hopeless else None
        if hopeless and now - since > bound:
            raise FleetError(
                f"{text}, and those that live report errors for {bound:.0f} s; mend that, then --resume"
            )
