"""What a server knows of itself: where it stands, its weights, and what it is answering."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.states import Event, Standing, Took, after
from server.swaps import Swaps
from shared.errors import BusyError
from shared.fleet import ServerState
from shared.manifest import Manifest

STALE_S = 3.0
"""Retry-After of a server that is behind: about what a version takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """How the last new weights came, in seconds."""

    version: int
    encoding: str
    """`patch`: what changed; `full`: every tensor; `broadcast`: every tensor, from the trainer's memory."""
    fetch_s: float
    """Until every file was on this disk, its SHA-256 compared."""
    decode_s: float
    """From those files to what the engine reads, every tensor's SHA-256 compared."""
    stage_s: float
    """The engine's reading and checking of these, while it samples."""
    pause_s: float
    """How long no token was sampled."""
    apply_s: float
    """Of these, how long tensors were written."""

    def phases(self) -> dict[str, float]:
        """Seconds by phase."""
        return {
            "fetch": self.fetch_s,
            "decode": self.decode_s,
            "stage": self.stage_s,
            "pause": self.pause_s,
            "apply": self.apply_s,
        }


@dataclass(slots=True, kw_only=True)
class Status:
    """What a server knows of itself; the fleet table shows it."""

    server_id: str
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    """Of this process: another one under the same id is not this server."""
    standing: Standing = field(default_factory=Standing)
    """Changed by `note` alone."""
    manifest: Manifest | None = None
    """Of the weights in the engine; None for the checkpoint it started from."""
    update: Update | None = None
    """The last one that was taken."""
    needs: int | None = None
    """Lowest version whose files are being fetched; None while there is none."""
    in_flight: int = 0
    """Requests being answered."""
    sampled_tokens: int = 0
    on_swap: list[Callable[[], object]] = field(default_factory=list)
    """Are called, on the event loop, whenever the engine has taken other weights."""
    swaps: Swaps = field(default_factory=Swaps)
    """Whose turn it is to give the engine other weights."""
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, event: Event) -> None:
        """Let an event change where the server stands."""
        self.standing = after(self.standing, event)
        if isinstance(event, Took):
            for tell in self.on_swap:
                tell()

    @property
    def state(self) -> ServerState:
        """As the fleet sees it."""
        return self.standing.state

    @property
    def weights_digest(self) -> str:
        """Of the weights in the engine; empty for the checkpoint it started from."""
        return self.standing.digest

    def check(self) -> None:
        """Do nothing where requests may be taken.

        Raises:
            BusyError: they may not; it says why.
        """
        if not self.state.serves:
            stale = self.state is ServerState.STALE
            raise BusyError(self.standing.refusal, retry_after_s=STALE_S if stale else 1.0)

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
