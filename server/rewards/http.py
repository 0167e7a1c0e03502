"""Rewards by a server of the user's own: leaves out in batches, numbers back. docs/rewards.md has the protocol.

Whatever that server does costs the leaves of one batch, and is said in their `reward_error`.
"""

import asyncio
import contextlib
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from server.rewards.base import Grade, Stats, brief, failed
from server.rewards.limits import HttpLimits
from shared.errors import ConfigError, RequestError

CONNECT_S = 5.0
"""How long connecting may take, in seconds."""
FIRST_PAUSE_S = 0.25
"""Before the second attempt, in seconds; doubled before each later one, or what Retry-After asks."""
CLOSED = "the reward pool is closed"

_FIELDS = re.compile(r"(?:reward\.)?((?:reference|options)(?:\..+)?)")


class _BatchError(Exception):
    """A batch that got no rewards; the message is for `reward_error`, and holds no URL and no token."""


class _PassingError(_BatchError):
    """One that may go better at the next attempt."""

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class _RejectedError(_BatchError):
    """400 or 422 over these responses."""


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
        self._client: httpx.AsyncClient | None = None
        self._free = asyncio.Semaphore(limits.connections)
        self._tasks: set[asyncio.Task[list[Grade]]] = set()
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
                limits=httpx.Limits(max_connections=self._limits.connections),
                follow_redirects=False,  # a token goes where it was meant to go
            )

    async def check(self, reference: str, options: Mapping[str, Any]) -> None:
        """Send an empty response: what the server says about that one alone is no reason to refuse.

        Raises:
            RequestError: the server refuses the reference or the options; or, with status 503, no batch could be
                graded now.
        """
        try:
            await self._post(("",), reference, options)
        except _RejectedError:
            return
        except _BatchError as error:
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
        size = self._limits.batch
        batches = [responses[at : at + size] for at in range(0, len(responses), size)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._batch(b, reference, options)) for b in batches]
                for task in tasks:
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except ExceptionGroup as refusals:
            raise refusals.exceptions[0] from None
        return [grade for task in tasks for grade in task.result()]

    async def close(self) -> None:
        """Hang up; leaves that are being graded get an error."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._client is not None:
            await self._client.aclose()

    async def _batch(
        self, responses: Sequence[str], reference: str, options: Mapping[str, Any]
    ) -> list[Grade]:
        try:
            return await self._post(responses, reference, options)
        except _BatchError as error:
            return [failed(str(error))] * len(responses)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            return [failed(CLOSED)] * len(responses)

    async def _post(
        self, responses: Sequence[str], reference: str, options: Mapping[str, Any]
    ) -> list[Grade]:
        """Send one batch until there is an answer, or no patience."""
        body = _question(self._name, responses, reference, options)
        give_up = math.inf
        for attempt in range(1, self._limits.attempts + 1):
            try:
                async with self._free:
                    give_up = min(give_up, time.monotonic() + self._limits.retry_s)
                    return self._grades(await self._attempt(body), len(responses))
            except _PassingError as error:
                pause = _pause(attempt, error.retry_after_s)
                if attempt == self._limits.attempts or time.monotonic() + pause > give_up:
                    tried = f" ({attempt} attempts)" if attempt > 1 else ""
                    raise _BatchError(f"{error}{tried}") from None
            self._stats.retries += 1
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, body: bytes) -> bytes:
        """Body of a 200."""
        if self._client is None or self._closed:
            raise _BatchError(CLOSED)
        limit = self._limits.timeout_s
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(limit),
                self._client.stream("POST", self._url, content=body, headers=headers) as answer,
            ):
                self._accept_status(answer)
                body = await self._read(answer)
                if answer.status_code != 200:
                    raise self._rejection(answer.status_code, _json(body))
                return body
        except (TimeoutError, httpx.ReadTimeout):
            raise _BatchError(f"the reward server took longer than {limit:g} s") from None
        except httpx.TransportError as error:
            why = f"the reward server cannot be reached: {type(error).__name__}"
            raise _PassingError(why) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _BatchError(f"the reward server: {type(error).__name__}") from None

    async def _read(self, answer: httpx.Response) -> bytes:
        parts, size = [], 0
        async for part in answer.aiter_raw():  # nothing that unpacks to gigabytes
            size += len(part)
            if size > self._limits.answer_bytes:
                longest = self._limits.answer_bytes
                raise _BatchError(f"the reward server answered more than {longest} bytes")
            parts.append(part)
        return b"".join(parts)

    def _accept_status(self, answer: httpx.Response) -> None:
        """Raise what a status means whose body says nothing more to us."""
        status = answer.status_code
        said = f"the reward server answered {status}"
        if status in (408, 429) or status >= 500:
            raise _PassingError(said, retry_after(answer.headers.get("Retry-After")))
        if 300 <= status < 400:
            raise _BatchError(f"{said}, a redirect; give the URL where it leads")
        if status not in (200, 400, 422):
            remedy = f"; is {variable(self._name)} right?" if status in (401, 403) else ""
            raise _BatchError(said + remedy)

    def _rejection(self, status: int, problem: Any) -> Exception:  # noqa: ANN401  # any JSON
        """What 400 or 422 means: the question, or these responses."""
        problem = problem if isinstance(problem, dict) else {}
        field, detail = problem.get("field"), self._clean(problem.get("detail"))
        said = f"the reward server answered {status}"
        if isinstance(field, str) and (named := _FIELDS.fullmatch(field)):
            return RequestError(f"reward.{self._clean(named[1])}", detail or said)
        return _RejectedError(f"{said}: {detail}" if detail else said)

    def _grades(self, body: bytes, count: int) -> list[Grade]:
        """What a 200 says, leaf by leaf."""
        answer = _json(body)
        if not isinstance(answer, dict):
            raise _BatchError("the reward server answered no JSON object")
        rewards, errors = answer.get("rewards"), answer.get("errors")
        errors = [None] * count if errors is None else errors
        for field, values in (("rewards", rewards), ("errors", errors)):
            if not isinstance(values, list):
                raise _BatchError(f"the reward server answered no list {field!r}")
            if len(values) != count:
                raise _BatchError(f"the reward server gave {len(values)} {field} for {count}")
        return [self._grade(*pair) for pair in zip(rewards or [], errors, strict=True)]

    def _grade(self, reward: object, error: object) -> Grade:
        if error is not None:
            return failed(self._clean(error) or "the reward server gave an empty error")
        number = _finite(reward)
        if number is None:
            return failed(f"the reward server gave {json.dumps(reward)}, not a finite number")
        return Grade(reward=number)

    def _clean(self, text: object) -> str:
        """What the server wrote, without our token."""
        words = text if isinstance(text, str) else "" if text is None else json.dumps(text)
        return brief(words.replace(self._token, "(token)") if self._token else words)


def _question(
    name: str, responses: Sequence[str], reference: str, options: Mapping[str, Any]
) -> bytes:
    question = {
        "reward": name,
        "reference": reference,
        "options": dict(options),
        "responses": list(responses),
    }
    try:
        return json.dumps(question, allow_nan=False).encode()
    except ValueError:
        raise RequestError("reward.options", "NaN and infinities cannot be sent as JSON") from None


def variable(name: str) -> str:
    """The environment variable with the bearer token of a reward.

    >>> variable("my-judge.v2")
    'SPOKE_REWARD_TOKEN_MY_JUDGE_V2'
    """
    return "SPOKE_REWARD_TOKEN_" + re.sub(r"[^A-Z0-9]", "_", name.upper())


def token_of(name: str) -> str | None:
    """The bearer token of a reward; None where its variable is not set, or empty.

    Raises:
        ConfigError: it cannot be a header.
    """
    token = os.environ.get(variable(name), "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"{variable(name)}: a bearer token is printable ASCII without spaces")
    return token or None


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date.

    >>> retry_after("3"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (3.0, None, 0.0)
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    return None


def _pause(attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt; spread, so that the batches of a tree do not come back as one."""
    pause: float = FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
    return pause if asked is None else max(asked, pause)


def _json(body: bytes) -> Any:  # noqa: ANN401  # whatever the server wrote
    """The document, or None where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(body)
    return None


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of 400 digits
        return None
