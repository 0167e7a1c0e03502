"""Reading an answer: a whole tree in packed form or in JSON, or its nodes as they finish."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import httpx

from shared.codec import decode
from shared.errors import RequestError, TreeError
from shared.media import MediaType
from shared.stream import Assembler, NodeLine, RestartLine, node_keys, node_line
from shared.wire import Problem, RolloutTreeResponse
from trainer.client.resume import Kept

OnNode = Callable[[NodeLine], None]
"""Called with a node that has finished; `key` names it: positions among siblings, from the prompt."""


class CallbackError(Exception):
    """Wraps what the caller's `on_node` raised, so that it is not taken for the server's failure."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class StreamedError(Exception):
    """A stream said that there will be no tree, after its status had said 200."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(str(error))
        self.problem = Problem(
            title="", status=error.status, detail=error.detail, field=error.field
        )


@dataclass(slots=True, kw_only=True)
class Listener:
    """Who wants to know of the nodes of one tree before it is whole, over all its attempts."""

    on_node: OnNode | None
    kept: Kept | None
    """Keeps them for the next attempt; None where nobody could use them."""
    pieces: int = 0
    """That have come so far."""

    def node(self, node: NodeLine) -> None:
        """Take a node that has finished.

        Raises:
            CallbackError: `on_node` raised.
        """
        if self.kept is not None:
            self.kept.add(node)
        if self.on_node is not None:
            try:
                self.on_node(node)
            except (
                Exception
            ) as error:  # the caller's, of any kind; `rollout_tree` raises it as it was
                raise CallbackError(error) from error

    def begun_anew(self) -> None:
        """Forget all nodes."""
        if self.kept is not None:
            self.kept.forget()


def accepts(listener: Listener) -> str:
    """The `Accept` header; a server that knows neither form answers in JSON."""
    whole = listener.on_node is None and listener.kept is None
    media = MediaType.MSGPACK if whole else MediaType.NDJSON
    return f"{media}, {MediaType.JSON};q=0.5"


async def read_tree(answer: httpx.Response, listener: Listener) -> RolloutTreeResponse:
    """The tree in an answer with status 200, whose body has not been read.

    Args:
        answer: in whichever form its `Content-Type` says; JSON where that is none of ours.
        listener: told of each node, at the end where the answer is whole.

    Raises:
        TreeError: there is no tree in it, or it ends too early; TreeTooLargeError if it is more than LIMIT_BYTES.
        CallbackError: `on_node` raised.
        StreamedError: a stream says that there will be no tree.
        httpx.RequestError: the connection broke, or the bytes are not in their `Content-Encoding`.
    """
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == MediaType.NDJSON:
        return await _assembled(answer, listener)
    media = MediaType.MSGPACK if kind == MediaType.MSGPACK else MediaType.JSON
    tree = decode(await answer.aread(), media)
    if listener.on_node is not None:
        keys = node_keys([node.parent for node in tree.nodes])
        for node, key in zip(tree.nodes, keys, strict=True):
            listener.node(node_line(node, key))
    return tree


async def _assembled(answer: httpx.Response, listener: Listener) -> RolloutTreeResponse:
    assembler = Assembler()
    async for line in lines(answer.aiter_bytes()):
        listener.pieces += 1
        try:
            found = assembler.feed(line)
        except RequestError as error:
            raise StreamedError(error) from None
        if isinstance(found, RolloutTreeResponse):
            return found
        if isinstance(found, RestartLine):
            listener.begun_anew()
        else:
            listener.node(found)
    raise TreeError("the stream ended before the tree's last line")


async def lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    r"""Lines of a body that comes in pieces, cut at "\n" alone, and without it.

    httpx's own lines end at every separator that Unicode has, and text in JSON may hold some of them.
    """
    parts: list[bytes] = []
    async for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for line in ended:
            yield b"".join([*parts, line])
            parts = []
        parts.append(rest)
    if last := b"".join(parts):
        yield last
