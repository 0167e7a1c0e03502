"""The fleet, as the trainer sees it: who is alive, who is least loaded, who holds which version.

One tree is one request. A request is retried by its id on another server, so that a server that dies costs time
and no tree; what a retry cannot mend (a malformed request) is raised at once.
"""

import asyncio
import time
from collections.abc import Callable

from shared.coordination import Coordinator
from shared.errors import CoordinationError, FleetError, NoTreeError
from shared.fleet import Head, ServerRecord, ServerState
from shared.wire import RolloutTreeRequest, RolloutTreeResponse
from trainer.client import AsyncClient, ListServers, Target, fixed
from trainer.patience import MOST_PAUSED, QUIET_S, Patience, nothing
from trainer.roll_call import not_serving
from trainer.watch import Watch

__all__ = [
    "Fleet", "ListServers", "Target", "fixed", "registered", "wait_for_head", "wait_for_servers",
]  # fmt: skip


def registered(coordinator: Coordinator) -> ListServers:
    """The live servers of a run that may serve, from Redis; while Redis is away, the last that it named.

    Raises (when called):
        CoordinationError: Redis is away and has never named any.
    """
    known: list[Target] = []

    async def servers() -> list[Target]:
        nonlocal known
        try:
            records = await coordinator.servers()
        except CoordinationError:
            if not known:
                raise
            return known
        found = [
            Target(url=r.url, version=r.version, load=r.in_flight)
            for r in records
            if r.state.serves
        ]
        known = found or known  # a Redis that restarted empty knows of nobody for a moment
        return found

    return servers


class Fleet:
    """Sends tree requests to whichever live server has least to do.

    Args:
        list_servers: the live servers.
        concurrency: most trees in flight.
        timeout_s: bound of one tree, all attempts together.
        keep_nodes: a tree that moves to another server takes along what has finished; see `AsyncClient`.
        patience: waits for servers where too few are alive to give a tree; None does not.
    """

    def __init__(
        self,
        list_servers: ListServers,
        *,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        keep_nodes: bool = True,
        patience: Patience | None = None,
    ) -> None:
        # No slack: training asks a question once with any weights, so its prefix is at no server yet.
        self._client = AsyncClient(
            list_servers,
            concurrency=concurrency,
            timeout_s=timeout_s,
            affinity_slack=0,
            keep_nodes=keep_nodes,
        )
        self._patience = patience
        self._watch = None if patience is None else Watch(patience)

    async def close(self) -> None:
        """Close the connections."""
        if self._watch is not None:
            await self._watch.close()
        await self._client.close()

    async def rollout_tree(self, request: RolloutTreeRequest) -> RolloutTreeResponse:
        """One tree from whichever server has least to do, tried again elsewhere until the bound.

        With patience, a tree that was not given is asked for once more, by the same id; after a pause, as often as
        there is one, until the pauses together took too long: the tree may be what the servers die of. While Redis
        is away it is asked for at the servers known so far, and then once Redis is back.

        Raises:
            RequestError: the request itself is refused.
            ConfigError: a server does not take the token in SPOKE_TOKEN.
            NoTreeError: no server gave the tree within the bound, although enough were alive.
            FleetError: too few servers were alive, with patience for longer than a pause may take.
            CoordinationError: Redis refused, or was away for longer than that.
        """
        if self._patience is None or self._watch is None:
            answer = await self._ask(request)
            if isinstance(answer, NoTreeError) and not await self._client.ready():
                raise FleetError(str(answer))
        else:
            answer = await self._ask_patiently(request, self._patience, self._watch)
        if isinstance(answer, NoTreeError):
            raise answer
        return answer

    async def _ask_patiently(
        self, request: RolloutTreeRequest, patience: Patience, watch: Watch
    ) -> RolloutTreeResponse | NoTreeError:
        failures, paused_s = 0, watch.paused_s
        while True:
            pauses = watch.pauses
            answer = await watch.during(self._ask(request))
            if not isinstance(answer, NoTreeError):
                return answer
            away = await watch.look() is None
            if (
                away and failures
            ):  # where it was known to be, nobody gave it: perhaps others are there by now
                await patience.enough()
            else:
                failures += watch.pauses == pauses
            if failures > 1 or watch.paused_s - paused_s > MOST_PAUSED * patience.pause_s:
                return answer

    async def _ask(self, request: RolloutTreeRequest) -> RolloutTreeResponse | NoTreeError:
        try:
            return await self._client.rollout_tree(request)
        except FleetError as error:
            return NoTreeError(str(error))


async def wait_for_servers(
    coordinator: Coordinator,
    count: int,
    timeout_s: float,
    tell: Callable[[str], None] = nothing,
) -> list[ServerRecord]:
    """The live servers to begin with, once there are `count`: those that serve, and those that cannot take the
    newest version. Its bytes may be gone or damaged: then a newer one helps, which the caller publishes.

    Args:
        coordinator: Redis.
        count: so many.
        timeout_s: bound of the wait.
        tell: shows a line that stays; is told once, where this takes long.

    Raises:
        FleetError: too few within the bound.
    """
    began, told = time.monotonic(), False
    while True:
        alive = await coordinator.servers()
        records = [r for r in alive if r.state.serves or _waits_for_another(r)]
        if len(records) >= count:
            return records
        waited_s = time.monotonic() - began
        if waited_s > QUIET_S and not told:
            told = True
            tell(
                f"{len(records)} of {count} servers are ready{not_serving(alive)}; waiting, at most "
                f"{timeout_s:.0f} s"
            )
        if waited_s > timeout_s:
            raise FleetError(
                f"{len(records)} of {count} servers are ready{not_serving(alive)} after {timeout_s:.0f} s; start "
                "`python -m server --redis-url … --run …` with the same run, or lower fleet.min_servers"
            )
        await asyncio.sleep(0.1)


def _waits_for_another(record: ServerRecord) -> bool:
    """Can a server not take the newest version?"""
    return record.last_error is not None and record.state is not ServerState.DRAINING


async def wait_for_head(
    coordinator: Coordinator, head: Head, *, min_servers: int, timeout_s: float
) -> list[ServerRecord]:
    """Wait until every live server holds the head; see `Patience.followed`, which has the errors too."""
    patience = Patience(
        servers=coordinator.servers, min_servers=min_servers, wait_s=timeout_s, pause_s=timeout_s
    )
    return await patience.followed(head)
