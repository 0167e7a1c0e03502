"""Brings the versions that this server lacks to its own disk: from other servers that hold them, or from the store."""

from collections.abc import Callable
from dataclasses import dataclass

from server.holdings import Holdings
from shared.chain import Chain
from shared.coordination import RedisCoordinator
from shared.fleet import Head
from shared.store import WeightReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """Fetches versions into a server's holdings.

    Args:
        holdings: take them.
        coordinator: knows who holds what.
        open_store: the reader of a store at a URL, or of another server at `{its url}/weights`.
        store_url: this server's own URL of the store; None takes what the head names.
        url: how the other servers reach this one; also who is asked by nobody here.
        peers: take files from other servers, where the store is served by the trainer.
    """

    holdings: Holdings
    coordinator: RedisCoordinator
    open_store: Callable[[str], WeightReader]
    store_url: str | None
    url: str
    peers: bool = True

    async def chain_to(self, head: Head) -> Chain:
        """Fetch what is missing of a head, and of what it builds upon; then everything is on this disk, verified.

        Cancelling it is harmless: what is half there is gone on with by the next call.

        Returns:
            Anchor and deltas whose newest manifest is the head's.

        Raises:
            WeightsError: a file cannot be had, is damaged, or there is no room for it.
            CoordinationError: never for a Redis that is away: then the store is asked.
        """
        raise NotImplementedError
