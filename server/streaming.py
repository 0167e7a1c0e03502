"""A tree as `application/x-ndjson`: each node's line as it finishes, then the tree's (`shared/stream.py`).

Whatever is refused is refused before the first line, by a status of its own; what fails later ends the stream with
an error's line. A reader that is slow holds up nobody: its lines wait, at most a tree of them.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import zstandard
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.answer import branch_line
from server.auth import caller
from server.branches import Branch, Path
from server.connection import while_connected
from server.details import for_caller
from server.service import RolloutService, Teller
from server.status import Status
from shared.codec import MediaType, wants_zstd
from shared.errors import BusyError, RequestError, SpokeError
from shared.stream import ErrorLine, RestartLine, dump, node_keys, node_line, tree_line
from shared.wire import Problem, RolloutTreeRequest, RolloutTreeResponse
from shared.zstd import LEVEL

log = logging.getLogger("spoke.server")


async def node_stream(
    request: Request, service: RolloutService, body: RolloutTreeRequest
) -> Response:
    """The answer to a request for a stream, once its first node is there.

    Raises:
        RequestError, BusyError, EngineError: as for `RolloutService.rollout_tree`, before the first node.
        ClientGoneError: the client went away before it.
    """
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    sent: set[str] = set()
    tokens = service.tokens if body.return_text else None

    def tell(path: Path, branch: Branch) -> None:
        line = branch_line(path, branch, tokens)
        sent.add(line.key)
        lines.put_nowait(dump(line))

    def begun_anew(version: int) -> None:
        while not lines.empty():
            lines.get_nowait()  # nobody has read them, and nobody needs to
        sent.clear()
        lines.put_nowait(dump(RestartLine(version=version)))

    async def whole() -> RolloutTreeResponse:
        tree = await service.rollout_tree(body, Teller(tell, begun_anew), caller=caller(request))
        return for_caller(request, tree)

    tree = asyncio.ensure_future(whole())
    tree.add_done_callback(lambda _: lines.put_nowait(None))  # behind the last node
    try:
        first = await while_connected(request, lines.get())
        if first is None:
            tree.result()  # what was refused is raised here
    except BaseException:
        tree.cancel()
        await asyncio.gather(tree, return_exceptions=True)
        raise
    zstd = wants_zstd(", ".join(request.headers.getlist("accept-encoding")))
    answer = _lines(first, lines, tree, sent, body.request_id)
    return _TreeStream(service.status, tree, answer, zstd)


class _TreeStream(StreamingResponse):
    """Lines of a tree, which is given up when its answer is over, however that comes.

    The lines themselves cannot see to it: a client that goes away before the first one is asked for, or while one
    is being sent, never comes back to them.
    """

    def __init__(
        self,
        status: Status,
        tree: "asyncio.Future[RolloutTreeResponse]",
        lines: AsyncGenerator[str, None],
        zstd: bool,
    ) -> None:
        headers = {"Vary": "Accept, Accept-Encoding"} | (
            {"Content-Encoding": "zstd"} if zstd else {}
        )
        self._pieces = compressed(lines) if zstd else None
        super().__init__(self._pieces or lines, media_type=MediaType.NDJSON, headers=headers)
        self._tree = tree
        self._lines = lines
        # From here on: between its handler's end and its first line no drain may think that nobody is answered.
        self._answering = contextlib.ExitStack()
        self._answering.enter_context(status.answering())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._answering:
            try:
                await super().__call__(scope, receive, send)
            finally:
                self._tree.cancel()
                await asyncio.gather(self._tree, return_exceptions=True)
                if self._pieces is not None:
                    await self._pieces.aclose()
                await self._lines.aclose()


async def compressed(pieces: AsyncIterator[str]) -> AsyncGenerator[bytes, None]:
    """One zstd frame, of which every piece can be read as soon as it is there."""
    frame = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    async for piece in pieces:
        yield frame.compress(piece.encode()) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    yield frame.flush()


async def _lines(
    first: str | None,
    lines: asyncio.Queue[str | None],
    tree: "asyncio.Future[RolloutTreeResponse]",
    sent: set[str],
    request_id: str | None,
) -> AsyncGenerator[str, None]:
    """The lines: those that come until None does, and the end. What is there at one moment goes in one piece."""
    line = first
    while line is not None:
        piece = [line]
        while not lines.empty() and (line := lines.get_nowait()) is not None:
            piece.append(line)
        yield "".join(piece)
        if line is not None:
            line = await lines.get()
    yield _end(tree, sent, request_id)


def _end(
    tree: "asyncio.Future[RolloutTreeResponse]", sent: set[str], request_id: str | None
) -> str:
    """What is left to say: nodes that there was no news of, and the last line."""
    try:
        whole = tree.result()
    except SpokeError as error:
        return dump(ErrorLine(problem=_problem(error, request_id)))
    except Exception:  # the stream's edge: its reader gets a line and we get the traceback
        log.exception("a tree that was streamed failed")
        title, detail = (
            "Unexpected error",
            "an unexpected error; the server's log has the traceback",
        )
        problem = Problem(title=title, status=500, detail=detail, request_id=request_id)
        return dump(ErrorLine(problem=problem))
    keys = node_keys([node.parent for node in whole.nodes])
    rest = [
        dump(node_line(node, key))
        for node, key in zip(whole.nodes, keys, strict=True)
        if key not in sent
    ]
    return "".join([*rest, dump(tree_line(whole, keys))])


def _problem(error: SpokeError, request_id: str | None) -> Problem:
    status = error.status if isinstance(error, RequestError | BusyError) else 503
    field = error.field if isinstance(error, RequestError) else None
    return Problem(
        title="The tree failed",
        status=status,
        detail=str(error),
        field=field,
        request_id=request_id,
    )
