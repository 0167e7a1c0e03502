"""An eye on the fleet while trees are asked for, one for all of them.

A tree that no server gives says so only at its own bound, minutes later; a shortage of servers is told, and its
bound kept, from when it began.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from trainer.patience import Patience

T = TypeVar("T")

WATCH_S = 2.0
"""Between two looks at the fleet."""


class Watch:
    """Looks at the fleet while calls are on their way.

    Args:
        patience: looks, says what is missing, and waits for it.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._calls = 0
        self._watching: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[bool | None] | None = None
        self.pauses = 0
        """That are over."""
        self.paused_s = 0.0
        """In all of them."""

    async def during(self, call: Coroutine[Any, Any, T]) -> T:
        """The call's result.

        Raises:
            FleetError: meanwhile, too few servers were alive for longer than a pause may take.
            CoordinationError: Redis refused.
            Exception: whatever the call raises.
        """
        task = asyncio.create_task(call)
        if self._watching is None or self._watching.done():
            self._watching = _of_nobody(asyncio.create_task(self._watch()))
        watching = self._watching
        self._calls += 1
        try:
            await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await watching  # raises
            return task.result()
        finally:
            self._calls -= 1
            if not self._calls:
                watching.cancel()
                self._watching = None
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def look(self) -> bool | None:
        """See `Patience.look`; whoever wants to know while a look or a pause is on shares it."""
        if self._looking is None or self._looking.done():
            self._looking = _of_nobody(asyncio.create_task(self._look()))
        return await asyncio.shield(self._looking)

    async def close(self) -> None:
        """End the look that is on."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            await self.look()

    async def _look(self) -> bool | None:
        begun = asyncio.get_running_loop().time()
        paused = await self._patience.look()
        if paused:
            self.pauses += 1
            self.paused_s += asyncio.get_running_loop().time() - begun
        return paused


def _of_nobody(task: asyncio.Task[T]) -> asyncio.Task[T]:
    """What it raises may find nobody waiting any more."""
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return task
