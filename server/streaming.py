"""A tree as `application/x-ndjson`: each node's line as it finishes, then the tree's (`shared/stream.py`).

Whatever is refused is refused before the first line, by a status of its own; what fails later ends the stream with
an error's line. A reader that is slow holds up nobody: its lines wait, at most a tree of them.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.answer import branch_line
from server.auth import caller
from server.branches import Branch
from server.connection import ClientGoneError, gone
from server.details import for_caller
from server.sampler import Path
from server.service import RolloutService
from shared.codec import MediaType
from shared.errors import BusyError, RequestError, SpokeError
from shared.stream import ErrorLine, dump, node_keys, node_line, tree_line
from shared.wire import Problem, RolloutTreeRequest, RolloutTreeResponse


async def node_stream(
    request: Request, service: RolloutService, body: RolloutTreeRequest
) -> Response:
    """The answer to a request for a stream, once its first node is there.

    Raises:
        RequestError, BusyError, EngineError: as for `RolloutService.rollout_tree`, before the first node.
        ClientGoneError: the client went away before it.
    """
    lines: asyncio.Queue[str] = asyncio.Queue()
    sent: set[str] = set()
    tokens = service.tokens if body.return_text else None

    def tell(path: Path, branch: Branch) -> None:
        line = branch_line(path, branch, tokens)
        sent.add(line.key)
        lines.put_nowait(dump(line))

    async def whole() -> RolloutTreeResponse:
        return for_caller(request, await service.rollout_tree(body, tell, caller=caller(request)))

    tree = asyncio.ensure_future(whole())
    first = asyncio.ensure_future(lines.get())
    away = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({tree, first, away}, return_when=asyncio.FIRST_COMPLETED)
        if tree.done():
            tree.result()  # what was refused is raised here
        elif not first.done():
            raise ClientGoneError
    except BaseException:
        tree.cancel()
        await asyncio.wait({tree})
        raise
    finally:
        away.cancel()
        if not first.done():
            first.cancel()
    begun = first.result() if first.done() and not first.cancelled() else ""
    return _TreeStream(tree, _lines(service, tree, begun, lines, sent))


class _TreeStream(StreamingResponse):
    """Lines of a tree, which is given up when its answer is over, however that comes.

    The lines themselves cannot see to it: a client that goes away before the first one is asked for, or while one
    is being sent, never comes back to them.
    """

    def __init__(
        self, tree: "asyncio.Future[RolloutTreeResponse]", lines: AsyncGenerator[str, None]
    ) -> None:
        super().__init__(lines, media_type=MediaType.NDJSON, headers={"Vary": "Accept"})
        self._tree = tree
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._tree.cancel()
            await asyncio.gather(self._tree, return_exceptions=True)
            await (
                self._lines.aclose()
            )  # else it waits for the garbage collector, and counts as answering


async def _lines(
    service: RolloutService,
    tree: "asyncio.Future[RolloutTreeResponse]",
    begun: str,
    lines: asyncio.Queue[str],
    sent: set[str],
) -> AsyncGenerator[str, None]:
    """The lines."""
    with service.status.answering():
        waiting = asyncio.ensure_future(lines.get())
        try:
            if begun:
                yield begun
            while not tree.done():
                both: set[asyncio.Future[Any]] = {tree, waiting}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    yield waiting.result()
                    waiting = asyncio.ensure_future(lines.get())
            if waiting.done():
                yield waiting.result()
            waiting.cancel()  # it would take lines from what follows
            while not lines.empty():
                yield lines.get_nowait()
            yield _end(tree, sent)
        finally:
            waiting.cancel()


def _end(tree: "asyncio.Future[RolloutTreeResponse]", sent: set[str]) -> str:
    """What is left to say: nodes that there was no news of, and the last line."""
    try:
        whole = tree.result()
    except SpokeError as error:
        return dump(ErrorLine(problem=_problem(error)))
    keys = node_keys([node.parent for node in whole.nodes])
    rest = [
        dump(node_line(node, key))
        for node, key in zip(whole.nodes, keys, strict=True)
        if key not in sent
    ]
    return "".join([*rest, dump(tree_line(whole, keys))])


def _problem(error: SpokeError) -> Problem:
    status = error.status if isinstance(error, RequestError | BusyError) else 503
    field = error.field if isinstance(error, RequestError) else None
    return Problem(title="The tree failed", status=status, detail=str(error), field=field)
