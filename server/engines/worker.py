"""The thread that owns the model: takes commands between two decode steps, sleeps when there is nothing to do."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from server.engines.batch import Batch
from server.engines.jobs import Job
from server.engines.loading import load
from server.engines.model import LanguageModel
from server.engines.settings import EngineSettings
from shared.errors import EngineError, WeightsError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Call:
    """Something to do between two steps, and where its outcome goes."""

    action: Callable[[Batch], Any]
    future: Future[Any]


class Worker:
    """A thread with a model and its batch. Every method may be called from any thread.

    Args:
        settings: of the engine.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.ready: Future[LanguageModel] = Future()
        """The model once it is loaded, or why it cannot be."""
        self.ended: Future[EngineError] = Future()
        """Why the thread samples no more, once that is so."""
        self._settings = settings
        self._commands: SimpleQueue[Job | _Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._ended: str | None = None
        self._cause: BaseException | None = None
        self._batch: Batch | None = None
        self._thread = threading.Thread(target=self._run, name="spoke-engine", daemon=True)
        self._thread.start()

    @property
    def open_sequences(self) -> int:
        """Sequences that run or wait; a command that the thread has not taken yet counts as one."""
        batch = self._batch  # the thread may take it away at any moment
        running = 0 if batch is None else batch.sequences
        return running + self._commands.qsize()

    def submit(self, job: Job) -> None:
        """Sample a job; its future gets the result. Cancelling the future frees its rows.

        Raises:
            EngineError: the thread has ended.
        """
        self._send(job)
        job.future.add_done_callback(lambda future: self._gone(job) if future.cancelled() else None)

    def call(self, action: Callable[[Batch], T]) -> Future[T]:
        """Run an action between two steps.

        Only an EngineError or a WeightsError goes to the caller alone; anything else ends the thread.

        Raises:
            EngineError: the thread has ended.
        """
        future: Future[T] = Future()
        self._send(_Call(action, future))
        return future

    @property
    def progress(self) -> int:
        """Grows while the thread works; see `Batch.progress`."""
        batch = self._batch  # the thread may take it away at any moment
        return 0 if batch is None else batch.progress

    def close(self) -> None:
        """End the thread and wait for it; every request still open fails."""
        self._commands.put(None)
        self._thread.join()

    def _gone(self, job: Job) -> None:
        with self._lock:
            if self._ended is None:
                self._commands.put(_Call(lambda batch: batch.cancel(job), Future()))

    def _send(self, command: Job | _Call) -> None:
        # Under the lock, so that no command slips in behind the last look at the queue.
        with self._lock:
            if self._ended is not None:
                raise EngineError(self._ended) from self._cause
            self._commands.put(command)

    def _run(self) -> None:
        """The thread."""
        reason = "the engine is closed"
        self.ready.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        try:
            with torch.inference_mode():
                # Per thread in OpenMP builds, so it must be set in this one.
                torch.set_num_threads(self._settings.threads)
                model = load(self._settings)
                self._batch = Batch(model, self._settings.max_batch)
                self.ready.set_result(model)
                self._serve(self._batch)
        except BaseException as error:  # edge of the thread: nobody else would see it
            if not self.ready.done():
                self.ready.set_exception(error)
            reason = f"the engine failed: {error!r}; restart the server"
            self._cause = error
        finally:
            self._end(reason)

    def _serve(self, batch: Batch) -> None:
        """Take commands and step, until told to end."""
        while True:
            # Blocks only when there is nothing to sample.
            while not batch.busy or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                if isinstance(command, Job):
                    batch.enqueue(command)
                elif command.future.set_running_or_notify_cancel():
                    _answer(command, batch)
                # A swap's has all weights once more, and the next one may be long in coming.
                del command
            batch.step()

    def _end(self, reason: str) -> None:
        """Fail everything that is open, and everything that comes later."""
        with self._lock:
            self._ended = reason
        error = EngineError(reason)
        error.__cause__ = self._cause
        self.ended.set_result(error)
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.fail(error)
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, Job):
                command.fail(error)
            elif command is not None and command.future.set_running_or_notify_cancel():
                command.future.set_exception(error)


def _answer(call: _Call, batch: Batch) -> None:
    """Run a call; what does not go to the caller alone goes on to end the thread."""
    try:
        call.future.set_result(call.action(batch))
    except (EngineError, WeightsError) as error:
        call.future.set_exception(error)
    except BaseException as error:
        call.future.set_exception(EngineError(f"the engine failed: {error!r}; restart the server"))
        raise
