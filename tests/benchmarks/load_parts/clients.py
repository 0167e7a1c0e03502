"""Clients that keep a server busy, each with one request at a time: good ones, and ones of every bad manner.

A request that is told to come back (429) does so when it was told, with jitter. Everything that a server under
load must never do - any other status, a broken connection, no answer in time - is a fault.
"""

import asyncio
import contextlib
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from tests.benchmarks.load_parts.checker import Answer
from tests.benchmarks.load_parts.mix import MEDIA, Body

ANSWER_S = 180.0
"""Longest wait for an answer, the server's own line included; a wait for longer is a fault."""
SMALL_BUFFER = 4096
"""Of a slow reader's socket, bytes: the server itself must hold what is not read."""
MOST_FAULTS = 50
"""When all clients give up."""
TRIES = 200
"""Most times that a request is sent because of 429."""


@dataclass(frozen=True, slots=True)
class Manners:
    """Shares of requests, the others being read at once to their end."""

    leave: float = 0.0
    """Closed at a random moment."""
    leave_inside: float = 0.0
    """Closed in the middle of the answer: of a stream, while its tree grows."""
    slow: float = 0.0
    """Read in small pieces with pauses."""
    twice: float = 0.0
    """Sent by two clients at once with one `request_id`."""


class _LeftError(Exception):
    """A client has left in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class Done:
    """A whole answer."""

    ended: float
    """On the clock of `time.perf_counter`."""
    seconds: float
    """From its first try."""
    body: bytes
    """Empty where bodies are not kept."""


@dataclass(slots=True)
class Seen:
    """What the clients saw; it only grows."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by status, those that were tried again included."""
    done: list[Done] = field(default_factory=list)
    """Whole answers."""
    left: int = 0
    """Requests given up at a random moment."""
    left_inside: int = 0
    """Given up in the middle of an answer."""
    read_slowly: int = 0
    twice: int = 0
    """Pairs that both got their answer."""
    gave_up: int = 0
    """Requests that were told to come back too often."""
    faults: list[str] = field(default_factory=list)
    typical_s: float = 1.0
    """Running mean of the time of a request."""


