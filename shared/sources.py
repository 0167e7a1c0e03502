"""Who fetches a version from whom, settled in Redis: the trainer's uplink carries few copies, not one a server.

A source (a server that holds the version, or the store) has a few slots. A slot is a claim that expires by Redis'
own clock: a claimant that dies gives it back by doing nothing. A Redis that restarted empty has no claims: then a
few more copies are sent than need be, and nothing else happens. Who holds what is said by the holders themselves,
now and then; whoever looks for one is given a few of them at random, so that it costs the same in any fleet.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from shared.coordination import RedisCoordinator

ORIGIN = "origin"
"""The store among the sources; the others are URLs of servers."""
CLAIM_S = 15.0
"""Lifetime of a claim, seconds; renewed while its files come."""
HOLDS_S = 60.0
"""How long a server that says it has a part is taken to have it, seconds; it says so three times in that time."""
TRIED = 8
"""Holders whose slots one claim looks at."""
MOST_WITHOUT = 32
"""Sources that one claim is told not to take."""
MANIFEST_SLOTS = 4
"""Manifests at once from one server: they are small, and yet it sends only so many files at once."""
ORIGIN_MANIFEST_SLOTS = 16


class Part(StrEnum):
    """What of a version is wanted or held. An anchor has both kinds of files, and a server often one of them."""

    MANIFEST = "manifest"
    """Whoever holds any of its files has it."""
    DELTA = "delta"
    """The files that lead to it from the version before."""
    FULL = "full"
    """The files of an anchor."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a claim was answered."""

    source: str | None
    """A server's URL, or `ORIGIN`; empty where the slots are taken; None where there is nobody to take."""
    holders: int = 0
    """Servers that hold the part, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Claims slots of sources for one server.

    Args:
        coordinator: Redis.
        claimant: URL of this server, under which others fetch from it.
        origin_slots: servers that fetch files from the store at once.
        peer_slots: servers that fetch files from one server at once.
    """

    coordinator: RedisCoordinator
    claimant: str
    origin_slots: int = 2
    peer_slots: int = 2
    _random: random.Random = field(default_factory=random.Random)

    async def claim(
        self, version: int, part: Part, *, without: Collection[str], peers: bool, origin: bool
    ) -> Answer:
        """A slot of some source for a part of a version.

        Args:
            version: wanted.
            part: wanted of it.
            without: URLs not to take; the last `MOST_WITHOUT` of them count.
            peers: whether servers may be taken.
            origin: whether the store may be taken, where no server holds the part.

        Raises:
            CoordinationError: Redis is away.
        """
        small = part is Part.MANIFEST
        slots = MANIFEST_SLOTS if small else self.peer_slots
        origin_slots = ORIGIN_MANIFEST_SLOTS if small else self.origin_slots
        source, holders = await self.coordinator.script(
            "claim_source",
            [self._slots(part, ""), *self._holders(version, part)],
            [
                self.claimant,
                int(CLAIM_S * 1000),
                slots if peers else 0,
                origin_slots if origin else 0,
                ORIGIN,
                self._random.randrange(1 << 30),
                TRIED,
                int(HOLDS_S * 1000),
                *list(without)[-MOST_WITHOUT:],
            ],
        )
        return Answer(None if source == "nobody" else str(source), int(holders))

    async def keep(self, version: int, part: Part, source: str) -> None:
        """Renew a claim. Raises CoordinationError when Redis is away."""
        await self._settle(version, part, source, claim_s=CLAIM_S)

    async def release(
        self, version: int, part: Part, source: str, *, holds: bool, absent: bool = False
    ) -> None:
        """Give a claim back.

        Args:
            version: that was fetched.
            part: of it.
            source: from whom.
            holds: whether this server has it now, for others.
            absent: whether the source turned out not to have it, although it had said so.

        Raises:
            CoordinationError: Redis is away.
        """
        gone = source if absent and source != ORIGIN else ""
        await self._settle(version, part, source, holds_s=HOLDS_S if holds else 0.0, gone=gone)

    async def advertise(
        self, holds: Collection[tuple[int, Part]], gone: Collection[tuple[int, Part]]
    ) -> None:
        """Say what this server holds for others, for the next `HOLDS_S`.

        Args:
            holds: versions and which files of them.
            gone: what it said before and holds no more.

        Raises:
            CoordinationError: Redis is away.
        """
        keys = [self.coordinator.keys.holders(*one) for one in (*holds, *gone)]
        if keys:
            args: list[str | int] = [self.claimant, int(HOLDS_S * 1000), len(holds)]
            await self.coordinator.script("advertise_files", keys, args)

    async def _settle(
        self,
        version: int,
        part: Part,
        source: str,
        *,
        claim_s: float = 0.0,
        holds_s: float = 0.0,
        gone: str = "",
    ) -> None:
        await self.coordinator.script(
            "settle_source",
            [self._slots(part, source), *self._holders(version, part)],
            [self.claimant, int(claim_s * 1000), int(holds_s * 1000), gone],
        )

    def _slots(self, part: Part, source: str) -> str:
        """Key of a source's slots; the small have their own."""
        return self.coordinator.keys.slots(f"{part}:{source}" if part is Part.MANIFEST else source)

    def _holders(self, version: int, part: Part) -> list[str]:
        """Keys of who has a part."""
        parts = (Part.DELTA, Part.FULL) if part is Part.MANIFEST else (part,)
        return [self.coordinator.keys.holders(version, one) for one in parts]
