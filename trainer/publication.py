"""Versions on their way to the fleet while training goes on: one after the other, in order.

The step that made a version is blocked for its copy in host memory alone. What goes wrong here is raised to whoever
waits for a version next, so that it never passes unseen.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping

from torch import Tensor

from shared.fleet import Head, ServerRecord
from trainer.patience import Patience

Publish = Callable[[int, Mapping[str, Tensor]], Awaitable[Head]]
Followed = Callable[[Head, list[ServerRecord]], Awaitable[None]]

LEAST_GRACE_S = 0.5


class Publication:
    """Publishes in the background.

    Args:
        publish: makes a version durable and announces it.
        patience: waits for servers.
        followed: called once a version is held, with the servers that hold it.
        held: newest version that the fleet holds at the start.
    """

    def __init__(
        self, publish: Publish, patience: Patience, followed: Followed, *, held: int
    ) -> None:
        self._publish = publish
        self._patience = patience
        self._followed = followed
        self._newest: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.held = held
        """Newest version that at least `min_servers` hold."""
        self.seconds: dict[str, float] = {}
        """Of the newest version that is held: `publish`, until it was announced; `fleet`, until it was held."""

    def start(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Let a version follow those before it; returns at once.

        Args:
            version: higher than any before.
            tensors: copies, which nobody changes.
        """
        self._newest = asyncio.create_task(self._one(self._newest, version, tensors))

    async def holds(self, version: int) -> None:
        """Wait until at least `min_servers` hold a version, or a later one.

        Raises:
            SpokeError: it cannot be published, or the servers do not follow; see `Patience.followed`.
        """
        while self.held < version:
            assert self._newest is not None, "nobody has published that version"
            self._changed.clear()
            waiting = asyncio.create_task(self._changed.wait())
            await asyncio.wait({waiting, self._newest}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self._newest.done():
                await self._newest  # raises what went wrong

    async def settled(self) -> None:
        """Wait until the newest version is held; raises as `holds` does."""
        if self._newest is not None:
            await asyncio.wait({self._newest})
            await self._newest

    async def close(self) -> None:
        """Give up what is on its way."""
        if self._newest is not None:
            self._newest.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._newest

    async def _one(
        self, before: asyncio.Task[None] | None, version: int, tensors: Mapping[str, Tensor]
    ) -> None:
        if before is not None:
            await before
        begun = time.monotonic()
        head = await self._publish(version, tensors)
        announced = time.monotonic()
        # Trees go to those that hold the version, so a moment more for the others shares them out evenly.
        grace = max(LEAST_GRACE_S, announced - begun)
        holders = await self._patience.followed(head, all_within_s=grace)
        self.seconds = {"publish": announced - begun, "fleet": time.monotonic() - announced}
        self.held = version
        self._changed.set()
        await self._followed(head, holders)
