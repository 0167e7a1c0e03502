"""What the answers of a reward server mean: grades, a refusal, or errors that hold no URL and no token."""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.rewards.base import Grade, brief, failed
from shared.errors import ConfigError, RequestError
from shared.retry_after import retry_after_s

_FIELDS = re.compile(r"(?:reward\.)?((?:reference|options)(?:\..+)?)")


class BatchError(Exception):
    """A batch that got no rewards; the message is for `reward_error`, and holds no URL and no token."""


class PassingError(BatchError):
    """One that may go better at the next attempt.

    Args:
        why: the message.
        wait_s: what the server asks for, in seconds; None where it asks for nothing.
        nobody: nobody takes connections there.
    """

    def __init__(self, why: str, *, wait_s: float | None = None, nobody: bool = False) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.nobody = nobody


class LostError(BatchError):
    """A batch after which no other one of its tree is sent: the server is silent, or not there."""


class RejectedError(BatchError):
    """400 or 422 over these responses."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Reads the answers to one reward's batches.

    Args:
        name: of the reward.
        token: what no error may show; None for none.
    """

    name: str
    token: str | None

    def accept_status(self, status: int, headers: Mapping[str, str]) -> None:
        """Raise what a status means whose body says nothing more to us.

        Args:
            status: of the answer.
            headers: of the answer; any letter case.
        """
        said = f"the reward server answered {status}"
        if status in (408, 429) or status >= 500:
            asked, date = headers.get("Retry-After"), headers.get("Date")
            raise PassingError(said, wait_s=retry_after_s(asked, now=time.time(), date=date))
        if 300 <= status < 400:
            raise BatchError(f"{said}, a redirect; give the URL where it leads")
        if status not in (200, 400, 422):
            remedy = f"; is {variable(self.name)} right?" if status in (401, 403) else ""
            raise BatchError(said + remedy)

    def rejection(self, status: int, body: bytes) -> Exception:
        """What 400 or 422 means: the question, or these responses."""
        problem = _json(body)
        problem = problem if isinstance(problem, dict) else {}
        field, detail = problem.get("field"), self._clean(problem.get("detail"))
        said = f"the reward server answered {status}"
        if isinstance(field, str) and (named := _FIELDS.fullmatch(field)):
            return RequestError(f"reward.{self._clean(named[1])}", detail or said)
        return RejectedError(f"{said}: {detail}" if detail else said)

    def grades(self, body: bytes, count: int) -> list[Grade]:
        """What a 200 says, leaf by leaf."""
        answer = _json(body)
        if not isinstance(answer, dict):
            raise BatchError("the reward server answered no JSON object")
        rewards, errors = answer.get("rewards"), answer.get("errors")
        errors = [None] * count if errors is None else errors
        for field, values in (("rewards", rewards), ("errors", errors)):
            if not isinstance(values, list):
                raise BatchError(f"the reward server answered no list {field!r}")
            if len(values) != count:
                raise BatchError(f"the reward server gave {len(values)} {field} for {count}")
        return [self._grade(*pair) for pair in zip(rewards or [], errors, strict=True)]

    def _grade(self, reward: object, error: object) -> Grade:
        if error is not None:
            return failed(self._clean(error) or "the reward server gave an empty error")
        number = _finite(reward)
        if number is None:
            found = self._clean(json.dumps(reward))
            return failed(f"the reward server gave {found}, not a finite number")
        return Grade(reward=number)

    def _clean(self, text: object) -> str:
        """What the server wrote, without our token."""
        words = text if isinstance(text, str) else "" if text is None else json.dumps(text)
        return brief(words.replace(self.token, "(token)") if self.token else words)


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
