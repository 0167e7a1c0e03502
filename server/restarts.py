"""Trees that are begun anew when the engine takes other weights (`in_flight` is "restart").

What was sampled of such a tree is dropped at the swap, and it starts again with the new weights. Weights that come
faster than a tree grows must not keep it from ever ending: after `MOST` new beginnings it goes on with what comes.
"""

import asyncio
from collections.abc import Awaitable, Callable

from server.branches import Branch, walk

MOST = 3
"""New beginnings of one tree."""


class Restarts:
    """The trees that grow now and are to be of one version each."""

    def __init__(self) -> None:
        self._growing: set[asyncio.Future[Branch]] = set()
        self._overtaken: set[asyncio.Future[Branch]] = set()

    def swapped(self) -> int:
        """The engine has other weights: begin the trees anew that grow now; how many."""
        growing = [growth for growth in self._growing if not growth.done()]
        self._overtaken.update(growing)
        for growth in growing:
            growth.cancel()
        return len(growing)

    async def newest(
        self, grow: Callable[[], Awaitable[Branch]], anew: Callable[[], None]
    ) -> Branch:
        """A tree that one version has sampled whole, or the tree after the last new beginning.

        Args:
            grow: samples a tree, from its start.
            anew: is told before each new beginning.
        """
        for _ in range(MOST):
            root = await self._overtaken_or_grown(grow)
            if root is not None and len(_versions(root)) < 2:
                return root
            anew()
        return await grow()

    async def _overtaken_or_grown(self, grow: Callable[[], Awaitable[Branch]]) -> Branch | None:
        growth = asyncio.ensure_future(grow())
        self._growing.add(growth)
        try:
            await asyncio.wait({growth})
            if growth.cancelled() and growth in self._overtaken:
                return None
            return growth.result()
        finally:
            self._growing.discard(growth)
            self._overtaken.discard(growth)
            if not growth.done():  # whoever waits has gone, or this server is going
                growth.cancel()
                await asyncio.wait({growth})


def _versions(root: Branch) -> set[int]:
    """Weight versions that sampled a tree: two, where it ended between the swap and the word of it."""
    completions = (place.branch.completion for place in walk(root))
    return {version for done in completions if done for version, _ in done.versions}
