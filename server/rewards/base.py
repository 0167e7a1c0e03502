"""What a reward function is, and what grading one leaf gives."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import RequestError

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]
"""`(response, reference, options) -> reward`, a pure function: it may be called more than once for one leaf.

It raises RequestError for a reference or options that no response could be graded with; that refuses the whole
request. Any other exception costs its own leaf only.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """Reward of one leaf."""

    reward: float
    """Finite; 0.0 where the function failed."""
    error: str | None = None
    """Why the function gave no reward; None where it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A RequestError on its way out of a worker process (the exception itself does not survive pickling)."""

    field: str
    detail: str


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
