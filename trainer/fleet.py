"""The fleet, as the trainer sees it: who is alive, who is least loaded, who holds which version.

One tree is one request. A request is retried by its id on another server, so that a server that dies costs time
and no tree; what a retry cannot mend (a malformed request) is raised at once.
"""

import asyncio
import time

from shared.coordination import Coordinator
from shared.errors import FleetError
from shared.fleet import Head, ServerRecord
from shared.wire import RolloutTreeRequest, RolloutTreeResponse
from trainer.client import AsyncClient, ListServers, Target, fixed

__all__ = [
    "Fleet", "ListServers", "Target", "fixed", "registered", "wait_for_head", "wait_for_servers",
]  # fmt: skip

POLL_S = 0.02


def registered(coordinator: Coordinator) -> ListServers:
    """The live servers of a run that may serve, from Redis."""

    async def servers() -> list[Target]:
        records = await coordinator.servers()
        return [
            Target(url=r.url, version=r.version, load=r.in_flight)
            for r in records
            if r.state.serves
        ]

    return servers


class Fleet:
    """Sends tree requests to whichever live server has least to do.

    Args:
        list_servers: the live servers.
        concurrency: most trees in flight.
        timeout_s: bound of one tree, all attempts together.
        keep_nodes: a tree that moves to another server takes along what has finished; see `AsyncClient`.
    """

    def __init__(
        self,
        list_servers: ListServers,
        *,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        keep_nodes: bool = True,
    ) -> None:
        # No slack: training asks a question once with any weights, so its prefix is at no server yet.
        self._client = AsyncClient(
            list_servers,
            concurrency=concurrency,
            timeout_s=timeout_s,
            affinity_slack=0,
            keep_nodes=keep_nodes,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def rollout_tree(self, request: RolloutTreeRequest) -> RolloutTreeResponse:
        """One tree from whichever server has least to do, tried again elsewhere until the bound.

        Raises:
            RequestError: the request itself is refused.
            ConfigError: a server does not take the token in SPOKE_TOKEN.
            FleetError: no server gave the tree within the bound.
        """
        return await self._client.rollout_tree(request)


async def wait_for_servers(
    coordinator: Coordinator, count: int, timeout_s: float
) -> list[ServerRecord]:
    """The live servers that may serve, once there are `count`.

    Raises:
        FleetError: too few within the bound.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        records = [r for r in await coordinator.servers() if r.state.serves]
        if len(records) >= count:
            return records
        if time.monotonic() > deadline:
            raise FleetError(
                f"{len(records)} of {count} servers are ready after {timeout_s:.0f} s; start "
                "`python -m server --redis-url … --run …` with the same run, or lower fleet.min_servers"
            )
        await asyncio.sleep(0.1)


async def wait_for_head(
    coordinator: Coordinator, head: Head, *, min_servers: int, timeout_s: float
) -> list[ServerRecord]:
    """Wait until every live server holds the head; a server that dies is waited for no longer.

    Returns:
        Records of the servers that hold it. After the bound, servers that still lag are left behind when at
        least `min_servers` hold the head.

    Raises:
        FleetError: fewer than `min_servers` hold it within the bound; it names what the others say.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        records = await coordinator.servers()
        holders = [r for r in records if r.state.serves and head.held_by(r)]
        late = time.monotonic() > deadline
        if len(holders) >= min_servers and (late or len(holders) == len(records)):
            return holders
        if late:
            others = [
                f"{r.server_id}: {r.last_error or r.state}" for r in records if r not in holders
            ]
            raise FleetError(
                f"version {head.version}: {len(holders)} of at least {min_servers} servers hold it after "
                f"{timeout_s:.0f} s; " + ("; ".join(others) or "no other server is alive")
            )
        await asyncio.sleep(POLL_S)