@dataclass(slots=True)
class Clients:
    """Clients of one server.

    Args:
        url: of the server.
        requests: bodies, without end.
        rng: draws everything.
        manners: of the clients.
        media: forms of answers that they ask for.
        keep: keep bodies in `Seen.done`.
        deliver: is given each whole answer; a client waits for it.
    """

    url: str
    requests: Iterator[Body]
    rng: random.Random
    manners: Manners = Manners()
    media: tuple[str, ...] = MEDIA
    keep: bool = False
    deliver: Callable[[Answer], Awaitable[None]] | None = None
    seen: Seen = field(default_factory=Seen)
    _numbers: Iterator[int] = field(default_factory=count)
    _until: float = 0.0

    async def run(self, clients: int, seconds: float, tail_s: float = 0.0) -> None:
        """So many clients at once, for so long; then all of them leave, whatever they wait for.

        Args:
            clients: at once.
            seconds: in which requests are sent.
            tail_s: longest wait for their answers after that.
        """
        self._until = time.perf_counter() + seconds
        timeout = httpx.Timeout(ANSWER_S)
        limits = httpx.Limits(max_connections=None)
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)]
        transport = httpx.AsyncHTTPTransport(socket_options=small, limits=limits)
        async with (
            httpx.AsyncClient(timeout=timeout, limits=limits) as quick,
            httpx.AsyncClient(timeout=timeout, transport=transport) as slow,
        ):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds + tail_s), asyncio.TaskGroup() as group:
                    for _ in range(clients):
                        group.create_task(self._client(quick, slow))

    async def _client(self, quick: httpx.AsyncClient, slow: httpx.AsyncClient) -> None:
        """One request after the other."""
        await asyncio.sleep(self.rng.random())  # they do not all come at once
        m = self.manners
        kinds = {
            self._leave: m.leave, self._leave_inside: m.leave_inside, self._slowly: m.slow, self._twice: m.twice,
        }  # fmt: skip
        ways, shares = [*kinds, self._ask], [*kinds.values(), 1 - sum(kinds.values())]
        while time.perf_counter() < self._until and len(self.seen.faults) < MOST_FAULTS:
            (way,) = self.rng.choices(ways, shares)
            await way(slow if way == self._slowly else quick, next(self.requests))

    async def _leave(self, client: httpx.AsyncClient, body: Body) -> None:
        """Close the connection at a random moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.uniform(0, 1.5 * self.seen.typical_s)):
                await self._ask(client, body)
                return  # it was quicker
        self.seen.left += 1

    async def _leave_inside(self, client: httpx.AsyncClient, body: Body) -> None:
        """Close the connection once some of the answer has come."""
        media = self.rng.choice([MEDIA[0], MEDIA[2], MEDIA[2]])
        try:
            await self._ask(client, body, media=media, pieces=self.rng.choice([1, 1, 2, 5, 20]))
        except _LeftError:
            self.seen.left_inside += 1

    async def _slowly(self, client: httpx.AsyncClient, body: Body) -> None:
        """Read the answer in small pieces, with pauses."""
        self.seen.read_slowly += await self._ask(client, body, slowly=True)

    async def _twice(self, client: httpx.AsyncClient, body: Body) -> None:
        """Two clients, one id."""
        body = body | {"request_id": f"twice-{next(self._numbers)}-{self.rng.random()}"}
        both = await asyncio.gather(self._ask(client, body), self._ask(client, body))
        self.seen.twice += all(both)

    async def _ask(
        self,
        client: httpx.AsyncClient,
        body: Body,
        *,
        media: str | None = None,
        slowly: bool = False,
        pieces: int | None = None,
    ) -> bool:
        """Send a request until it is answered; was it?

        Args:
            client: of the connection.
            body: of the request.
            media: form of the answer; None for any.
            slowly: read the answer in small pieces, with pauses.
            pieces: read so many and leave.

        Raises:
            _LeftError: left, as asked.
        """
        seen, began = self.seen, time.perf_counter()
        media = media or self.rng.choice(self.media)
        headers = {"accept": media, "accept-encoding": self.rng.choice(["identity", "zstd"])}
        for _ in range(TRIES):
            try:
                async with (
                    asyncio.timeout(ANSWER_S),
                    client.stream(
                        "POST", f"{self.url}/rollout_tree", json=body, headers=headers
                    ) as answer,
                ):
                    seen.statuses[str(answer.status_code)] += 1
                    good = answer.status_code == 200
                    content = (
                        await self._read(answer, slowly, pieces) if good else await answer.aread()
                    )
            except (httpx.HTTPError, TimeoutError) as error:
                # The caller's own deadline arrives as CancelledError, and goes through.
                took = time.perf_counter() - began
                seen.faults.append(f"no answer after {took:.1f} s: {error!r}")
                return False
            if good:
                await self._note(body, media, answer, content, began)
                return True
            after = answer.headers.get("retry-after")
            if answer.status_code != 429 or after is None:
                seen.faults.append(f"{answer.status_code}, Retry-After {after}: {content[:300]!r}")
                return False
            await asyncio.sleep(float(after) * (1 + self.rng.random() / 4))
            if time.perf_counter() > self._until:
                return False
        seen.gave_up += 1
        return False

    async def _read(self, answer: httpx.Response, slowly: bool, pieces: int | None) -> bytes:
        """The body, as it came."""
        size = 1 << self.rng.randint(10, 16)
        parts: list[bytes] = []
        async for part in answer.aiter_raw(size if slowly else None):
            parts.append(part)
            if len(parts) == pieces:
                raise _LeftError
            if slowly:  # a body of a megabyte takes some ten seconds
                await asyncio.sleep(len(part) / 100_000 * self.rng.uniform(0, 2) + 0.01)
        return b"".join(parts)

    async def _note(
        self,
        body: Body,
        media: str,
        answer: httpx.Response,
        content: bytes,
        began: float,
    ) -> None:
        """Keep an answer, and hand it over; `began` is when it was first asked for."""
        seen, ended = self.seen, time.perf_counter()
        seen.typical_s += 0.05 * (ended - began - seen.typical_s)
        seen.done.append(Done(ended, ended - began, content if self.keep else b""))
        if self.deliver is not None:
            encoding = answer.headers.get("content-encoding", "")
            found = Answer(next(self._numbers), body, media, encoding, content)
            await self.deliver(found)


def percentile(values: list[float], share: float) -> float:
    """A value that this share of all does not exceed; not-a-number where there is none."""
    ordered: list[Any] = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
