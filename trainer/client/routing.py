"""Which server gets a tree: the least loaded, and of those the one that knows the question's prefix.

Pure: time is passed in, nothing is sent. Every question has an order of the servers of its own (rendezvous
hashing): a server that comes or goes moves the questions of that server alone. The first in that order gets the
tree, unless its load is too far above the least, or it must be left alone for a while.
"""

import contextlib
import hashlib
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 15.0
MAX_WAIT_S = 60.0
"""Most that a server is left alone, whatever its Retry-After: a wrong one would lock it out for good."""
LEAST_WORD_S = 1.0
"""Least Retry-After that is taken at its word: less would be asking without a pause."""
NEVER = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that may be asked."""

    url: str
    version: int = 0
    """Weight version that it holds."""
    load: int = 0
    """Trees that it says it is sampling, ours and others'."""


ListServers = Callable[[], Awaitable[list[Target]]]
"""The servers that may be asked now; called again whenever what it said has become old."""


def fixed(*urls: str) -> ListServers:
    """A list of servers that never changes, for use without Redis."""
    targets = [Target(url=url.rstrip("/")) for url in urls]

    async def servers() -> list[Target]:
        return targets

    return servers


def affinity(key: bytes, url: str) -> bytes:
    """Score of a server for a question; the highest comes first in the question's own order."""
    return hashlib.blake2b(url.encode(), key=key, digest_size=8).digest()


@dataclass(slots=True)
class Backoff:
    """How long a server is left alone."""

    until: float = NEVER
    failures: int = 0
    """In a row."""

    def failed(self, now: float, retry_after_s: float | None) -> float:
        """Note a failure; seconds to leave it alone: what it says, or doubling from one failure to the next.

        What it says is bounded both ways: less than a second is no word to go by. Requests that fail together on
        a server that dies are one failure.

        >>> backoff = Backoff()
        >>> [backoff.failed(now, None) for now in (0.0, 0.1, 0.5, 1.0)]
        [0.2, 0.2, 0.4, 0.8]
        >>> [backoff.failed(now, says) for now, says in ((2.0, 0.0), (4.0, 5.0), (9.0, 86400.0))]
        [1.6, 5.0, 60.0]
        >>> backoff.failed(99.0, 1.0)
        1.0
        """
        self.failures += now >= self.until
        own: float = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(max(0, self.failures - 1), 16))
        says = retry_after_s or 0.0
        wait = min(MAX_WAIT_S, says) if says >= LEAST_WORD_S else max(own, says)
        self.until = max(self.until, now + wait)
        return wait


@dataclass(slots=True, kw_only=True)
class _Server:
    target: Target
    in_flight: int = 0
    most: int = 0
    """Most of our trees in flight at once since the last list."""
    most_before: int = 0
    """The same, between the list before the last and the last."""
    others: int = 0
    """Trees of other clients, as far as can be known."""
    backoff: Backoff = field(default_factory=Backoff)
    room: float = math.inf
    """Trees of ours that it takes at once, as far as is known: set by a refusal, slowly raised by answers."""

    @property
    def load(self) -> int:
        return self.in_flight + self.others

    @property
    def full(self) -> bool:
        return self.in_flight + 1 > self.room

    def listed(self, target: Target) -> None:
        """Take what a new list says of it, and what of its load is not ours.

        The load that it says is a moment old, so as many of ours are taken off as it may have had at that moment:
        the most since the list before the last. `others` is rather too low than made of our own ended trees.
        """
        self.target = target
        self.others = max(0, target.load - max(self.most_before, self.most))
        self.most_before, self.most = self.most, self.in_flight


class Trail:
    """Where one request failed, and when it may be tried there again."""

    def __init__(self) -> None:
        self.backoffs: defaultdict[str, Backoff] = defaultdict(Backoff)


class Router:
    """What one client knows of its servers.

    Args:
        slack: a question's own server is kept while its load is at most this many trees above the least.
    """

    def __init__(self, *, slack: int = 0) -> None:
        self._slack = slack
        self._servers: dict[str, _Server] = {}
        self._listed: list[str] = []

    def update(self, targets: Iterable[Target]) -> None:
        """The servers that may be asked from now on; what is known of those that vanish and return is kept."""
        self._listed = []
        for target in targets:
            self._listed.append(target.url)
            self._servers.setdefault(target.url, _Server(target=target)).listed(target)

    def choose(
        self, key: bytes, *, version: int, now: float, trail: Trail
    ) -> Target | float | None:
        """Where to send a tree.

        Args:
            key: of the question.
            version: lowest weight version that may sample; servers that are not known to hold it are asked only
                where none is.
            now: seconds, of any clock that only grows.
            trail: where this request failed before.

        Returns:
            A server; or seconds until one may be asked; or None where that takes another list, or the end
            of one of our trees.
        """
        servers = [self._servers[url] for url in self._listed]
        fresh = [server for server in servers if server.target.version >= version] or servers
        until = {
            server.target.url: max(server.backoff.until, trail.backoffs[server.target.url].until)
            for server in fresh
        }
        rested = [server for server in fresh if until[server.target.url] <= now]
        ready = [server for server in rested if not server.full]
        if not ready:
            return min(until.values()) - now if until and not rested else None
        bound = min(server.load for server in ready) + self._slack
        near = [server.target for server in ready if server.load <= bound]
        return max(near, key=lambda target: affinity(key, target.url))

    @property
    def any(self) -> bool:
        """Is there a server at all?"""
        return bool(self._listed)

    @contextlib.contextmanager
    def sending(self, url: str) -> Iterator[None]:
        """While a tree of ours is at a server."""
        server = self._servers[url]
        server.in_flight += 1
        server.most = max(server.most, server.in_flight)
        try:
            yield
        finally:
            server.in_flight -= 1

    def failed(self, url: str, now: float, retry_after_s: float | None) -> float:
        """A server failed or refused, for whatever request; seconds that all of ours leave it alone."""
        return self._servers[url].backoff.failed(now, retry_after_s)

    def full(self, url: str, now: float, retry_after_s: float | None) -> float:
        """A server has no room for one more tree; seconds that all of ours leave it alone.

        It gets no more at once than those of ours that it has, so that the end of one is the moment to send
        another: a wait as long as it says would leave it idle. Where it has none of ours, that is all we can do.
        """
        server = self._servers[url]
        if not server.in_flight:
            return self.failed(url, now, retry_after_s)
        server.room = server.in_flight
        return 0.0

    def answered(self, url: str) -> None:
        """A server gave a tree: its failures are over; room is tried for one more after each round of trees."""
        server = self._servers[url]
        server.backoff.failures = 0
        server.room += 1 / server.room  # one more after as many answers as it has room for
