"""Calls into vLLM's process, none of which waits for one that is gone or given up."""

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from server.engines.vllm_start import AsyncLLM, VLLMClientError
from shared.errors import EngineError, RequestError, SpokeError
from shared.threads import in_daemon_thread, leave_children

T = TypeVar("T")

KILLED_SECONDS = 10.0
"""How long a process that was killed may take to be gone."""


class VllmProcess:
    """One vLLM, from its start to its end.

    Args:
        llm: vLLM's face in this process; belongs to the running event loop.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._opened: AsyncLLM | None = llm
        if llm.output_handler is None:  # it was made in a thread without a loop
            llm._run_output_handler()
        self._fault: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def llm(self) -> AsyncLLM:
        """vLLM itself.

        Raises:
            EngineError: it was closed.
        """
        if self._opened is None:
            raise EngineError("the engine is closed")
        return self._opened

    @property
    def is_open(self) -> bool:
        """Was it not closed yet?"""
        return self._opened is not None

    async def ask(self, method: str, *args: object) -> Any:  # noqa: ANN401 - what the method returns
        """The one worker's answer to a method of `vllm_worker.WeightLoader`."""
        return (await self.while_alive(self.llm.collective_rpc(method, args=args)))[0]

    async def while_alive(self, call: Awaitable[T]) -> T:
        """The answer to a call, or an error once vLLM's process is gone: many calls would wait for ever then.

        Raises:
            EngineError: it is gone, or was given up.
        """
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait({task, *self._ends()}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._why()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def give_up(self, reason: str) -> EngineError:
        """Answer nothing from now on: the model's state is not known. Returns the error that all calls raise."""
        if not self._fault.done():
            self._fault.set_result(reason)
        return self._why()

    async def died(self) -> EngineError:
        """Wait until vLLM's process is gone or given up; returns why."""
        await asyncio.wait(self._ends(), return_when=asyncio.FIRST_COMPLETED)
        return self._why()

    async def close(self) -> None:
        """End vLLM's process and its task on this loop. A second call does nothing."""
        # Dropped here and not with this object: vLLM's destructor fails where it runs at the interpreter's end.
        llm, self._opened = self._opened, None
        if llm is None:
            return
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # which ends what still waits for an answer
        context = llm.engine_core.resources.ctx
        await in_daemon_thread(
            _shut_down, llm
        )  # which a process that nothing ends may hold up for ever
        await asyncio.sleep(0)  # the closing of its sockets was put on this loop
        context.destroy(linger=0)  # ZeroMQ's threads, which vLLM leaves

    def _ends(self) -> set[asyncio.Future[Any]]:
        """What is done once vLLM answers no more."""
        reader = self.llm.output_handler  # ends with the process
        assert reader is not None, "vLLM reads its process from the first moment on this loop"
        return {reader, self._fault}

    def _why(self) -> EngineError:
        return EngineError(self._fault.result() if self._fault.done() else "vLLM's process is gone")


def _shut_down(llm: AsyncLLM) -> None:
    manager = llm.engine_core.resources.engine_manager
    llm.shutdown()
    for process in manager.processes if manager else ():
        wait_killed(
            process
        )  # vLLM kills one that takes longer than 5 s, and does not wait for its end


def wait_killed(process: BaseProcess) -> None:
    """Wait until a process that was killed is gone; one that is not, in time, is left behind."""
    # Not `is_alive`: where vLLM's own thread has just taken the exit code it says yes, of a process that is gone.
    if not connection.wait([process.sentinel], KILLED_SECONDS):
        leave_children()


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Turn what vLLM raises into errors of ours."""
    try:
        yield
    except (SpokeError, TimeoutError):
        raise
    except VLLMClientError as error:
        raise RequestError("sampling", str(error)) from error
    except Exception as error:  # vLLM's process sends its errors as bare Exceptions
        raise EngineError(f"vLLM failed: {error}") from error
