"""A reader that stops reading loses its answer in time, and the server what it held for it.

1. A stream whose reader takes nothing ends, and so does what it holds: its place, its memory.
2. A large answer in one piece does too, and the connection does not outlive it.
3. A slow reader that goes on reading gets all of it.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator

import pytest
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from support import on_a_socket

from server.__main__ import bind
from server.app import Holder, create_app
from server.costs import Cost
from server.limits import Limits
from server.openai_routes import ROUTES, add_openai_routes
from server.sending import SendLimit
from server.status import Status

WHOLE = 32 << 20
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    async def lines() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 10_000

    await StreamingResponse(lines())(scope, receive, send)


async def whole(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(b"x" * WHOLE)(scope, receive, send)


@contextlib.asynccontextmanager
async def places(answer: ASGIApp, send_s: float) -> AsyncIterator[tuple[int, "asyncio.Queue[str]"]]:
    """Port of a server whose OpenAI route is `answer`, and what became of the places it took."""
    told: asyncio.Queue[str] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def enter(cost: Cost) -> AsyncIterator[None]:
        told.put_nowait("taken")
        try:
            yield
        finally:
            told.put_nowait("free")

    app = create_app(Holder(Status(server_id="one")), limits=Limits(send_s=send_s))
    app.router.routes = [r for r in app.router.routes if getattr(r, "path", "") not in ROUTES]
    add_openai_routes(app, lambda: (answer, 512), enter)
    async with on_a_socket(app) as port:
        yield port, told


@pytest.mark.parametrize("answer", [endless, whole])
async def test_a_reader_that_stops_reading_frees_its_place(
    answer: ASGIApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with places(answer, 0.3) as (port, told):
        with socket.create_connection(("127.0.0.1", port)) as never_reads:
            never_reads.sendall(REQUEST)
            assert await asyncio.wait_for(told.get(), 5) == "taken"
            assert await asyncio.wait_for(told.get(), 5) == "free"
    assert "its reader took nothing for 0.3 s; given up" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's bound is Linux's")
async def test_its_connection_is_closed_too() -> None:
    told = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * WHOLE, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()

    async with on_a_socket(app, bind("127.0.0.1", 0, unread_s=0.5)) as port:
        with socket.create_connection(("127.0.0.1", port)) as never_reads:
            never_reads.sendall(REQUEST)
            await asyncio.wait_for(told.wait(), 10)


async def test_a_slow_reader_gets_all_of_it() -> None:
    async with places(whole, 2.0) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=65_536)
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        assert len(await asyncio.wait_for(reader.readexactly(WHOLE), 20)) == WHOLE
        writer.close()


async def test_an_application_that_fails_by_itself_still_fails() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError("by itself")

    with pytest.raises(OSError, match="by itself"):
        await SendLimit(fails, 1.0)({"type": "http", "path": "/"}, None, None)  # type: ignore[arg-type]
