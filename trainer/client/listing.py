"""Who may be asked: a list that one call in the background brings up to date, for all trees of a client."""

import asyncio
import logging

from shared.errors import CoordinationError
from trainer.client.routing import NEVER, ListServers, Router

log = logging.getLogger("spoke.client")

REFRESH_S = 0.5
"""How long a list of servers is used before it is asked for again, seconds."""
LIST_S = 0.2
"""Trees wait for a new list for so long, seconds, and then go by the old one: whoever lists may hang."""


class Listing:
    """Keeps a router's servers up to date.

    Args:
        servers: lists those that are alive.
        router: is told.
    """

    def __init__(self, servers: ListServers, router: Router) -> None:
        self._servers = servers
        self._router = router
        self._listed_at = NEVER
        self._begun_at = NEVER
        self._call: asyncio.Task[None] | None = None
        self.away: str | None = None
        """Why nobody could be asked the last time; None where somebody could."""

    def expire(self) -> None:
        """What is known may be wrong."""
        self._listed_at = NEVER

    async def refresh(self, deadline: float) -> None:
        """Ask who is alive, where what is known is old; wait for long only where nobody is known.

        While nobody can be asked, trees go by what is known: servers go on without Redis.

        Args:
            deadline: of the wait, on the loop's clock.

        Raises:
            Exception: whatever `servers` raises but CoordinationError.
        """
        now = asyncio.get_running_loop().time()
        ended = self._call is None or self._call.done()
        if ended and (now - self._listed_at > REFRESH_S or not self._router.any):
            self._result()
            self._listed_at = self._begun_at = now
            self._call = asyncio.create_task(self._list())
        if self._call is None or self._call.done():
            return
        until = min(deadline, self._begun_at + LIST_S) if self._router.any else deadline
        if until > now:
            await asyncio.wait({self._call}, timeout=until - now)
            self._result()

    async def close(self) -> None:
        """Give up the call that is on its way."""
        if self._call is not None:
            self._call.cancel()
            await asyncio.wait({self._call})
            if not self._call.cancelled():
                self._call.exception()  # nobody waits for it any more

    def _result(self) -> None:
        """Raise what the last call did, once."""
        if self._call is not None and self._call.done():
            call, self._call = self._call, None
            call.result()

    async def _list(self) -> None:
        try:
            self._router.update(await self._servers())
        except CoordinationError as error:
            if self.away is None:
                log.warning("%s; going on with the servers known so far", error)
            self.away = str(error)
        else:
            self.away = None
