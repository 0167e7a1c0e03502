"""The same request id and body gives the same tree, sampled once; another body is a conflict."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from shared.errors import RequestError

T = TypeVar("T")


class OnlyOnce(Generic[T]):
    """Results by request id, also while the first is still being made.

    Args:
        keep_s: seconds that a finished result is kept.
        keep_most: most results kept; the oldest go first.
    """

    def __init__(self, *, keep_s: float = 300.0, keep_most: int = 256) -> None:
        self._keep_s = keep_s
        self._keep_most = keep_most
        self._entries: OrderedDict[str, tuple[float, str, asyncio.Task[T]]] = OrderedDict()

    async def get(self, request_id: str, body_digest: str, make: Callable[[], Awaitable[T]]) -> T:
        """The result of `make` for this id: made now, being made, or kept.

        A failure is not kept: the same id may be tried again.

        Raises:
            RequestError: (409) the id came with another body.
        """
        self._forget_old()
        entry = self._entries.get(request_id)
        if entry is None:
            task = asyncio.ensure_future(_run(make))
            self._entries[request_id] = (time.monotonic(), body_digest, task)
            task.add_done_callback(lambda done: self._drop_failure(request_id, done))
        else:
            task = entry[2]
            if entry[1] != body_digest:
                raise RequestError(
                    "request_id",
                    f"{request_id!r} was used with another body; use a new id for a new request",
                    status=409,
                )
        # Shielded: one caller that goes away must not take the tree from another that waits for it.
        return await asyncio.shield(task)

    def _drop_failure(self, request_id: str, task: "asyncio.Task[T]") -> None:
        entry = self._entries.get(request_id)
        if (
            entry is not None
            and entry[2] is task
            and (task.cancelled() or task.exception() is not None)
        ):
            del self._entries[request_id]

    def _forget_old(self) -> None:
        limit = time.monotonic() - self._keep_s
        done = [
            key for key, (since, _, task) in self._entries.items() if task.done() and since < limit
        ]
        finished = [key for key, (_, _, task) in self._entries.items() if task.done()]
        overflow = finished[: max(0, len(self._entries) + 1 - self._keep_most)]
        for key in {*done, *overflow}:
            del self._entries[key]


async def _run(make: Callable[[], Awaitable[T]]) -> T:
    return await make()
