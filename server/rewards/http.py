"""Rewards by a server of the user's own: leaves out in batches, numbers back. docs/rewards.md has the protocol.

Whatever that server does costs the leaves of one batch, and is said in their `reward_error`.
"""

import asyncio
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.rewards.base import Grade, Stats, failed
from server.rewards.http_answers import (
    Answers,
    BatchError,
    LostError,
    PassingError,
    RejectedError,
    token_of,
)
from server.rewards.http_connections import Connections
from server.rewards.limits import HttpLimits
from shared.errors import RequestError

CONNECT_S = 5.0
"""How long connecting may take, in seconds."""
FIRST_PAUSE_S = 0.25
"""Before the second attempt, in seconds; doubled before each later one, or what Retry-After asks."""
CLOSED = "the reward pool is closed"


@dataclass(slots=True, kw_only=True)
class _Tree:
    """The leaves of one call, of which batches are taken one after the other."""

    responses: Sequence[str]
    reference: str
    options: Mapping[str, Any]
    grades: dict[int, list[Grade]] = field(default_factory=dict)
    """Of each batch, by its first leaf."""
    lost: str | None = None
    """Why no batch is sent any more."""
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class Remote:
    """A reward server; a `Grader`.

    Args:
        name: of the reward.
        url: where batches are posted.
        limits: of each batch.
        stats: where retries are counted.

    Raises:
        ConfigError: the token in the environment cannot be a header.
    """

    def __init__(self, name: str, url: str, limits: HttpLimits, stats: Stats) -> None:
        self._name, self._url, self._limits, self._stats = name, url, limits, stats
        self._token = token_of(name)
        self._answers = Answers(name, self._token)
        self._client: httpx.AsyncClient | None = None
        self._connections = Connections(limits.connections, limits.timeout_s + limits.retry_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Make the client; connects to nobody."""
        if self._client is None and not self._closed:
            headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            self._client = httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(self._limits.timeout_s, connect=CONNECT_S),
                # We count ourselves: httpcore 1.0 keeps the place of a request that is cancelled before its
                # connection opens, so with a bound here callers that go away would stop the reward for good.
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=self._limits.connections
                ),
                follow_redirects=False,  # a token goes where it was meant to go
            )

    async def check(self, reference: str, options: Mapping[str, Any]) -> None:
        """Send an empty response: what the server says about that one alone is no reason to refuse.

        Raises:
            RequestError: the server refuses the reference or the options; or, with status 503, no batch could be
                graded now.
        """
        try:
            tree = _Tree(responses=("",), reference=reference, options=options)
            await self._post(tree, tree.responses)
        except RejectedError:
            return
        except BatchError as error:
            raise RequestError(
                "reward.name",
                f"{self._name} cannot grade now: {error}; try again later",
                status=503,
            ) from None

    async def grade(
        self, responses: Sequence[str], reference: str, options: Mapping[str, Any]
    ) -> list[Grade]:
        """Grade responses to one question.

        Raises:
            RequestError: the server refuses the reference or the options.
        """
        tree = _Tree(responses=responses, reference=reference, options=options)
        batches = range(0, len(responses), self._limits.batch)
        rest = iter(batches)
        try:
            async with asyncio.TaskGroup() as group:
                # No more tasks than connections: what is tried again waits behind no batch of its own tree.
                for _ in batches[: self._limits.connections]:
                    task = group.create_task(self._some(tree, rest))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except ExceptionGroup as refusals:
            raise refusals.exceptions[0] from None
        await self._some(tree, rest)  # what is left where the pool was closed before a task began
        return [grade for at in batches for grade in tree.grades[at]]

    async def close(self) -> None:
        """Hang up; leaves that are being graded get an error."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._client is not None:
            await self._client.aclose()

    async def _some(self, tree: _Tree, rest: Iterator[int]) -> None:
        """Grade one batch after the other while there are any left."""
        for at in rest:
            batch = tree.responses[at : at + self._limits.batch]
            tree.grades[at] = await self._batch(tree, batch)

    async def _batch(self, tree: _Tree, responses: Sequence[str]) -> list[Grade]:
        try:
            return await self._post(tree, responses)
        except BatchError as error:
            if isinstance(error, LostError) and tree.lost is None:
                tree.lost = f"not sent: for an earlier batch of this tree, {error}"
            return [failed(str(error))] * len(responses)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            return [failed(CLOSED)] * len(responses)

    async def _post(self, tree: _Tree, responses: Sequence[str]) -> list[Grade]:
        """Send one batch until there is an answer, or no patience."""
        give_up, said = math.inf, "the reward server answers nobody, and every connection is taken"
        clock = asyncio.get_running_loop().time
        for attempt in range(1, self._limits.attempts + 1):
            tried = f" ({attempt} attempts)" if attempt > 1 else ""
            pause = 0.0
            try:
                self._may_send(tree)
                async with self._connections.one(give_up):
                    self._may_send(tree)
                    give_up = min(give_up, clock() + self._limits.retry_s)
                    question = _question(self._name, tree, responses)
                    return self._answers.grades(await self._attempt(question), len(responses))
            except TimeoutError:
                raise (BatchError if attempt > 1 else LostError)(said) from None
            except PassingError as error:
                said, pause = f"{error}{tried}", _pause(attempt, error.wait_s)
                if attempt == self._limits.attempts or clock() + pause > give_up:
                    heard = max(tree.began, self._connections.answered_at)
                    lost = error.nobody or clock() > heard + self._limits.retry_s
                    raise (LostError if lost else BatchError)(said) from None
            self._stats.retries += 1
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _may_send(self, tree: _Tree) -> None:
        if self._closed or tree.lost is not None:
            raise BatchError(CLOSED if self._closed else tree.lost)

    async def _attempt(self, body: bytes) -> bytes:
        """Body of a 200."""
        if self._client is None or self._closed:
            raise BatchError(CLOSED)
        limit = self._limits.timeout_s
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(limit),
                self._client.stream("POST", self._url, content=body, headers=headers) as answer,
            ):
                self._answers.accept_status(answer.status_code, answer.headers)
                said = await self._read(answer)
                self._connections.answered()
                if answer.status_code != 200:
                    raise self._answers.rejection(answer.status_code, said)
                return said
        except (TimeoutError, httpx.ReadTimeout):
            raise LostError(f"the reward server took longer than {limit:g} s") from None
        except httpx.TransportError as error:
            why = f"the reward server cannot be reached: {type(error).__name__}"
            nobody = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise PassingError(why, nobody=nobody) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BatchError(f"the reward server: {type(error).__name__}") from None

    async def _read(self, answer: httpx.Response) -> bytes:
        parts, size = [], 0
        async for part in answer.aiter_raw():  # nothing that unpacks to gigabytes
            size += len(part)
            if size > self._limits.answer_bytes:
                longest = self._limits.answer_bytes
                raise BatchError(f"the reward server answered more than {longest} bytes")
            parts.append(part)
        return b"".join(parts)


def _question(name: str, tree: _Tree, responses: Sequence[str]) -> bytes:
    question = {
        "reward": name,
        "reference": tree.reference,
        "options": dict(tree.options),
        "responses": list(responses),
    }
    try:
        return json.dumps(question, allow_nan=False).encode()
    except ValueError:
        raise RequestError("reward.options", "NaN and infinities cannot be sent as JSON") from None


def _pause(attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt; spread, so that the batches of a tree do not come back as one."""
    pause: float = FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
    return pause if asked is None else max(asked, pause)
