"""Waits for a Redis that is away when a server starts, with a line that says so, and not for ever."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared.coordination import is_away
from shared.errors import CoordinationError

T = TypeVar("T")

log = logging.getLogger("spoke.server")

RETRY_S = 0.5


async def patiently(call: Callable[[], Awaitable[T]], bound_s: float) -> T:
    """The result of a call to Redis, tried again while Redis is away.

    Args:
        call: to be tried.
        bound_s: how long it may be tried, seconds.

    Raises:
        CoordinationError: Redis refused, or was away for longer; the message says for how long it was waited.
    """
    deadline, told = time.monotonic() + bound_s, False
    while True:
        try:
            return await call()
        except CoordinationError as error:
            if not is_away(error):
                raise
            if time.monotonic() + RETRY_S > deadline:
                raise CoordinationError(f"{error}; waited {bound_s:g} s (--redis-wait)") from error
            if not told:
                log.warning("%s; waiting for it, at most %g s", error, bound_s)
            told = True
        await asyncio.sleep(RETRY_S)
