"""A run that is told to end: Ctrl-C, or SIGTERM as Docker, Slurm and systemd send it.

The first one lets an update end, gives up what samples or waits, and a checkpoint is made. The next one acts as if
nobody listened here: the run ends without.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

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

    async def unless(self, work: Coroutine[Any, Any, T], *, grace_s: float = 0.0) -> T:
        """The result of something that may be given up at any time.

        Args:
            work: not begun yet; it never is once the run is to end, unless it has some time.
            grace_s: that it has to end once the run is to.

        Raises:
            StoppedError: the run is to end before that is done, which is cancelled then.
        """
        if self._asked.is_set() and not grace_s:
            work.close()
            raise StoppedError
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and grace_s:
                await asyncio.wait({task}, timeout=grace_s)
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
        """Be asked by the first signal that comes in the block, in the main thread; one block at a time.

        Args:
            say: told of the signal.
        """
        loop = asyncio.get_running_loop()
        former = {number: signal.getsignal(number) for number in SIGNALS}
        # A shell has its background jobs ignore Ctrl-C.
        ours = [number for number in SIGNALS if former[number] is not signal.SIG_IGN]

        def restore() -> None:
            for number in ours:
                if loop.remove_signal_handler(number):
                    signal.signal(number, former[number] or signal.SIG_DFL)

        def first(number: signal.Signals) -> None:
            restore()  # for the next one
            self.ask()
            say(
                f"{number.name}: the run stops with a checkpoint, after the update that is under way, if one is; "
                "another signal stops it without"
            )

        for number in ours:
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
