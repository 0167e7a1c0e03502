"""What failed a moment ago and is left alone for a while: other servers, and Redis."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_S = 30.0
"""How long a server is left alone after its first failure, seconds; doubled with each one that follows."""
LONGEST_S = 600.0
MOST = 16
"""Servers that are remembered; who failed longest ago is forgotten first."""
IN_A_ROW = 8
"""After so many failures of any servers, and no success, this one is taken to reach none of them."""
AWAY_FACTOR = 6.0
"""A call to Redis that failed after a time is not followed by another for so many times as long: one that is
refused at once costs nothing, one that hangs for its whole bound (5 s) gives 30 s of peace."""


@dataclass(slots=True)
class Trouble:
    """Remembers failures, across versions.

    Args:
        clock: seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _servers: dict[str, tuple[float, int]] = field(default_factory=dict)
    """URL: until when it is left alone, and how often it failed in a row."""
    _in_a_row: int = 0
    _alone_until: float = 0.0
    _redis_until: float = 0.0

    def failed(self, url: str) -> None:
        """A server failed."""
        _, times = self._servers.pop(url, (0.0, 0))
        pause_s = min(LONGEST_S, FIRST_S * 2.0 ** min(times, 10))
        self._servers[url] = (self.clock() + pause_s, times + 1)
        if len(self._servers) > MOST:
            del self._servers[next(iter(self._servers))]
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            self._alone_until = self.clock() + LONGEST_S

    def worked(self, url: str) -> None:
        """A server gave what it was asked for."""
        self._servers.pop(url, None)
        self._in_a_row, self._alone_until = 0, 0.0

    @property
    def servers(self) -> list[str]:
        """URLs of servers that are left alone now."""
        now = self.clock()
        return [url for url, (until, _) in self._servers.items() if now < until]

    @property
    def reaches_nobody(self) -> bool:
        """Are all servers left alone?"""
        return self.clock() < self._alone_until

    def redis_failed(self, after_s: float) -> None:
        """A call to Redis failed after so many seconds."""
        self._redis_until = self.clock() + AWAY_FACTOR * after_s

    @property
    def redis_is_away(self) -> bool:
        """Is Redis left alone?"""
        return self.clock() < self._redis_until
