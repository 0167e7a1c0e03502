"""Starts vLLM beside the event loop, which goes on answering: a large model takes minutes.

vLLM's constructor blocks until the model is loaded, so it runs in a thread of its own. The processes that it makes
are started by the loop's thread all the same, while the constructor waits for that: a fork then finds the other
thread at one known place, with no lock in its hands, and `PR_SET_PDEATHSIG` (`vllm_child`), which takes a process
along with the *thread* that started it, with the one that lives as long as this process.
"""

import asyncio
import concurrent.futures
import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from server.engines import vllm_start
from server.engines.base import EngineInfo
from server.engines.settings import EngineSettings
from server.engines.vllm_process import VllmProcess, wait_killed
from server.engines.vllm_start import AsyncLLM
from shared.errors import EngineError
from shared.threads import in_daemon_thread

GIVEN_UP_SECONDS = 5.0
"""How long vLLM's constructor may take to end once its processes were killed."""


class Launch:
    """One start of vLLM, of the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._processes: set[BaseProcess] = set()
        self._given_up = False

    async def start(self, settings: EngineSettings) -> tuple[AsyncLLM, EngineInfo]:
        """vLLM, its model loaded. Cancelling kills what was started; an import under way is left to its end.

        Raises:
            ConfigError: no such checkpoint, device, number format or limit.
            Exception: whatever vLLM raises when it starts.
        """
        starting = asyncio.ensure_future(
            in_daemon_thread(vllm_start.start, settings, self._by_the_loop)
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await self._give_up(starting)
            raise

    async def _give_up(self, starting: asyncio.Future[tuple[AsyncLLM, EngineInfo]]) -> None:
        self._given_up = True
        for process in self._processes:
            process.kill()  # which vLLM's constructor notices
        if self._processes:
            await asyncio.wait({starting}, timeout=GIVEN_UP_SECONDS)
        for process in self._processes:
            await in_daemon_thread(wait_killed, process)
        if not starting.done():
            starting.cancel()
        elif starting.exception() is None:
            await VllmProcess(starting.result()[0]).close()

    def _by_the_loop(self, start_processes: Callable[[], None]) -> None:
        """Start vLLM's processes in the loop's thread; called in the other one, which waits.

        Raises:
            EngineError: this start was given up.
        """
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def now() -> None:
            before = set(multiprocessing.active_children())
            try:
                if self._given_up:
                    raise EngineError("vLLM's start was given up")
                start_processes()
            except BaseException as error:  # edge of the thread: it belongs to the one that waits
                done.set_exception(error)
            else:
                done.set_result(None)
            self._processes = set(multiprocessing.active_children()) - before

        self._loop.call_soon_threadsafe(now)
        done.result()
