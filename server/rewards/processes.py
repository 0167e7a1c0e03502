"""The worker processes of one reward function: leaves shared out among them, and those replaced that a leaf cost.

Leaves go out in batches: a message costs about as much of the server's own interpreter as grading several leaves.
What a process died of is the first leaf without a grade; every other keeps or gets its reward.
"""

import asyncio
import contextlib
import math
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from server.rewards.base import Grade, Stats, failed
from server.rewards.limits import Limits
from server.rewards.process import GoneError, Process
from shared.errors import ConfigError

T = TypeVar("T")

BATCH = 32
"""Most leaves of one message."""

ATTEMPTS = 3
"""How often a leaf is tried when processes go away before they took it up, or cannot be started."""

CLOSED = "the reward pool is closed"


@dataclass(slots=True, eq=False)
class _Slot:
    process: Process | None = None


class Processes:
    """Worker processes that hold one reward function; a `Grader`.

    Args:
        target: `package.module:function`.
        limits: of each process.
        stats: where replaced processes are counted.
    """

    def __init__(self, target: str, limits: Limits, stats: Stats) -> None:
        self._target = target
        self._limits = limits
        self._stats = stats
        self._slots = [_Slot() for _ in range(limits.workers)]
        self._idle: asyncio.LifoQueue[_Slot] = asyncio.LifoQueue()
        for slot in self._slots:
            self._idle.put_nowait(slot)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starting = asyncio.Lock()
        self._started = False
        self._closed = False

    async def start(self) -> None:
        """Start every process and wait until each has loaded the function; once.

        Raises:
            ConfigError: the function cannot be loaded; no process is left then.
        """
        async with self._starting:
            if self._started or self._closed:
                return
            begun = (self._start(slot) for slot in self._slots)
            for outcome in await asyncio.gather(*begun, return_exceptions=True):
                if outcome is not None:
                    await self._end_all()
                    raise outcome
            self._started = True

    async def check(self, reference: str, options: Mapping[str, Any]) -> None:
        """Grade an empty response: what else goes wrong with that is no reason to refuse.

        Raises:
            RequestError: the function refuses the reference or the options.
        """
        await self.grade(("",), reference, options)

    async def grade(
        self, responses: Sequence[str], reference: str, options: Mapping[str, Any]
    ) -> list[Grade]:
        """Grade responses to one question.

        Raises:
            RequestError: the function refuses the reference or the options.
        """
        size = min(BATCH, max(1, math.ceil(len(responses) / self._limits.workers)))
        batches = [tuple(responses[at : at + size]) for at in range(0, len(responses), size)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._batch(batch, reference, dict(options)))
                    for batch in batches
                ]
        except ExceptionGroup as refusals:  # the other batches have left the line
            raise refusals.exceptions[0] from None
        return [grade for task in tasks for grade in task.result()]

    async def close(self) -> None:
        """End every process; leaves that are being graded get an error."""
        self._closed = True
        await self._end_all()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end_all()  # one that was being started meanwhile

    async def _batch(
        self, batch: tuple[str, ...], reference: str, options: dict[str, Any]
    ) -> list[Grade]:
        grades: list[Grade] = []
        while len(grades) < len(batch):
            slot = await self._idle.get()  # a client that goes away leaves the line
            turn = self._spawn(self._turn(slot, batch[len(grades) :], reference, options))
            # Shielded: from here on it would cost a process, and a turn is short anyway.
            grades += await asyncio.shield(turn)
        return grades

    async def _turn(
        self, slot: _Slot, rest: tuple[str, ...], reference: str, options: dict[str, Any]
    ) -> list[Grade]:
        """Grades of the first leaves of `rest`, at least one; the slot is handed on after it."""
        reason = ""
        try:
            for _ in range(ATTEMPTS):
                try:
                    process = await self._running(slot)
                    grades = await process.grade(rest, reference, options)
                except (GoneError, ConfigError) as error:
                    grades, reason = [], str(error)
                if self._closed:
                    return [failed(CLOSED)]
                if grades:
                    return grades
            return [failed(reason or "its process cannot be kept running")]
        finally:
            self._spawn(self._release(slot))

    async def _release(self, slot: _Slot) -> None:
        """Hand a slot on when it has a process again, so that no leaf waits for a start while others are free."""
        try:
            with contextlib.suppress(
                ConfigError
            ):  # whoever takes the slot tries again, and says so
                await self._running(slot)
        finally:  # a slot that is lost is missed for ever
            self._idle.put_nowait(slot)

    async def _running(self, slot: _Slot) -> Process:
        if slot.process is None or not slot.process.alive:
            await self._start(slot)
        assert slot.process is not None, "just started"
        return slot.process

    async def _start(self, slot: _Slot) -> None:
        if self._closed:
            raise ConfigError(CLOSED)
        if slot.process is not None:
            await slot.process.end()
            slot.process = None
            self._stats.restarts += 1
        slot.process = await Process.start(self._target, self._limits)

    async def _end_all(self) -> None:
        processes = [slot.process for slot in self._slots if slot.process is not None]
        await asyncio.gather(*(process.end() for process in processes))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
