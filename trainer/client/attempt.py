"""One attempt at a tree: sent to one server, and what came of it."""

import asyncio
import time

import httpx

from shared.errors import RequestError, TreeError, TreeTooLargeError
from shared.wire import RolloutTreeResponse
from trainer.client.connection import endpoint
from trainer.client.reading import CallbackError, Listener, StreamedError, accepts, read_tree
from trainer.client.retries import Failure, failure, problem

PROBE_S = 5.0
"""Bound of an answer to `/info` or `/readyz`."""
SILENT_S = 5.0
"""A server that sends nothing for so long while it samples is asked whether it is ready."""
LOST_S = 10.0
"""One that says nothing to that for so long is given up, whatever the answer would have been."""

Answer = RolloutTreeResponse | Failure | CallbackError


async def ask(
    http: httpx.AsyncClient, url: str, body: bytes, deadline: float, listener: Listener
) -> Answer:
    """The tree, or why there is none from this server; given up where the server does not live any more.

    Args:
        http: sends.
        url: of the server.
        body: the request in JSON.
        deadline: of the whole answer, on the loop's clock.
        listener: is told of nodes.

    Raises:
        RequestError: the request would be refused again, or its tree is too large to take.
        ConfigError: the server does not take the token.
    """
    asked = asyncio.ensure_future(_tree(http, url, body, deadline, listener))
    lost = asyncio.ensure_future(_lost(http, url, listener))
    try:
        await asyncio.wait({asked, lost}, return_when=asyncio.FIRST_COMPLETED)
        return asked.result() if asked.done() else lost.result()
    finally:
        for task in (asked, lost):
            task.cancel()
        await asyncio.wait({asked, lost})


async def get(
    http: httpx.AsyncClient, url: str, path: str, bound_s: float = PROBE_S
) -> httpx.Response | Failure:
    """What a server says at a path, of whatever status."""
    try:
        return await http.get(endpoint(url, path), timeout=bound_s)
    except (httpx.RequestError, httpx.InvalidURL) as error:
        return Failure(reason=_named(error))


async def _lost(http: httpx.AsyncClient, url: str, listener: Listener) -> Failure:
    """Wait until a server says nothing any more, not even whether it is ready: it hangs, or has gone."""
    while True:
        heard = listener.pieces
        await asyncio.sleep(SILENT_S)
        if listener.pieces == heard:
            answer = await get(http, url, "/readyz", LOST_S)
            if isinstance(answer, Failure):
                return Failure(reason=f"it hangs: {answer.reason}", whole_server=True)


async def _tree(
    http: httpx.AsyncClient, url: str, body: bytes, deadline: float, listener: Listener
) -> Answer:
    try:
        async with (
            asyncio.timeout_at(deadline),
            http.stream(
                "POST",
                endpoint(url, "/rollout_tree"),
                content=body,
                headers={"Content-Type": "application/json", "Accept": accepts(listener)},
            ) as answer,
        ):
            if answer.status_code == httpx.codes.OK:
                return await read_tree(answer, listener)
            found = problem(answer.status_code, await answer.aread())
    except CallbackError as error:
        return error
    except TimeoutError:
        return Failure(reason="ReadTimeout: no whole answer by the bound")
    except TreeTooLargeError as error:  # so it would be from any server
        detail = f"{error} (LIMIT_BYTES of shared/codec.py); ask for fewer or shorter branches"
        raise RequestError("plan", detail, status=httpx.codes.REQUEST_ENTITY_TOO_LARGE) from None
    except (TreeError, httpx.DecodingError) as error:
        return Failure(reason=f"its answer is no tree: {error}")
    except (httpx.RequestError, httpx.InvalidURL) as error:
        return Failure(reason=_named(error), whole_server=True)
    except StreamedError as error:  # refused after the stream had begun
        found = error.problem
    return failure(url, found, answer.headers, time.time())


def _named(error: httpx.RequestError | httpx.InvalidURL) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
