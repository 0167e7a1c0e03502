"""Who fetches a version from whom, settled in Redis: the trainer's uplink carries few copies, not one a server.

A source (a server that holds the version, or the store) has a few slots. A slot is a claim that expires by Redis'
own clock: a claimant that dies gives it back by doing nothing. A Redis that restarted empty has no claims: then a
few more copies are sent than need be, and nothing else happens.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from shared.coordination import RedisCoordinator

ORIGIN = "origin"
"""The store among the sources; the others are URLs of servers."""
CLAIM_S = 15.0
"""Lifetime of a claim, seconds; renewed while its files come."""
HOLDS_S = 30.0
"""How long a server that says it has a version is taken to have it; by then its own record says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Claims slots of sources for one server.

    Args:
        coordinator: Redis.
        claimant: URL of this server, under which others fetch from it.
        origin_slots: servers that fetch from the store at once.
        peer_slots: servers that fetch from one server at once.
    """

    coordinator: RedisCoordinator
    claimant: str
    origin_slots: int = 2
    peer_slots: int = 2
    _random: random.Random = field(default_factory=random.Random)

    async def claim(
        self, version: int, *, holders: Collection[str], without: Collection[str], origin: bool
    ) -> str | None:
        """A slot of some source for a version.

        Args:
            version: wanted.
            holders: URLs of servers that are known to hold it, besides those that said so a moment ago.
            without: URLs not to take.
            origin: whether the store may be taken, where no server holds the version.

        Returns:
            A server's URL, or `ORIGIN`; empty where all slots are taken; None where there is nobody to take.

        Raises:
            CoordinationError: Redis is away.
        """
        keys = self.coordinator.keys
        answer = await self.coordinator.script(
            "claim_source",
            [keys.holders(version), keys.slots("")],
            [
                self.claimant,
                int(CLAIM_S * 1000),
                self.peer_slots,
                self.origin_slots if origin else 0,
                ORIGIN,
                self._random.randrange(1 << 30),
                len(without),
                *without,
                *holders,
            ],
        )
        return None if answer[-1] == "nobody" else str(answer[0])

    async def keep(self, version: int, source: str) -> None:
        """Renew a claim. Raises CoordinationError when Redis is away."""
        await self._settle(version, source, CLAIM_S, 0.0)

    async def release(self, version: int, source: str, *, holds: bool) -> None:
        """Give a claim back.

        Args:
            version: that was fetched.
            source: from whom.
            holds: whether this server has it now, for others.

        Raises:
            CoordinationError: Redis is away.
        """
        await self._settle(version, source, 0.0, HOLDS_S if holds else 0.0)

    async def _settle(self, version: int, source: str, claim_s: float, holds_s: float) -> None:
        keys = self.coordinator.keys
        await self.coordinator.script(
            "settle_source",
            [keys.slots(source), keys.holders(version)],
            [self.claimant, int(claim_s * 1000), int(holds_s * 1000)],
        )
