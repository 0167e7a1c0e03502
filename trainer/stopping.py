"""A run that is told to end: Ctrl-C, or SIGTERM as Docker, Slurm and systemd send it.

The first one lets what computes end (an update, a publication), gives up what only waits or samples, and a
checkpoint is made. The next one acts as if nobody listened here: the run ends at once.
"""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import TypeVar

from shared.errors import SpokeError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(SpokeError):
    """The run ended because it was told to."""

    def __init__(self) -> None:
        super().__init__("stopped, as it was told to")


class Stop:
    """Whether the run was told to end."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Tell the run to end."""
        self._asked.set()

    async def unless(self, work: Awaitable[T]) -> T:
        """The result of something that may be given up at any time.

        Raises:
            StoppedError: the run is to end before that is done, which is cancelled then.
        """
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise StoppedError
            return task.result()
        finally:
            asked.cancel()
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # known, or too late to matter

    @contextlib.contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Be asked by the first signal that comes in the block; none comes outside of the main thread.

        Args:
            say: told of the signal.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        former = {number: signal.getsignal(number) for number in SIGNALS}

        def restore() -> None:
            for number in SIGNALS:
                if loop.remove_signal_handler(number):
                    signal.signal(number, former[number] or signal.SIG_DFL)

        def first(number: signal.Signals) -> None:
            restore()  # for the next one
            self.ask()
            say(
                f"{number.name}: the run stops with a checkpoint, once what it computes is done; another one "
                "ends it at once"
            )

        for number in SIGNALS:
            loop.add_signal_handler(number, first, number)
        try:
            yield
        finally:
            restore()


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C in the block, so that children are ended, and a lease is given back."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
