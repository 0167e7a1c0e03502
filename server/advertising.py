"""Says in Redis which files this server hands to others: whoever looks for them need not ask everybody."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import CoordinationError
from shared.sources import HOLDS_S, Part, Sources

LOOK_S = 2.0
"""What is new or gone is said this soon."""


@dataclass(slots=True, kw_only=True)
class Advertiser:
    """Keeps what Redis says of this server's files right.

    Args:
        sources: in Redis.
        parts: what this server can give.
    """

    sources: Sources
    parts: Callable[[], frozenset[tuple[int, Part]]]
    _said: frozenset[tuple[int, Part]] = frozenset()

    async def run(self) -> None:
        """Say it for ever."""
        clock, due = asyncio.get_running_loop().time, 0.0
        while True:
            if self.parts() != self._said or clock() >= due:
                with contextlib.suppress(CoordinationError):  # said again in a moment
                    await self.say()
                    due = clock() + HOLDS_S / 3
            await asyncio.sleep(LOOK_S)

    async def say(self) -> None:
        """Say it now.

        Raises:
            CoordinationError: Redis is away.
        """
        await self._say(self.parts())

    async def leave(self) -> None:
        """This server gives nothing any more. Where Redis is away, that is seen a little later."""
        with contextlib.suppress(CoordinationError):
            await self._say(frozenset())

    async def _say(self, parts: frozenset[tuple[int, Part]]) -> None:
        await self.sources.advertise(parts, self._said - parts)
        self._said = parts
