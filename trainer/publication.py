"""Versions on their way to the fleet while training goes on: one after the other, in order.

The step that made a version is blocked for its copy in host memory alone. What goes wrong here is raised to
whoever waits for a version next, so that it never passes unseen.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from shared.fleet import Head, ServerRecord
from trainer.patience import Patience
from trainer.publish import Publisher

Followed = Callable[[Head, list[ServerRecord]], None]

LEAST_GRACE_S = 0.5


class Publication:
    """Publishes in the background.

    Args:
        publisher: makes versions durable and announces them.
        patience: waits for servers.
    """

    def __init__(self, publisher: Publisher, patience: Patience) -> None:
        self._publisher = publisher
        self._patience = patience
        self._links: dict[int, asyncio.Task[None]] = {}
        """By version, those that are not held; each waits for the one before it."""
        self.held = -1
        """Newest version that at least `min_servers` hold."""
        self.followed: Followed | None = None
        """Called once a version is held, with the servers that hold it."""

    def start(self, version: int, tensors: Mapping[str, Tensor], snapshot_s: float) -> None:
        """Let a version follow those before it; returns at once.

        Args:
            version: higher than any before.
            tensors: copies, which nobody changes.
            snapshot_s: what the copies took.
        """
        before = self._links[max(self._links)] if self._links else None
        self._links[version] = asyncio.create_task(self._link(before, version, tensors, snapshot_s))

    async def holds(self, version: int) -> None:
        """Wait until at least `min_servers` hold a version, or a later one.

        Raises:
            SpokeError: it cannot be published, or the servers do not follow; see `Patience.followed`.
        """
        if self.held < version:
            assert version in self._links, "it would be waited for without an end"
            link = self._links[version]
            await asyncio.wait({link})  # which a waiter that is cancelled leaves alone
            link.result()  # raises what went wrong

    async def settled(self) -> None:
        """Wait until the newest version is held; raises as `holds` does."""
        if self._links:
            await self.holds(max(self._links))

    async def close(self) -> None:
        """Give up what is on its way."""
        links = list(self._links.values())
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)  # known already, or too late to matter

    async def _link(
        self,
        before: asyncio.Task[None] | None,
        version: int,
        tensors: Mapping[str, Tensor],
        snapshot_s: float,
    ) -> None:
        if before is not None:
            await before
        begun = time.monotonic()
        head = await self._publisher.publish(version, tensors, snapshot_s=snapshot_s)
        # Trees go to those that hold the version: a moment more for the others shares the trees out evenly.
        grace = max(LEAST_GRACE_S, time.monotonic() - begun)
        holders = await self._patience.followed(head, all_within_s=grace)
        self.held = version
        del self._links[version]
        if self.followed is not None:
            self.followed(head, holders)
