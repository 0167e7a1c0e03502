"""Answers to readers that stop reading: given up in time, with all that they hold."""

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("spoke.server")

PIECE = 65_536
"""Bytes that are handed to uvicorn at once: it waits for the reader between two messages, never within one."""


class SendLimit:
    """ASGI middleware that bounds how long a reader may take no byte.

    In front of everything that holds something while it answers: what it is sent through fails as it does where a
    client has gone, and so gives up its places. Then uvicorn closes the connection.

    Args:
        app: answers.
        bound_s: longest wait for the reader to take the next piece, seconds.
    """

    def __init__(self, app: ASGIApp, bound_s: float) -> None:
        self._app = app
        self._bound_s = bound_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; its answer goes out in pieces, each in time."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stuck = False

        async def in_time(message: Message) -> None:
            nonlocal stuck
            for piece in pieces(message):
                if stuck:
                    raise TimeoutError("the reader takes nothing")
                try:
                    async with asyncio.timeout(self._bound_s):
                        await send(piece)
                except TimeoutError:
                    stuck = True
                    raise

        try:
            await self._app(scope, receive, in_time)
        except Exception:  # however the application passes on that it could not send
            if not stuck:
                raise
        if stuck:
            log.warning(
                "%s: its reader took nothing for %g s; given up", scope["path"], self._bound_s
            )


def pieces(message: Message) -> list[Message]:
    """A message as messages of at most `PIECE` bytes.

    >>> [len(m["body"]) for m in pieces({"type": "http.response.body", "body": bytes(150_000)})]
    [65536, 65536, 18928]
    """
    body = message.get("body", b"")
    if message["type"] != "http.response.body" or len(body) <= PIECE:
        return [message]
    starts = range(0, len(body), PIECE)
    more = message.get("more_body", False)
    return [
        {**message, "body": body[at : at + PIECE], "more_body": more or at != starts[-1]}
        for at in starts
    ]
