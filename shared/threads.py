"""Work that nobody waits for when the process ends: in a thread, and in a child process."""

import asyncio
import atexit
import contextlib
import os
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


def leave_children() -> None:
    """Let this process end, with exit code 1, although a child process of `multiprocessing` does not.

    The interpreter would wait for it at its end, for ever where the kernel does not get rid of it, such as one
    that stands in a driver. Of what is registered with `atexit`, what came before this call is not done then.
    """
    atexit.register(os._exit, 1)  # the last one registered is the first one called
