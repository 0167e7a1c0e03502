"""What a reward function is, what grading one leaf gives, and what may grade."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared.errors import RequestError

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]
"""`(response, reference, options) -> reward`, a pure function: it may be called more than once for one leaf.

It raises RequestError for a reference or options that no response could be graded with; that refuses the whole
request. Any other exception costs its own leaf only.
"""

ERROR_CHARS = 300
"""Most characters of a `reward_error`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """Reward of one leaf."""

    reward: float
    """Finite; 0.0 where the function failed."""
    error: str | None = None
    """Why the function gave no reward; None where it did."""


@dataclass(slots=True)
class Stats:
    """What one reward has done since the server started; only ever grows."""

    leaves: int = 0
    """Different responses of each tree, those that failed too; no checks."""
    failures: int = 0
    """Of these leaves, how many got an error instead of a reward."""
    seconds: float = 0.0
    """From the question of each tree to its last grade, waiting for a free process included, summed."""
    restarts: int = 0
    """Worker processes that had to be replaced."""
    retries: int = 0
    """HTTP requests that were sent again."""


class Grader(Protocol):
    """Where the leaves of one reward are graded: worker processes, or a server of the user's own."""

    async def start(self) -> None:
        """Open what is not open yet.

        Raises:
            ConfigError: the reward cannot be used as it is configured.
        """

    async def check(self, reference: str, options: Mapping[str, Any]) -> None:
        """Try what can be tried before a tree is sampled.

        Raises:
            RequestError: no response could be graded.
        """

    async def grade(
        self, responses: Sequence[str], reference: str, options: Mapping[str, Any]
    ) -> list[Grade]:
        """Grade responses to one question: [N] different ones in, [N] grades out, in order.

        Raises:
            RequestError: the reference or the options can grade no response.
        """

    async def close(self) -> None:
        """End it for good; leaves that are being graded get reward 0.0 and an error."""


def failed(error: str) -> Grade:
    """The grade of a leaf without a reward."""
    return Grade(reward=0.0, error=brief(error))


def brief(text: str) -> str:
    r"""A text from outside as an error message: short, and writable as UTF-8.

    >>> brief("half a pair: \ud83d")
    'half a pair: ?'
    """
    return text[:ERROR_CHARS].encode("utf-8", "replace").decode()


def refuse_unknown_options(options: Mapping[str, Any], known: frozenset[str] = frozenset()) -> None:
    """Check the options of a built-in reward; `unfinished` belongs to the service and is always allowed.

    Raises:
        RequestError: an option is not known; the field names it.
    """
    allowed = known | {"unfinished"}
    for option in options:
        if option not in allowed:
            raise RequestError(
                f"reward.options.{option}", f"unknown option{nearest(option, allowed)}"
            )


def nearest(name: str, known: frozenset[str]) -> str:
    """How an error message ends: the nearest known name, and the list.

    >>> nearest("gsmk8", frozenset({"gsm8k", "math"}))
    "; did you mean 'gsm8k'? Known: gsm8k, math"
    """
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(sorted(known))}"
