"""The trainer's file server: a store's folder over HTTP, for servers that share neither disk nor bucket with it.

    GET, HEAD /{run}/v000042/NAME      a regular file of a version, Range and all
    GET /metrics                       bytes sent, by run and kind of file (Prometheus)
    GET /livez                         without a token

A process of its own: the trainer's computing must not slow it, nor it the trainer.
"""

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path

import anyio.to_thread
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.manifest import RUN_NAME
from shared.store import MANIFEST, version_of

log = logging.getLogger("spoke.store")

LIVE = "/livez"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Of a file, as in `FileEntry`: no slash, no dot at the start."""
_UNFINISHED = (".partial", ".part")


class _Pieces(FileResponse):
    chunk_size = 256 * 1024  # a thread is asked for each


def create_app(root: Path, token: str | None) -> ASGIApp:
    """The application that serves a store's folder.

    Args:
        root: has a folder for each run.
        token: bearer token that every request but `/livez` must bring; None asks for none.
    """
    served = _Served(root)
    app = Starlette(
        routes=[
            Route("/{run}/{version}/{name}", served.file),
            Route("/metrics", served.metrics),
            Route(LIVE, _alive),
        ],
        exception_handlers={HTTPException: _problem},
    )
    return _Asked(app, token)


async def _alive(request: Request) -> Response:
    """Our process id: whoever started us knows that it is us who answers at that port."""
    return PlainTextResponse(f"{os.getpid()}\n")


async def _problem(request: Request, error: Exception) -> Response:
    """Errors as problem documents (RFC 9457)."""
    assert isinstance(error, HTTPException)
    return _refusal(error.status_code, str(error.detail), error.headers)


def _refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    body = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    media = "application/problem+json"
    return JSONResponse(body, status_code=status, headers=headers, media_type=media)


class _Served:
    """The files below a root, and how many bytes of them were sent."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._registry = CollectorRegistry()
        self._sent = Counter(
            "store_sent_bytes",
            "Bytes of files handed to connections.",
            ["run", "kind"],  # not by version: those never end
            namespace="spoke",
            registry=self._registry,
        )

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def file(self, request: Request) -> Response:
        run, folder, name = (request.path_params[key] for key in ("run", "version", "name"))
        version = version_of(folder)
        sound = RUN_NAME.fullmatch(run) and _NAME.fullmatch(name) and version is not None
        if not sound or name.endswith(_UNFINISHED):
            raise HTTPException(404)
        path = self._root / run / folder / name
        try:
            # Resolved: a link must not lead out of the root.
            found = await anyio.to_thread.run_sync(path.resolve)
            status = await anyio.to_thread.run_sync(found.stat)
        except OSError:
            raise HTTPException(404) from None
        if not (found.is_relative_to(self._root) and stat.S_ISREG(status.st_mode)):
            raise HTTPException(404)
        response = _Pieces(found, media_type="application/octet-stream", stat_result=status)
        count = self._sent.labels(run, _kind(name)).inc
        return _Counted(response, count)


def _kind(name: str) -> str:
    if name == MANIFEST:
        return "manifest"
    return "delta" if name.startswith("delta-") else "full"


class _Counted(Response):
    """A response whose body's bytes are counted as they are handed over."""

    def __init__(self, response: Response, count: Callable[[float], None]) -> None:
        self._response = response
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            await send(message)
            self._count(len(message.get("body", b"")))

        await self._response(scope, receive, counted)


class _Asked:
    """ASGI middleware that asks for the bearer token."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._digest = None if token is None else hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http" or scope["path"] == LIVE or self._admits(scope):
            await self._app(scope, receive, send)
        else:
            detail = "send Authorization: Bearer TOKEN with this store's token"
            challenge = {"WWW-Authenticate": 'Bearer realm="spoke store"'}
            await _refusal(401, detail, challenge)(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        if self._digest is None:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, presented = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = hashlib.sha256(presented.strip()).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == b"bearer"
