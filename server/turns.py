"""Whose turn it is to fetch from whom: this server's one claim on a source, kept while its files come."""

import asyncio
import contextlib
import random
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from server.trouble import Trouble
from shared.errors import CoordinationError, WeightsError
from shared.sources import CLAIM_S, ORIGIN, Part, Sources

POLL_S = 0.05
"""First pause between two questions for a slot, seconds."""
POLL_SHARE = 0.25
"""Later ones are this share of the time waited so far: a wait of minutes may end some seconds late."""
LONGEST_POLL_S = 4.0
HOLDERS = 1000
"""With so many holders the longest pause is twice as long, with twice as many three times."""
MANIFEST_S = 10.0
"""Longest wait for a manifest's slot, seconds: it is small, and then asked of the store without."""

T = TypeVar("T")


def pause_s(waited_s: float, holders: int) -> float:
    """Seconds until a server that found no free slot asks again.

    >>> [pause_s(waited, 0) for waited in (0.0, 1.0, 10.0, 100.0)], pause_s(100.0, 5000)
    ([0.05, 0.25, 2.5, 4.0], 24.0)
    """
    longest = LONGEST_POLL_S * (1 + holders / HOLDERS)
    return min(longest, max(POLL_S, POLL_SHARE * waited_s))


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
        peers: whether servers are asked at all; where not, the store is asked without a claim.
        direct: whether the store is asked without a claim, and first.
        patience_s: longest wait for slots in all, seconds.
        trouble: knows whether Redis is away; then the store is asked without a claim.
    """

    sources: Sources
    peers: bool
    direct: bool
    patience_s: float
    trouble: Trouble = field(default_factory=Trouble)
    _claim: tuple[int, Part, str] | None = None
    _keeping: asyncio.Task[None] | None = None

    async def source(
        self, version: int, part: Part, *, without: Collection[str], peers: bool, origin: bool
    ) -> Source | None:
        """A source for a part of a version, whose slot came free; `release` gives it back.

        Args:
            version: wanted.
            part: wanted of it.
            without: URLs of servers not to take.
            peers: whether servers may be asked.
            origin: whether the store may be asked.

        Returns:
            None where nobody may be asked.

        Raises:
            WeightsError: all who may be asked are busy for too long.
        """
        await self.release(holds=False)
        unclaimed = Source(ORIGIN) if origin else None
        if not self.peers or (origin and self.direct):
            return unclaimed
        clock = asyncio.get_running_loop().time
        began = clock()
        while True:
            answer = await self._asked(
                self.sources.claim(version, part, without=without, peers=peers, origin=origin)
            )
            waited_s = clock() - began
            if answer is None:
                return unclaimed
            if answer.source is None:
                return None
            if answer.source:
                self.patience_s -= waited_s
                self._claim = (version, part, answer.source)
                self._keeping = asyncio.create_task(self._keep(*self._claim))
                return Source(answer.source)
            if unclaimed is not None and part is Part.MANIFEST and waited_s > MANIFEST_S:
                return unclaimed
            if waited_s > self.patience_s:
                # Never the store without a claim: a fleet that did so would send every copy over its uplink.
                raise WeightsError(
                    f"version {version}: no source had a slot free in {waited_s:.0f} s; others fetch it first"
                )
            await asyncio.sleep(pause_s(waited_s, answer.holders) * random.uniform(0.5, 1.0))

    async def release(self, *, holds: bool, absent: bool = False) -> None:
        """Give the claim back, if there is one.

        Args:
            holds: whether this server has that part of the version now, for others.
            absent: whether the source turned out not to have it.
        """
        claim, keeping = self._claim, self._keeping
        self._claim = self._keeping = None
        if keeping is not None:
            keeping.cancel()
        if claim is not None:  # where Redis is away it expires by itself
            await self._asked(self.sources.release(*claim, holds=holds, absent=absent))

    async def _asked(self, call: Coroutine[Any, Any, T]) -> T | None:
        """Redis' answer; None where it is away, or was a moment ago."""
        clock = asyncio.get_running_loop().time
        began = clock()
        if self.trouble.redis_is_away:
            call.close()
            return None
        try:
            return await call
        except CoordinationError:
            self.trouble.redis_failed(clock() - began)
            return None

    async def _keep(self, version: int, part: Part, source: str) -> None:
        """Renew a claim for ever."""
        while True:
            await asyncio.sleep(CLAIM_S / 3)
            with contextlib.suppress(CoordinationError):
                await self.sources.keep(version, part, source)
