"""The client: trees from one server or many, tried again elsewhere by the same id until the bound."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Iterable
from itertools import islice
from typing import Any, Self

import httpx
from pydantic import TypeAdapter, ValidationError

from shared.errors import FleetError, RequestError
from shared.wire import RolloutTreeRequest, RolloutTreeResponse
from trainer.client.attempt import ask, get
from trainer.client.connection import checked_urls, open_http
from trainer.client.identity import question_key, repeatable
from trainer.client.listing import REFRESH_S, Listing
from trainer.client.reading import CallbackError, Listener, OnNode
from trainer.client.resume import Kept, refuses_nodes
from trainer.client.retries import Failure, failure, problem
from trainer.client.routing import ListServers, Router, Target, Trail, fixed

JITTER_S = 0.05
JITTER = 0.25
"""Share of a wait that is added at random, so that requests refused together do not return together."""
_OBJECT = TypeAdapter(dict[str, Any])


class AsyncClient:
    """Sends tree requests to rollout servers: retried, spread over the servers, moved to another when one fails.

    Args:
        servers: URL or URLs of servers, or a callable that lists those that are alive.
        token: bearer token; None takes the environment variable SPOKE_TOKEN, where it is set.
        timeout_s: bound of one tree, all attempts together.
        concurrency: most trees in flight; further ones wait here, outside the bound.
        affinity_slack: trees that a question's own server may have more than the least loaded one before the
            question goes elsewhere. 0 is plain least-loaded.
        reproducible: give a request that has no seed one made of its id, so that servers with equal weights sample
            the same tree. vLLM samples slower with seeds.
        keep_nodes: take trees node by node, so that a tree which moves to another server takes along what has
            finished; see `RolloutTreeRequest.takes_given`. With `on_node` this is so anyway.

    Raises (on construction):
        ConfigError: a URL or the token cannot be used.
    """

    def __init__(
        self,
        servers: str | Iterable[str] | ListServers,
        *,
        token: str | None = None,
        timeout_s: float = 600.0,
        concurrency: int = 64,
        affinity_slack: int = 2,
        reproducible: bool = False,
        keep_nodes: bool = False,
    ) -> None:
        self._list = servers if callable(servers) else fixed(*checked_urls(servers))
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._router = Router(slack=affinity_slack)
        self._listing = Listing(self._list, self._router)
        self._random = random.Random()
        self._reproducible = reproducible
        self._keep_nodes = keep_nodes
        self._freed = asyncio.Event()
        self._http = open_http(token, concurrency)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._listing.close()
        await self._http.aclose()

    async def rollout_tree(
        self, request: RolloutTreeRequest, *, on_node: OnNode | None = None
    ) -> RolloutTreeResponse:
        """One tree.

        A request without an id gets one, so that an attempt after a broken connection finds the tree of the one
        before it where that server still has it.

        Args:
            request: what is asked.
            on_node: called with each node as it finishes, in no order; again from the first where the tree moved
                to another server or was begun anew: the returned tree has the nodes told last of those with one
                key. A server that does not stream gives them all at the end.

        Raises:
            RequestError: the request itself is refused, or its tree is too large to take; it names the field and
                the remedy.
            ConfigError: a server does not take the token.
            FleetError: no server gave the tree within the bound; it names the last reason.
            Exception: whatever `on_node` raises.
        """
        request = repeatable(request, seeded=self._reproducible)
        keeps = request.takes_given and (self._keep_nodes or on_node is not None)
        listener = Listener(on_node=on_node, kept=Kept() if keeps else None)
        key, trail = question_key(request), Trail()
        async with self._slots:
            deadline = _now() + self._timeout_s
            reason = "no live server is ready"  # until there is another
            while _now() < deadline:
                await self._listing.refresh(deadline)
                choice = self._router.choose(
                    key, version=request.min_weight_version, now=_now(), trail=trail
                )
                if not isinstance(choice, Target):
                    await self._pause(choice, deadline)
                    continue
                with self._router.sending(choice.url):
                    answer = await self._attempt(choice.url, request, deadline, listener)
                self._freed.set()  # whoever waits for room looks again
                self._freed = asyncio.Event()
                if isinstance(answer, RolloutTreeResponse):
                    self._router.answered(choice.url)
                    return answer
                if isinstance(answer, CallbackError):
                    raise answer.error
                reason = f"{choice.url}: {answer.reason}"
                self._note(choice.url, answer, trail)
        reason = f"{reason}; {self._listing.away}" if self._listing.away else reason
        raise FleetError(f"no tree within {self._timeout_s:g} s; the last reason: {reason}")

    async def rollout_trees(
        self, requests: Iterable[RolloutTreeRequest], *, concurrency: int = 64
    ) -> AsyncGenerator[tuple[int, RolloutTreeResponse | RequestError], None]:
        """Many trees, each as it comes, with its request's place; a refused request loses no other.

        Args:
            requests: taken one by one as they can be sent.
            concurrency: most of them in flight.

        Raises:
            ConfigError, FleetError: see `rollout_tree`; the first ends all the others.
        """
        waiting = enumerate(requests)
        running: dict[asyncio.Task[RolloutTreeResponse | RequestError], int] = {}
        try:
            while True:
                for place, request in islice(waiting, concurrency - len(running)):
                    running[asyncio.create_task(self._tree_or_refusal(request))] = place
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    place = running.pop(task)
                    yield place, task.result()
        finally:
            for task in running:
                task.cancel()
            # Shielded: a second cancellation would reach them while they close their connections.
            ends: asyncio.Future[Any] = asyncio.gather(*running, return_exceptions=True)
            await asyncio.shield(ends)

    async def info(self, url: str | None = None) -> dict[str, Any]:
        """What a server says of itself: model, engine, limits, weight version.

        Args:
            url: of the server; None is the first that answers.

        Raises:
            ConfigError: a server does not take the token.
            FleetError: no server answers.
        """
        reason = "no live server is ready"
        for where in await self._urls() if url is None else [url.rstrip("/")]:
            answer = await get(self._http, where, "/info")
            if isinstance(answer, httpx.Response) and answer.is_success:
                try:
                    return _OBJECT.validate_json(answer.content)
                except ValidationError:
                    answer = Failure(reason="its answer is no JSON object")
            if isinstance(answer, httpx.Response):
                found = problem(answer.status_code, answer.content)
                answer = failure(where, found, answer.headers, time.time())
            reason = f"{where}: {answer.reason}"
        raise FleetError(f"no server tells about itself; the last reason: {reason}")

    async def ready(self) -> list[str]:
        """URLs of the servers that would take a request now."""
        urls = await self._urls()
        answers = await asyncio.gather(*(get(self._http, url, "/readyz") for url in urls))
        return [
            url
            for url, answer in zip(urls, answers, strict=True)
            if isinstance(answer, httpx.Response) and answer.is_success
        ]

    async def _tree_or_refusal(
        self, request: RolloutTreeRequest
    ) -> RolloutTreeResponse | RequestError:
        try:
            return await self.rollout_tree(request)
        except RequestError as error:
            return error

    async def _urls(self) -> list[str]:
        return [target.url for target in await self._list()]

    async def _pause(self, wait_s: float | None, deadline: float) -> None:
        """Until a server may be asked, or one of our trees has ended, or the list may be another."""
        wait_s = REFRESH_S if wait_s is None else min(wait_s, REFRESH_S)
        wait_s += self._random.uniform(0, JITTER_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(wait_s, deadline - _now()))):
                await self._freed.wait()

    def _note(self, url: str, failed: Failure, trail: Trail) -> None:
        """Leave the server alone for a while: this request, and where the failure is the server's, all others."""
        now = _now()
        own = trail.backoffs[url]
        wait, wait_of_all = own.failed(now, failed.retry_after_s), 0.0
        if failed.whole_server:
            wait_of_all = self._router.failed(url, now, failed.retry_after_s)
            if failed.retry_after_s is None:
                self._listing.expire()  # it may be dead: ask who lives
        elif failed.full:
            wait_of_all = self._router.full(url, now, failed.retry_after_s)
        # A jitter after all others may ask again: those that failed together do not return together.
        own.until = now + max(wait, wait_of_all) * (1 + self._random.uniform(0, JITTER))

    async def _attempt(
        self, url: str, request: RolloutTreeRequest, deadline: float, listener: Listener
    ) -> RolloutTreeResponse | Failure | CallbackError:
        """One attempt at one server, with the nodes of those before it."""
        kept = listener.kept
        asked = kept.request(request) if kept else request
        body = asked.model_dump_json(exclude_none=True).encode()
        try:
            return await ask(self._http, url, body, deadline, listener)
        except RequestError as error:
            if not kept or asked is request or not refuses_nodes(error):
                raise
            kept.forget()
            return Failure(reason=str(error))


def _now() -> float:
    return asyncio.get_running_loop().time()
