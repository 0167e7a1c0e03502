"""The worker processes of one reward function: started, replaced when broken, ended.

They are spawned, not forked, because the server holds threads (torch, vLLM, uvicorn); so each one imports the
server's `__main__` again, which must import lazily. A worker that dies or is killed is replaced by pebble; a pool
that pebble gives up on is replaced here.
"""

import asyncio
import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from pebble import ProcessExpired, ProcessPool

from server.rewards import worker
from server.rewards.base import Grade, Refusal
from shared.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

START_LIMIT_S = 120.0
"""How long loading a function may take, in seconds: sympy takes three on a free core, far more on a busy one."""

GRACE_S = 0.5
"""How long after its alarm a leaf may go on before its process is killed, in seconds."""


class LeafError(Exception):
    """A task that brought its process down, or would not end; the message is for `reward_error`."""


class BrokenPoolError(Exception):
    """The processes went away under a task that may be blameless; it may be tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a reward function may use."""

    workers: int
    """Processes of each function."""
    timeout_s: float
    """Seconds of one leaf."""
    memory_bytes: int | None
    """Address space of a process; None for no bound."""


@dataclass(slots=True, kw_only=True)
class _Generation:
    """One pebble pool, and the tasks that it owes an answer."""

    pool: ProcessPool
    tasks: set[Future[Any]] = field(default_factory=set)
    retired: bool = False


class Processes:
    """Worker processes that hold one reward function."""

    def __init__(self, target: str, limits: Limits) -> None:
        self._target = target
        self._limits = limits
        self._generation: _Generation | None = None
        self._changing = threading.Lock()
        self._closed = False

    async def start(self) -> None:
        """Start what does not run, and wait until every process has loaded the function.

        Raises:
            ConfigError: the function cannot be loaded.
            BrokenPoolError: `close` was called.
        """
        generation = self._generation
        if generation is None or not generation.pool.active:
            await asyncio.to_thread(self._start)

    async def grade(
        self, responses: tuple[str, ...], reference: str, options: dict[str, Any]
    ) -> list[Grade] | Refusal:
        """Grade the first leaves of a batch, as `worker.grade_batch` does, under a hard limit.

        Raises:
            LeafError: one of the leaves killed its process or did not end in time.
            BrokenPoolError: the processes went away; call `start` and try again.
        """
        limit = self._limits.timeout_s
        return await self._run(
            limit + worker.TURN_S + GRACE_S,
            worker.grade_batch,
            responses,
            reference,
            options,
            limit,
        )

    async def close(self) -> None:
        """End every process; tasks that run fail with BrokenPoolError."""
        await asyncio.to_thread(self._close)

    def _start(self) -> None:
        with self._changing:
            if self._closed:
                raise BrokenPoolError("the reward pool is closed")
            if self._generation is not None and not self._generation.pool.active:
                _retire(self._generation)
                self._generation = None
            if self._generation is None:
                self._generation = _launch(self._target, self._limits)

    def _close(self) -> None:
        with self._changing:
            self._closed = True
            if self._generation is not None:
                _retire(self._generation)
                self._generation = None

    async def _run(
        self, hard_limit_s: float, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        generation = self._generation
        if generation is None:
            raise BrokenPoolError("the reward processes are not running")
        try:
            task = generation.pool.schedule(call, args, kwargs, timeout=hard_limit_s)
        except RuntimeError as error:  # pebble's word for a pool that is stopped or broken
            raise BrokenPoolError(str(error)) from error
        generation.tasks.add(task)
        task.add_done_callback(generation.tasks.discard)
        if generation.retired:  # between the two lines above
            _fail(task)
        try:
            # Shielded: a client that goes away must not cost a process, and the task is short anyway.
            return await asyncio.shield(asyncio.wrap_future(task))
        except TimeoutError as error:
            raise LeafError(worker.too_slow(self._limits.timeout_s)) from error
        except ProcessExpired as error:
            raise LeafError(f"its process died ({_cause_of_death(error.exitcode)})") from error
        except BrokenProcessPool as error:
            raise BrokenPoolError(str(error)) from error


def _launch(target: str, limits: Limits) -> _Generation:
    """Start processes and wait until each has loaded the function."""
    context = multiprocessing.get_context("spawn")
    loaded = context.Semaphore(0)
    pool = ProcessPool(
        max_workers=limits.workers,
        initializer=worker.initialize,
        initargs=(target, limits.memory_bytes, loaded),
        context=context,
    )
    give_up = time.monotonic() + START_LIMIT_S
    waiting, error = limits.workers, None
    while waiting and error is None:
        if not pool.active:  # asking also starts a new pool
            error = "its process dies while loading it"
        elif time.monotonic() > give_up:
            error = f"loading it takes longer than {START_LIMIT_S:g} s"
        elif loaded.acquire(timeout=0.1):
            waiting -= 1
    error = error or pool.schedule(worker.load_error).result(timeout=START_LIMIT_S)
    generation = _Generation(pool=pool)
    if error is not None:
        _retire(generation)
        raise ConfigError(f"reward function {target} cannot be used: {error}")
    return generation


def _retire(generation: _Generation) -> None:
    """Stop the pool and answer for it: pebble leaves the tasks of a stopped pool without a result."""
    stop: Callable[[], None] = generation.pool.stop  # pebble leaves it without a return type
    stop()
    generation.pool.join()
    generation.retired = True
    for task in list(generation.tasks):
        _fail(task)


def _fail(task: Future[Any]) -> None:
    with contextlib.suppress(InvalidStateError):  # it has its answer
        task.set_exception(BrokenProcessPool("the reward processes were stopped"))


def _cause_of_death(exitcode: int) -> str:
    """What a negative or positive exit code says.

    >>> _cause_of_death(-9), _cause_of_death(3)
    ('SIGKILL', 'exit code 3')
    """
    if exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"
