"""What a client's connection means for the work behind it: a client that goes away takes its work with it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody is left to answer."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled the moment that the client goes away.

    Args:
        request: whose body has been read.
        work: for its answer.

    Raises:
        ClientGoneError: the client went away; the work has ended.
    """
    task = asyncio.ensure_future(work)
    away = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, away}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for unfinished in (task, away):
            unfinished.cancel()
        await asyncio.wait({task, away})


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
