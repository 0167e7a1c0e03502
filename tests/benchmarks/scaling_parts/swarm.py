"""One version on its way to a fleet, event by event: who claims which source, and how bytes share its uplink.

The rules are those of `shared/lua/claim_source.lua` and of the fetcher: a source has a few slots; a server that
finds none free asks again a little later, and each time looks at a few sources at random; a version is handed on
only once it is whole and verified; a claim of a server that died expires; a server whose source died keeps its
bytes and goes to another. Time is simulated. One rule is not: the real store is given to nobody any more once a
server holds the version, so that fewer copies leave it than here, and the first rounds are a little slower.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

ORIGIN = -1
"""The trainer, or the store beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What lies between machines. Rates in bytes a second, times in seconds."""

    name: str
    origin_up: float
    up: float
    down: float
    rtt: float = 0.0
    loss: float = 0.0
    """Share of packets lost; it bounds a TCP connection (Mathis: 1.22 MSS / (rtt sqrt(loss)))."""
    connections: int = 4
    """Of one fetch."""
    slow: float = 0.0
    """Share of servers whose links have a tenth of the rates."""

    @property
    def most(self) -> float:
        """Most that one fetch gets of a path, whatever the rates at its ends."""
        if not self.loss:
            return math.inf
        return self.connections * 1.22 * 1460 / (self.rtt * math.sqrt(self.loss))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A fleet and what it fetches."""

    servers: int
    size: float
    """Bytes."""
    link: Link
    slots: int = 2
    """Fetches at once from one source."""
    holders: int = 0
    """Servers that hold the version from the start."""
    ready_s: float = 0.0
    """From the last byte until the version is verified and handed on."""
    ask_again_s: float = 0.5
    tried: int = 8
    """Sources that one question looks at (`shared.sources.TRIED`)."""
    claim_s: float = 15.0
    """After which the claim of a dead server is free again."""
    notice_s: float = 5.0
    """After which a server gives up a source that sends nothing."""
    failing: float = 0.0
    """Share of servers that die while they fetch, and again of those that die while they serve."""
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """Seconds and bytes of one simulated publish."""

    arrivals: list[float]
    """When each live server held the version, ascending."""
    origin_bytes: float
    lost: int
    """Servers that died before they held it."""

    def share(self, part: float) -> float:
        """When this part of the live servers held it.

        >>> Outcome([1.0, 2.0, 3.0, 4.0], 0.0, 0).share(0.5)
        2.0
        """
        return self.arrivals[max(0, math.ceil(part * len(self.arrivals)) - 1)]


@dataclass(slots=True)
class Fetch:
    server: int
    source: int
    left: float
    limit: float
    dies: bool
    rate: float = 0.0
    since: float = 0.0
    run: int = 0
    """Counts changes of the rate: a planned end of an earlier rate is void."""


@dataclass(slots=True)
class Source:
    up: float
    taken: int = 0
    fetches: list[Fetch] = field(default_factory=list)


