"""Whose turn it is to fetch from whom: this server's one claim on a source, kept while its files come."""

import asyncio
import contextlib
import random
from collections.abc import Collection
from dataclasses import dataclass

from shared.errors import CoordinationError
from shared.fleet import ServerRecord
from shared.sources import CLAIM_S, ORIGIN, Sources

PACE = 4 << 20
"""Bytes a second at which those before us are expected to come along."""
POLL_S = 0.05
"""First pause between two questions for a slot, seconds; each is half as long again as the one before."""
LONGEST_POLL_S = 1.0
MOST_BAD = 3
"""Servers that may fail for one version before the store alone is asked for it."""
RECORDS_S = 5.0
"""How long the fleet table's word on who holds a version is used, seconds."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who is to be asked."""

    url: str
    """Of a server; `ORIGIN` for the store."""

    @property
    def is_store(self) -> bool:
        """Is it the store?"""
        return self.url == ORIGIN


@dataclass(slots=True, kw_only=True)
class Turns:
    """At most one claim at a time: nobody waits for a slot while it has one, so that no two wait for each other.

    Args:
        sources: in Redis.
        peers: whether servers are asked at all.
        direct: whether the store is asked without a claim, and first.
        patience_s: longest wait for a slot, seconds, besides `PACE` for the bytes.
    """

    sources: Sources
    peers: bool
    direct: bool
    patience_s: float
    _claim: tuple[int, str] | None = None
    _impatient: int | None = None
    """Version for which the wait was too long once: there is no second one."""
    _keeping: asyncio.Task[None] | None = None
    _records: tuple[float, list[ServerRecord]] | None = None

    async def source(
        self, version: int, size: int, *, without: Collection[str], origin: bool
    ) -> Source | None:
        """A source for a version: the one that is claimed already, or one whose slot came free.

        Args:
            version: wanted.
            size: bytes wanted of it; 0 for its manifest.
            without: URLs of servers not to take.
            origin: whether the store may be asked.

        Returns:
            None where nobody may be asked, or all who may are busy for too long.
        """
        if self._claim is not None and self._claim[0] == version:
            return Source(self._claim[1])
        await self.release(holds=False)
        alone = not self.peers or len(without) >= MOST_BAD or self._impatient == version
        if alone or (origin and self.direct):
            return Source(ORIGIN) if origin else None
        clock = asyncio.get_running_loop().time
        until = clock() + self.patience_s + size / PACE
        pause_s = POLL_S
        while True:
            try:
                holders = await self._holders_of(version)
                claimed = await self.sources.claim(
                    version, holders=holders, without=without, origin=origin
                )
            except CoordinationError:
                return Source(ORIGIN) if origin else None
            if claimed:
                self._claim = (version, claimed)
                self._keeping = asyncio.create_task(self._keep(version, claimed))
                return Source(claimed)
            if claimed is None or clock() > until:
                self._impatient = version if claimed is not None else None
                return Source(ORIGIN) if origin else None
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(LONGEST_POLL_S, pause_s * 1.5)

    async def release(self, *, holds: bool) -> None:
        """Give the claim back, if there is one.

        Args:
            holds: whether this server has the version now, for others.
        """
        claim, keeping = self._claim, self._keeping
        self._claim = self._keeping = None
        if keeping is not None:
            keeping.cancel()
        if claim is not None:
            with contextlib.suppress(CoordinationError):  # it expires by itself
                await self.sources.release(*claim, holds=holds)

    async def _keep(self, version: int, source: str) -> None:
        """Renew a claim for ever."""
        while True:
            await asyncio.sleep(CLAIM_S / 3)
            with contextlib.suppress(CoordinationError):
                await self.sources.keep(version, source)

    async def _holders_of(self, version: int) -> list[str]:
        """Servers whose records say that they hold a version; records are read now and then, not at every poll."""
        now = asyncio.get_running_loop().time()
        if self._records is None or now - self._records[0] > RECORDS_S:
            self._records = (now, await self.sources.coordinator.servers())
        return [record.url for record in self._records[1] if version in record.serves_files]
