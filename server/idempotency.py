"""The same request id and body of one caller gives the same tree, sampled once; another body is a conflict."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shared.errors import RequestError

T = TypeVar("T")


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry(Generic[T]):
    body_digest: str
    task: asyncio.Task[T]
    callers: int = 0
    """That wait for it now."""
    size: int = 0
    """Bytes, once it is finished."""
    finished: float | None = None
    """On the monotonic clock."""


@dataclass(slots=True, kw_only=True)
class OnlyOnce(Generic[T]):
    """Results by caller and request id, also while the first is still being made.

    Args:
        size: bytes of a result, roughly.
        keep_s: seconds that a finished result is kept.
        keep_most: most results kept; the oldest go first.
        keep_bytes: most bytes of results kept, likewise.
    """

    size: Callable[[T], int]
    keep_s: float = 300.0
    keep_most: int = 256
    keep_bytes: int = 256 << 20
    _entries: dict[tuple[str, str], _Entry[T]] = field(default_factory=dict)

    def __contains__(self, key: object) -> bool:
        """Is there a result for this (caller, request id), or one on its way?"""
        return key in self._entries

    async def get(
        self, request_id: str, body_digest: str, make: Callable[[], Awaitable[T]], caller: str = ""
    ) -> T:
        """The result of `make` for this caller's id: made now, being made, or kept.

        A failure is not kept: the same id may be tried again. Callers may come and go; when the last one that
        waits has gone, what it waited for is cancelled.

        Raises:
            RequestError: (409) the id came with another body.
        """
        self._forget()
        key = (caller, request_id)
        entry = self._entries.get(key)
        if entry is None:
            entry = _Entry(body_digest=body_digest, task=asyncio.ensure_future(_run(make)))
            self._entries[key] = entry
            entry.task.add_done_callback(lambda _: self._finished(key, entry))
        elif entry.body_digest != body_digest:
            raise RequestError(
                "request_id",
                f"{request_id!r} was used with another body; use a new id for a new request",
                status=409,
            )
        entry.callers += 1
        try:
            # Shielded: one caller that goes away must not take the tree from another that waits for it.
            return await asyncio.shield(entry.task)
        finally:
            entry.callers -= 1
            if entry.callers == 0 and not entry.task.done():
                # Gone from the table at once, so that nobody can join what is being cancelled.
                self._drop(key, entry)
                entry.task.cancel()

    def _finished(self, key: tuple[str, str], entry: _Entry[T]) -> None:
        if entry.task.cancelled() or entry.task.exception() is not None:
            self._drop(key, entry)
            return
        entry.finished, entry.size = time.monotonic(), self.size(entry.task.result())
        self._forget()
        # Also where no other request comes: an idle server keeps nothing for ever.
        asyncio.get_running_loop().call_later(self.keep_s + 1.0, self._forget)

    def _drop(self, key: tuple[str, str], entry: _Entry[T]) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _forget(self) -> None:
        """Drop the results that are too old, and the oldest of those that are too many."""
        now = time.monotonic()
        done = [(key, e) for key, e in self._entries.items() if e.finished is not None]
        done.sort(key=lambda pair: pair[1].finished or 0.0)
        many, large = len(done), sum(entry.size for _, entry in done)
        for key, entry in done:
            old = now - (entry.finished or now) > self.keep_s
            if not (old or many > self.keep_most or large > self.keep_bytes):
                break
            many, large = many - 1, large - entry.size
            del self._entries[key]


async def _run(make: Callable[[], Awaitable[T]]) -> T:
    return await make()
