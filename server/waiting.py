"""Waits of a server that starts, and not for ever: for a Redis that is away, and for its id to be free."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared.coordination import RECORD_S, Coordinator, id_taken, is_away
from shared.errors import ConfigError, CoordinationError

T = TypeVar("T")

log = logging.getLogger("spoke.server")

RETRY_S = 0.5
LOOK_S = 0.2
"""Between two looks at whether an id is free."""


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


async def own_id(coordinator: Coordinator, server_id: str, bound_s: float) -> None:
    """Return once no other server lives under an id: the record of one that was killed is gone within `RECORD_S`.

    Args:
        coordinator: Redis.
        server_id: of this server, which has written no record yet.
        bound_s: how long Redis may be away, seconds.

    Raises:
        ConfigError: another server renews its record under this id.
        CoordinationError: Redis was away for longer.
    """
    first, until = None, time.monotonic() + RECORD_S + 1.0
    while True:
        asked = time.monotonic()  # an answer may lie unread: loading slows the loop
        records = await patiently(coordinator.servers, bound_s)
        found = next((r for r in records if r.server_id == server_id), None)
        if found is None:
            return
        first = first or found
        if found != first or asked > until:
            raise ConfigError(id_taken(server_id, found.url))
        await asyncio.sleep(LOOK_S)