class Swarm:
    """The state of one simulation; `run` is the way in."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.link = setup, setup.link
        self.random = random.Random(setup.seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.sources = {ORIGIN: Source(self.link.origin_up)}
        self.free = deque([ORIGIN])
        """Sources with a free slot; who has waited longest comes first."""
        self.waiting: list[tuple[int, float]] = []
        """(server, bytes that it lacks)"""
        self.asked = False
        self.arrivals: list[float] = []
        self.origin_bytes = 0.0
        self.lost = 0
        self.pace = [
            0.1 if self.random.random() < self.link.slow else 1.0 for _ in range(setup.servers)
        ]

    def at(self, delay: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, what))

    def run(self) -> Outcome:
        for server in range(self.setup.holders):
            self._holds(server)
        self.arrivals.clear()
        self.waiting = [(s, self.setup.size) for s in range(self.setup.holders, self.setup.servers)]
        self.random.shuffle(self.waiting)
        while self.free and self.waiting:
            self._claim()  # all were woken by the event and ask at once
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()
        return Outcome(sorted(self.arrivals), self.origin_bytes, self.lost)

    def _ask(self) -> None:
        """Let the next server ask whose turn comes: the waiting ones ask at random phases."""
        if self.asked or not self.free or not self.waiting:
            return
        self.asked = True
        first = 1.0 - self.random.random() ** (1.0 / len(self.waiting))
        self.at(self.setup.ask_again_s * first, self._answer)

    def _answer(self) -> None:
        self.asked = False
        busy = 1.0 - len(self.free) / len(self.sources)
        if self.free and self.waiting and self.random.random() >= busy**self.setup.tried:
            self._claim()
        self._ask()

    def _claim(self) -> None:
        server, left = self.waiting.pop(self.random.randrange(len(self.waiting)))
        name = self.free[0]
        source = self.sources[name]
        source.taken += 1
        if source.taken >= self.setup.slots:
            self.free.popleft()
        else:
            self.free.rotate(-1)  # the others first
        dies = self.random.random() < self.setup.failing
        limit = min(self.link.down * self.pace[server], self.link.most)
        fetch = Fetch(server, name, left * (self.random.random() if dies else 1.0), limit, dies)
        self.at(4 * self.link.rtt, lambda: self._start(fetch))  # claim, TCP, TLS, request

    def _start(self, fetch: Fetch) -> None:
        source = self.sources.get(fetch.source)
        if source is None:  # died meanwhile
            self._wait(fetch.server, fetch.left)
            return
        source.fetches.append(fetch)
        fetch.since = self.now
        self._share(source)

    def _share(self, source: Source) -> None:
        """Share the uplink: who can take less than an equal part leaves the rest to the others."""
        spare, open_ = source.up, len(source.fetches)
        for fetch in sorted(source.fetches, key=lambda f: f.limit):
            fetch.left -= fetch.rate * (self.now - fetch.since)
            fetch.since = self.now
            fetch.rate = min(fetch.limit, spare / open_)
            spare, open_ = spare - fetch.rate, open_ - 1
            fetch.run += 1
            self.at(
                max(0.0, fetch.left) / fetch.rate, lambda f=fetch, run=fetch.run: self._end(f, run)
            )

    def _end(self, fetch: Fetch, run: int) -> None:
        source = self.sources.get(fetch.source)
        if run != fetch.run or source is None:
            return
        source.fetches.remove(fetch)
        self._share(source)
        if fetch.source == ORIGIN:
            self.origin_bytes += self.setup.size
        if fetch.dies:
            self.lost += 1
            self.at(self.setup.claim_s, lambda: self._release(fetch.source))
            return
        self._release(fetch.source)
        self.at(self.setup.ready_s, lambda: self._holds(fetch.server))

    def _release(self, name: int) -> None:
        if (source := self.sources.get(name)) is not None:
            if source.taken == self.setup.slots:
                self.free.append(name)
            source.taken -= 1
            self._ask()

    def _holds(self, server: int) -> None:
        self.arrivals.append(self.now)
        self.sources[server] = Source(self.link.up * self.pace[server])
        self.free.append(server)
        if self.random.random() < self.setup.failing:
            busy = self.setup.slots * self.setup.size / self.sources[server].up
            self.at(self.random.random() * busy, lambda: self._dies(server))
        self._ask()

    def _dies(self, server: int) -> None:
        """Its fetches notice after a while, keep what they have, and ask again."""
        source = self.sources.pop(server)
        if server in self.free:
            self.free.remove(server)
        for fetch in source.fetches:
            left = max(0.0, fetch.left - fetch.rate * (self.now - fetch.since))
            fetch.run += 1
            self.at(self.setup.notice_s, lambda s=fetch.server, b=left: self._wait(s, b))

    def _wait(self, server: int, left: float) -> None:
        self.waiting.append((server, left))
        self._ask()


def simulate(setup: Setup) -> Outcome:
    """Publish one version once."""
    return Swarm(setup).run()
