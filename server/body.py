"""Bodies of requests: bounded in bytes and in time before anything reads them, and JSON read strictly."""

import json
from asyncio import timeout
from collections.abc import Callable, Coroutine
from typing import Any

import jiter
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.guard import OPEN
from server.limits import Limits
from server.problems import problem

CLOSE = {"Connection": "close"}
"""What is left of the body is never read."""


class BodyLimit:
    """ASGI middleware that reads a body within its bounds, and hands it on whole.

    A body that says its size is refused unread; one that does not, as soon as it is over the bound. Behind the
    `Guard`, and open paths take no body, so that strangers cannot make the server hold anything.

    Args:
        app: what gets the body in one message.
        limits: bounds in bytes and seconds.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then call what is behind."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in OPEN and _announced(scope):
            detail = "body: this path takes none; leave it out"
            await problem(400, detail, field="body", headers=CLOSE)(scope, receive, send)
            return
        size = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if size.isdigit() and int(size) > self._limits.body_bytes:
            await self._too_large()(scope, receive, send)
            return
        try:
            body = await self._read(receive)
        except TimeoutError:
            await self._too_slow()(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        if len(body) > self._limits.body_bytes:
            await self._too_large()(scope, receive, send)
            return
        await self._app(scope, replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or as much of it as shows that it is too large; None when the client goes away."""
        pieces: list[bytes] = []
        size = 0
        async with timeout(self._limits.body_s):
            while size <= self._limits.body_bytes:
                async with timeout(self._limits.body_idle_s):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if not message.get("more_body", False):
                    break
        return b"".join(pieces)

    def _too_large(self) -> Response:
        detail = f"body: it has more than {self._limits.body_bytes} bytes; send less, or raise --max-body-mib"
        return problem(413, detail, field="body", headers=CLOSE)

    def _too_slow(self) -> Response:
        limits = self._limits
        detail = (
            f"body: nothing came for {limits.body_idle_s:g} s, or it was not whole after {limits.body_s:g} s; "
            "send it again"
        )
        return problem(408, detail, field="body", headers=CLOSE)


def _announced(scope: Scope) -> bool:
    """Does a request say that a body follows?"""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
        for name, value in scope["headers"]
    )


def replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, and then what the server says: that the client went away."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def strict_json(body: bytes) -> Any:  # noqa: ANN401  # whatever the caller sent
    """JSON as RFC 8259 has it: UTF-8, no NaN, no key twice, no half of a character, not too deep.

    Raises:
        json.JSONDecodeError: it is not; the routes answer 400.
    """
    try:
        return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


class StrictRequest(Request):
    """A request whose JSON is read by `strict_json`."""

    async def json(self) -> Any:  # noqa: ANN401  # whatever the caller sent
        """The body; see `strict_json`."""
        return strict_json(await self.body())


class StrictRoute(APIRoute):
    """A route that reads its JSON strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `APIRoute.get_route_handler`."""
        handler = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strictly
