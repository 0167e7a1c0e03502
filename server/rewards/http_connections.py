"""The connections to one reward server: so many at once, for which nobody waits while it says nothing."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator


class Connections:
    """At most so many requests at once, first come, first served.

    Args:
        count: requests at once.
        patience_s: how long one waits while no answer comes to anybody, in seconds.
    """

    def __init__(self, count: int, patience_s: float) -> None:
        self._free = asyncio.Semaphore(count)
        self._patience_s = patience_s
        self._waiting: set[asyncio.Timeout] = set()
        self.answered_at = -math.inf
        """The event loop's time of the last answer."""

    @contextlib.asynccontextmanager
    async def one(self, give_up: float = math.inf) -> AsyncIterator[None]:
        """One of them, as long as the block runs.

        Args:
            give_up: the event loop's time at which the wait ends at the latest.

        Raises:
            TimeoutError: none came free in time.
        """
        patient_until = asyncio.get_running_loop().time() + self._patience_s
        async with asyncio.timeout_at(min(give_up, patient_until)) as limit:
            if math.isinf(give_up):
                self._waiting.add(limit)
            try:
                await self._free.acquire()
            finally:
                self._waiting.discard(limit)
        try:
            yield
        finally:
            self._free.release()

    def answered(self) -> None:
        """An answer came: it is worth waiting on."""
        self.answered_at = asyncio.get_running_loop().time()
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(self.answered_at + self._patience_s)
