"""What a server knows of itself: its state, its weights, and what it is answering."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shared.fleet import ServerState


@dataclass(slots=True, kw_only=True)
class Status:
    """What a server knows of itself; the fleet table shows it."""

    server_id: str
    state: ServerState = ServerState.LOADING
    weights_digest: str = ""
    """Of the weights in the engine; empty for the checkpoint it started from."""
    last_error: str | None = None
    in_flight: int = 0
    """Requests being answered."""
    sampled_tokens: int = 0
    on_swap: list[Callable[[], object]] = field(default_factory=list)
    """Are called, on the event loop, whenever the engine has taken other weights."""
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request while it is being answered."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    def swapped(self, digest: str) -> None:
        """Note that the engine has taken other weights, by their digest, and tell of it."""
        self.weights_digest = digest
        for tell in self.on_swap:
            tell()

    async def idle(self, bound_s: float) -> bool:
        """Wait until nothing is being answered; False where that took longer than the bound."""
        if self.in_flight == 0:
            return True
        try:
            async with asyncio.timeout(bound_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
