"""The fleet, as the trainer sees it: who is alive, who is least loaded, who holds which version.

One tree is one request. A request is retried by its id on another server, so that a server that dies costs time
and no tree; what a retry cannot mend (a malformed request) is raised at once.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
from pydantic import ValidationError

from shared.coordination import Coordinator
from shared.errors import FleetError
from shared.fleet import Head, ServerRecord
from shared.wire import Problem, RolloutTreeRequest, RolloutTreeResponse

REFRESH_S = 0.5
"""How long a list of live servers is used before it is asked for again, seconds."""
POLL_S = 0.02
RETRY_S = 0.2
CONNECT_S = 5.0
_RETRIED = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that may be asked."""

    url: str
    version: int = 0
    load: int = 0
    """Trees that it says it is sampling, for others too."""


ListServers = Callable[[], Awaitable[list[Target]]]


def fixed(*urls: str) -> ListServers:
    """A list of servers that never changes, for use without Redis."""
    targets = [Target(url=url.rstrip("/")) for url in urls]

    async def servers() -> list[Target]:
        return targets

    return servers


def registered(coordinator: Coordinator) -> ListServers:
    """The live servers of a run that may serve, from Redis."""

    async def servers() -> list[Target]:
        records = await coordinator.servers()
        return [
            Target(url=r.url, version=r.version, load=r.in_flight)
            for r in records
            if r.state.serves
        ]

    return servers


class Fleet:
    """Sends tree requests to whichever live server has least to do.

    Args:
        list_servers: the live servers.
        concurrency: most trees in flight.
        timeout_s: bound of one tree, all attempts together.
    """

    def __init__(
        self, list_servers: ListServers, *, concurrency: int = 64, timeout_s: float = 600.0
    ) -> None:
        self._list = list_servers
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._in_flight: Counter[str] = Counter()
        self._known: tuple[float, list[Target]] = (float("-inf"), [])
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def rollout_tree(self, request: RolloutTreeRequest) -> RolloutTreeResponse:
        """One tree from whichever server has least to do, tried again elsewhere until the bound.

        Raises:
            RequestError: the request itself is refused.
            FleetError: no server gave the tree within the bound.
        """
        async with self._slots:
            deadline = time.monotonic() + self._timeout_s
            tried: Counter[str] = Counter()
            problem = "no live server is ready"
            while time.monotonic() < deadline:
                target = await self._choose(request.min_weight_version, tried)
                if target is None:
                    await asyncio.sleep(RETRY_S)
                    continue
                answer, wait_s = await self._ask(target, request, deadline)
                if isinstance(answer, RolloutTreeResponse):
                    return answer
                problem = f"{target.url}: {answer}"
                tried[target.url] += 1
                await asyncio.sleep(min(wait_s, max(0.0, deadline - time.monotonic())))
            raise FleetError(f"no tree within {self._timeout_s:.0f} s; the last reason: {problem}")

    async def _choose(self, version: int, tried: Counter[str]) -> Target | None:
        since, targets = self._known
        if time.monotonic() - since > REFRESH_S or not targets:
            targets = await self._list()
            self._known = (time.monotonic(), targets)
        fresh = [t for t in targets if t.version >= version] or targets
        key = lambda t: (tried[t.url], self._in_flight[t.url], t.load)  # noqa: E731  # one use, named for the line below
        return min(fresh, key=key, default=None)

    async def _ask(
        self, target: Target, request: RolloutTreeRequest, deadline: float
    ) -> tuple[RolloutTreeResponse | str, float]:
        """(the tree, or why there is none; seconds to wait before the next attempt)."""
        self._in_flight[target.url] += 1
        try:
            answer = await self._client.post(
                f"{target.url}/rollout_tree",
                content=request.model_dump_json(exclude_none=True),
                headers={"Content-Type": "application/json"},
                timeout=httpx.Timeout(max(0.1, deadline - time.monotonic()), connect=CONNECT_S),
            )
        except httpx.TransportError as error:
            self._known = (float("-inf"), [])  # it may be dead: ask who lives
            return f"{type(error).__name__}: {error}", RETRY_S
        finally:
            self._in_flight[target.url] -= 1
        if answer.status_code == httpx.codes.OK:
            return RolloutTreeResponse.model_validate_json(answer.content), 0.0
        return self._refusal(answer)

    def _refusal(self, answer: httpx.Response) -> tuple[str, float]:
        """Why a server refused, where another attempt may mend it.

        Raises:
            RequestError: where none can.
        """
        try:
            problem = Problem.model_validate_json(answer.content)
        except ValidationError:
            problem = Problem(title="", status=answer.status_code, detail=answer.text[:200])
        stale = problem.status == httpx.codes.CONFLICT and problem.field == "min_weight_version"
        if answer.status_code in _RETRIED or stale:
            return problem.detail, float(answer.headers.get("Retry-After", RETRY_S))
        raise problem.as_error()


async def wait_for_servers(
    coordinator: Coordinator, count: int, timeout_s: float
) -> list[ServerRecord]:
    """The live servers that may serve, once there are `count`.

    Raises:
        FleetError: too few within the bound.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        records = [r for r in await coordinator.servers() if r.state.serves]
        if len(records) >= count:
            return records
        if time.monotonic() > deadline:
            raise FleetError(
                f"{len(records)} of {count} servers are ready after {timeout_s:.0f} s; start "
                "`python -m server --redis-url … --run …` with the same run, or lower fleet.min_servers"
            )
        await asyncio.sleep(0.1)


async def wait_for_head(
    coordinator: Coordinator, head: Head, *, min_servers: int, timeout_s: float
) -> list[ServerRecord]:
    """Wait until every live server holds the head; a server that dies is waited for no longer.

    Returns:
        Records of the servers that hold it. After the bound, servers that still lag are left behind when at
        least `min_servers` hold the head.

    Raises:
        FleetError: fewer than `min_servers` hold it within the bound; it names what the others say.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        records = await coordinator.servers()
        holders = [r for r in records if r.state.serves and head.held_by(r)]
        late = time.monotonic() > deadline
        if len(holders) >= min_servers and (late or len(holders) == len(records)):
            return holders
        if late:
            others = [
                f"{r.server_id}: {r.last_error or r.state}" for r in records if r not in holders
            ]
            raise FleetError(
                f"version {head.version}: {len(holders)} of at least {min_servers} servers hold it after "
                f"{timeout_s:.0f} s; " + ("; ".join(others) or "no other server is alive")
            )
        await asyncio.sleep(POLL_S)
