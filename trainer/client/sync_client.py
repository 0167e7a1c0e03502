"""The same client for programs without an event loop: each call runs on a loop in a thread of the client's own."""

import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from anyio.from_thread import start_blocking_portal

from shared.errors import RequestError
from shared.stream import NodeLine
from shared.wire import RolloutTreeRequest, RolloutTreeResponse
from trainer.client.async_client import AsyncClient
from trainer.client.reading import OnNode
from trainer.client.routing import ListServers

CANCEL_S = 5.0
"""Bound of the wait for a call that was cancelled to be over."""

T = TypeVar("T")


class Client:
    """`AsyncClient` without `await`; threads may share it.

    Whatever ends a call early cancels its requests: Ctrl-C, an error in a callback, a loop that is left. Callbacks
    run in the thread that called.

    Args:
        servers: as for `AsyncClient`, and so are the others.
        token: bearer token; None takes SPOKE_TOKEN.
        timeout_s: bound of one tree.
        concurrency: most trees in flight.
        affinity_slack: see `AsyncClient`.
        reproducible: likewise.
        keep_nodes: likewise.

    Raises (on construction):
        ConfigError: a URL or the token cannot be used.
    """

    def __init__(
        self,
        servers: str | Iterable[str] | ListServers,
        *,
        token: str | None = None,
        timeout_s: float = 600.0,
        concurrency: int = 64,
        affinity_slack: int = 2,
        reproducible: bool = False,
        keep_nodes: bool = False,
    ) -> None:
        self._client = AsyncClient(
            servers,
            token=token,
            timeout_s=timeout_s,
            concurrency=concurrency,
            affinity_slack=affinity_slack,
            reproducible=reproducible,
            keep_nodes=keep_nodes,
        )
        self._stack = contextlib.ExitStack()
        self._portal = self._stack.enter_context(
            start_blocking_portal("asyncio", name="spoke-client")
        )
        self._stack.enter_context(self._portal.wrap_async_context_manager(self._client))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:  # noqa: ANN401  # what a context manager is told
        self._stack.__exit__(*exc)

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._stack.close()

    def rollout_tree(
        self, request: RolloutTreeRequest, *, on_node: OnNode | None = None
    ) -> RolloutTreeResponse:
        """One tree; see `AsyncClient.rollout_tree`."""
        if on_node is None:
            return self._run(lambda: self._client.rollout_tree(request))
        nodes: queue.SimpleQueue[NodeLine | None] = queue.SimpleQueue()
        with self._started(lambda: self._client.rollout_tree(request, on_node=nodes.put)) as answer:
            answer.add_done_callback(lambda _: nodes.put(None))
            while (node := nodes.get()) is not None:
                on_node(node)
            return answer.result()

    def rollout_trees(
        self, requests: Iterable[RolloutTreeRequest], *, concurrency: int = 64
    ) -> Iterator[tuple[int, RolloutTreeResponse | RequestError]]:
        """Many trees, each as it comes; see `AsyncClient.rollout_trees`.

        `requests` is read in the client's thread.
        """
        trees = self._client.rollout_trees(requests, concurrency=concurrency)
        try:
            while (tree := self._run(lambda: anext(trees, None))) is not None:
                yield tree
        finally:
            self._run(trees.aclose)

    def info(self, url: str | None = None) -> dict[str, Any]:
        """What a server says of itself; see `AsyncClient.info`."""
        return self._run(lambda: self._client.info(url))

    def ready(self) -> list[str]:
        """URLs of the servers that would take a request now."""
        return self._run(self._client.ready)

    def _run(self, function: Callable[[], Awaitable[T]]) -> T:
        with self._started(function) as answer:
            return answer.result()

    @contextlib.contextmanager
    def _started(self, function: Callable[[], Awaitable[T]]) -> Iterator[Future[T]]:
        """A call in the client's thread; when the block ends early, the call is cancelled and over."""
        over = threading.Event()

        async def watched() -> T:
            try:
                return await function()
            finally:
                over.set()

        future = self._portal.start_task_soon(watched)
        try:
            yield future
        finally:
            if future.cancel():
                over.wait(CANCEL_S)
