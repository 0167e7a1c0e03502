"""Work in a thread that nobody waits for when the process ends."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_daemon_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a call that may hang, such as one to a store that is away.

    `asyncio.to_thread` would keep the process alive until the call ends. Cancelling leaves the call behind.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T allows it

    def work() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = (call(*args, **kwargs), None)
        except (
            BaseException
        ) as error:  # edge of the thread: whatever was raised belongs to the caller
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="spoke-work", daemon=True).start()
    return await future
