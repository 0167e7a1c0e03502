"""What runs inside a worker process: one reward function, leaf by leaf, under a time limit.

The limit is an alarm that raises in the function, which costs nothing and keeps the process. Code that an alarm
cannot stop (C code that never returns, `except BaseException`) is killed with its process by the pool.
"""

import importlib
import math
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing.synchronize import Semaphore
from types import FrameType
from typing import Any, SupportsFloat

from server.rewards.base import Grade, Refusal, RewardFunction
from shared.errors import RequestError

TURN_S = 0.25
"""Seconds after which a batch goes back with what is done, so that trees take turns."""

_ERROR_CHARS = 300  # keeps a result under the size that a pipe writes in one piece

_function: RewardFunction | None = None
_load_error: str | None = None


class _TimeUpError(BaseException):
    """The alarm; not an Exception, so that `except Exception` in a reward function does not swallow it."""


def initialize(target: str, memory_bytes: int | None, loaded: Semaphore) -> None:
    """Load the function of this process, before the first task reaches it.

    A failure is kept for `load_error`: a worker that dies here would be replaced for ever.

    Args:
        target: dotted path `package.module:function`.
        memory_bytes: bound on the address space; None for none.
        loaded: released once, when done.
    """
    global _function, _load_error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler waits for C code to return
    signal.signal(signal.SIGALRM, _ring)
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not callable(found):
            raise TypeError(f"it is a {type(found).__name__}, not a function")
        _function = found
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    except BaseException as error:  # a user's module may raise anything; see above
        _load_error = _describe(error)
    loaded.release()


def load_error() -> str | None:
    """Why this process has no function; None where it has one."""
    return _load_error


def grade_batch(
    responses: Sequence[str], reference: str, options: Mapping[str, Any], timeout_s: float
) -> list[Grade] | Refusal:
    """Grade leaves in order until the turn is over: at least one, often all.

    Args:
        responses: [B] the leaves, B >= 1.
        timeout_s: limit of one leaf, in seconds.

    Returns:
        Grades of the first leaves of the batch, or the function's refusal of the request.
    """
    end_of_turn = time.monotonic() + TURN_S
    grades: list[Grade] = []
    for response in responses:
        outcome = _grade(response, reference, options, timeout_s)
        if isinstance(outcome, Refusal):
            return outcome
        grades.append(outcome)
        if time.monotonic() > end_of_turn:
            break
    return grades


def _grade(
    response: str, reference: str, options: Mapping[str, Any], timeout_s: float
) -> Grade | Refusal:
    assert _function is not None, _load_error
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            value: object = _function(response, reference, options)
            reward = float(value) if isinstance(value, SupportsFloat) else None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (
        _TimeUpError
    ):  # raised once at most, even between the function's return and the line above
        return Grade(reward=0.0, error=too_slow(timeout_s))
    except RequestError as error:
        return Refusal(field=error.field, detail=error.detail)
    except (
        BaseException
    ) as error:  # whatever a function throws, SystemExit too, costs its own leaf only
        return Grade(reward=0.0, error=_describe(error))
    if reward is None or not math.isfinite(reward):
        found = type(value).__name__ if reward is None else str(reward)
        return Grade(reward=0.0, error=f"returned {found}, not a finite number")
    return Grade(reward=reward)


def too_slow(timeout_s: float) -> str:
    """The error of a leaf that ran into its limit."""
    return f"took longer than its limit of {timeout_s:g} s"


def _ring(_signal: int, _frame: FrameType | None) -> None:
    raise _TimeUpError


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_ERROR_CHARS]
