"""`GET /weights/{run}/v000042/NAME`: what this server holds, for its peers, laid out as a store."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI, Header
from fastapi.responses import FileResponse, Response
from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from server.holdings import Holdings
from server.openapi import refusals
from server.problems import problem
from shared.errors import BusyError
from shared.store import version_of

UPLOADS = 16
"""Files that are sent at once; `Sources` gives a server's slots to fewer peers than would need more."""
RETRY_AFTER_S = 2.0
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
_BYTES: dict[str, Any] = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": _BYTES, "description": "The whole file."},
    206: {"content": _BYTES, "description": "From the byte that Range asks for."},
}


def add_weights_routes(
    app: FastAPI, holdings: Callable[[], Holdings | None], sent: Counter
) -> None:
    """Add the route.

    Args:
        app: of the server.
        holdings: of the server; None where it follows no run, or not yet.
        sent: counts bytes.
    """
    uploads = _Uploads(UPLOADS, sent)

    @app.get(
        "/weights/{run}/{version}/{name}",
        response_class=Response,
        responses=refusals(404, 416, 429) | _ANSWERS,
    )
    async def weights_file(
        run: str,
        version: str,
        name: str,
        range_: Annotated[
            str | None, Header(alias="Range", description="`bytes=N-`: go on from byte N.")
        ] = None,
    ) -> Response:
        """A file of a weight version that this server holds, for other servers: `v000042` and a name of its
        manifest, or `manifest.json`."""
        held, number = holdings(), version_of(version)
        path = (
            None if held is None or held.run != run or number is None else held.file(number, name)
        )
        if path is None:
            raise HTTPException(
                404, "this server does not hold that file; ask another, or the store"
            )
        return await uploads.response(path, range_)


class _Uploads:
    """At most so many files at once.

    Args:
        most: files.
        sent: counts bytes.
    """

    def __init__(self, most: int, sent: Counter) -> None:
        self.left = most
        self.sent = sent

    async def response(self, path: Path, range_: str | None) -> Response:
        """A file, or what of it a range asks for.

        Raises:
            BusyError: enough are on their way.
            HTTPException: it was pruned just now.
        """
        if self.left <= 0:
            detail = "this server sends as many files as it may; ask another, or again later"
            raise BusyError(detail, status=429, retry_after_s=RETRY_AFTER_S)
        try:
            status = await anyio.to_thread.run_sync(path.stat)
        except FileNotFoundError:
            raise HTTPException(404, "this server has just deleted that file") from None
        asked = _RANGE.fullmatch(range_ or "")
        if asked and int(asked[1]) >= status.st_size:
            detail = f"range: this file has {status.st_size} bytes"
            headers = {"Content-Range": f"bytes */{status.st_size}"}
            return problem(416, detail, field="range", headers=headers)
        return _Upload(path, self, stat_result=status, media_type="application/octet-stream")


class _Upload(FileResponse):
    """A file that holds a place while it is sent."""

    def __init__(self, path: Path, uploads: _Uploads, **kwargs: Any) -> None:  # noqa: ANN401  # FileResponse's own
        super().__init__(path, **kwargs)
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, counting its bytes."""

        async def counted(message: Message) -> None:
            await send(message)
            self._uploads.sent.inc(len(message.get("body", b"")))

        self._uploads.left -= 1
        try:
            await super().__call__(_plain(scope), receive, counted)
        finally:
            self._uploads.left += 1


def _plain(scope: Scope) -> Scope:
    """A request whose Range is one that we serve; any other counts as none (RFC 9110, 14.2)."""
    asked = _RANGE.fullmatch(Headers(scope=scope).get("range", ""))
    if asked and not (asked[2] and int(asked[2]) < int(asked[1])):
        return scope
    headers = MutableHeaders(raw=list(scope["headers"]))
    del headers["range"]
    return {**scope, "headers": headers.raw}
