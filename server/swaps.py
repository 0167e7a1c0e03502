"""Whose turn it is to give the engine other weights: the follower's, or a trainer's that broadcasts.

A broadcast cannot wait: what is not received in time breaks its group, and half of one ends the engine. So a
server that says that it can take a version promises its engine, and its follower keeps away until that is over.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

COMING_S = 5.0
"""Longest wait for a trainer that has announced a version to say that it will broadcast it."""
PROMISE_S = 30.0
"""Longest wait for a broadcast that was promised to begin: the other servers of the group are asked meanwhile."""
_POLL_S = 0.02


class Swaps:
    """The turns of one engine. They belong to one event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._promised_until = 0.0

    @property
    def promised(self) -> bool:
        """Is the engine kept free for a broadcast?"""
        return time.monotonic() < self._promised_until

    def promise(self) -> bool:
        """Keep the engine free for a broadcast, for a bounded time. False while it takes other weights."""
        if self._turn.locked():
            return False
        self._promised_until = time.monotonic() + PROMISE_S
        return True

    def withdraw(self) -> None:
        """No broadcast will come."""
        self._promised_until = 0.0

    @contextlib.asynccontextmanager
    async def broadcast(self) -> AsyncIterator[None]:
        """A broadcast's turn."""
        try:
            async with self._turn:
                yield
        finally:
            self.withdraw()

    @contextlib.asynccontextmanager
    async def follower(self) -> AsyncIterator[None]:
        """The follower's turn: once no broadcast is promised or under way."""
        await _until(lambda: not self.promised and not self._turn.locked())
        async with self._turn:
            yield

    async def coming(self, over: Callable[[], bool]) -> None:
        """Wait for the broadcast of a version that was announced: a moment for its promise, then until it is over.

        Args:
            over: nothing is to be waited for any more.
        """
        deadline = time.monotonic() + COMING_S

        def none_comes() -> bool:
            return time.monotonic() > deadline and not self.promised and not self._turn.locked()

        await _until(lambda: over() or none_comes())


async def _until(done: Callable[[], bool]) -> None:
    while True:
        if done():
            return
        await asyncio.sleep(_POLL_S)
