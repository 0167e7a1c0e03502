"""Which server gets a tree: the least loaded, and of those the one that knows the question's prefix.

Pure: time is passed in, nothing is sent. Every question has an order of the servers of its own (rendezvous
hashing): a server that comes or goes moves the questions of that server alone. The first in that order gets the
tree, unless its load is too far above the least, or it must be left alone for a while.
"""

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 15.0
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
    """In a row, none of them with a Retry-After."""

    def failed(self, now: float, retry_after_s: float | None) -> float:
        """Note a failure; seconds to leave it alone: as it says, else doubling from one to the next.

        Requests that fail together on a server that dies are one failure.

        >>> backoff = Backoff()
        >>> [backoff.failed(now, None) for now in (0.0, 0.1, 0.5, 1.0)], backoff.failed(2.0, 5.0)
        ([0.2, 0.2, 0.4, 0.8], 5.0)
        """
        wait = retry_after_s
        if wait is None:
            self.failures += now >= self.until
            wait = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(max(0, self.failures - 1), 16))
        self.until = max(self.until, now + wait)
        return wait


@dataclass(slots=True, kw_only=True)
class _Server:
    target: Target
    in_flight: int = 0
    peaks: tuple[int, int] = (0, 0)
    """Most of our trees in flight since the list before the last, and since the last."""
    others: int = 0
    """Trees of other clients, as far as can be known."""
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def load(self) -> int:
        return self.in_flight + self.others

    def listed(self, target: Target) -> None:
        """What it says of its load is a moment old: it may still count trees of ours that have ended since."""
        self.target = target
        self.others = max(0, target.load - max(self.peaks))
        self.peaks = (self.peaks[1], self.in_flight)


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
            A server; or seconds until one may be asked; or None where there is no server.
        """
        servers = [self._servers[url] for url in self._listed]
        fresh = [server for server in servers if server.target.version >= version] or servers
        until = {
            server.target.url: max(server.backoff.until, trail.backoffs[server.target.url].until)
            for server in fresh
        }
        ready = [server for server in fresh if until[server.target.url] <= now]
        if not ready:
            return min(until.values()) - now if until else None
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
        server.peaks = (server.peaks[0], max(server.peaks[1], server.in_flight))
        try:
            yield
        finally:
            server.in_flight -= 1

    def failed(self, url: str, now: float, retry_after_s: float | None) -> float:
        """A server failed or refused, for whatever request; seconds that all of ours leave it alone."""
        return self._servers[url].backoff.failed(now, retry_after_s)

    def answered(self, url: str) -> None:
        """A server gave a tree: its failures are over."""
        self._servers[url].backoff.failures = 0
