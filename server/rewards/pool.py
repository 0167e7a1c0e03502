"""Grades the leaves of trees in worker processes, off the event loop.

Leaves go to the processes in batches: a message costs about 0.2 ms of the server's own interpreter (1 ms while
the event loop is busy), which a short reward would pay many times over. A batch that fails as a whole is graded
again leaf by leaf, so that only the leaf at fault loses its reward.
"""

import asyncio
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.rewards.base import Grade, Refusal
from server.rewards.processes import BrokenPoolError, LeafError, Limits, Processes
from server.rewards.registry import SLOW_TO_LOAD, look_up, reward_targets
from shared.errors import ConfigError, RequestError

BATCH = 32
"""Most leaves of one message."""

ATTEMPTS = 3
"""How often a leaf is tried when the processes go away under it."""


class RewardPool:
    """Every reward function that a server offers, each in worker processes of its own.

    Args:
        own: name -> `package.module:function` of a user's own functions; the built-in ones are always there.
        workers: processes of each function in use.
        timeout_s: limit of one leaf. Code that cannot be interrupted is killed up to 0.75 s later, and once more
            when its batch is graded leaf by leaf.
        memory_bytes: address space of each process; None for no bound.

    Raises:
        ConfigError: a path is malformed, or a name is taken.
    """

    def __init__(
        self,
        own: Mapping[str, str] | None = None,
        *,
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_bytes: int | None = 2 << 30,
    ) -> None:
        self._targets = reward_targets(own or {})
        self._limits = Limits(workers=workers, timeout_s=timeout_s, memory_bytes=memory_bytes)
        self._processes: dict[str, Processes] = {}

    def names(self) -> list[str]:
        """The rewards that a request may name, sorted."""
        return sorted(self._targets)

    async def start(self, names: Iterable[str] | None = None) -> None:
        """Start processes now rather than at a function's first use.

        Args:
            names: which functions; None for all but those that are slow to load (`math`).

        Raises:
            ConfigError: a function cannot be loaded; every process has ended then.
            RequestError: no reward has such a name.
        """
        wanted = set(self._targets) - SLOW_TO_LOAD if names is None else names
        starting = (self._for(name).start() for name in sorted(wanted))
        for outcome in await asyncio.gather(*starting, return_exceptions=True):
            if outcome is not None:
                await self.close()
                raise outcome

    async def check(self, name: str, reference: str, options: Mapping[str, Any]) -> None:
        """Refuse, before anything is sampled, a request that could never be graded.

        Grades an empty response: what else goes wrong with that is no reason to refuse.

        Raises:
            RequestError: no reward has that name, `unfinished` is no finite number, or the function refuses the
                reference or the options.
            ConfigError: the function cannot be loaded.
        """
        unfinished = options.get("unfinished", 0.0)
        if not (isinstance(unfinished, int | float) and abs(unfinished) <= sys.float_info.max):
            raise RequestError(
                "reward.options.unfinished", f"{unfinished!r} is not a finite number"
            )
        await self.grade(name, ("",), reference, options)

    async def grade(
        self, name: str, responses: Sequence[str], reference: str, options: Mapping[str, Any]
    ) -> list[Grade]:
        """Grade responses to one question; equal ones are graded once.

        Args:
            name: a registered reward.
            responses: [N] each from the prompt's end to the leaf.
            reference: what the function compares with.
            options: passed on to the function.

        Returns:
            [N] one grade each, in order. A function that raises, gives no finite number, takes too long or kills
            its process costs its own leaf only: reward 0.0 and an error.

        Raises:
            RequestError: as for `check`, which a server calls before it samples.
            ConfigError: the function cannot be loaded.
        """
        processes = self._for(name)
        try:
            await processes.start()
        except BrokenPoolError as error:  # closed while the tree was being sampled
            return [Grade(reward=0.0, error=str(error)) for _ in responses]
        unique = tuple(dict.fromkeys(responses))
        size = min(BATCH, max(1, math.ceil(len(unique) / self._limits.workers)))
        batches = [unique[start : start + size] for start in range(0, len(unique), size)]
        graded = await asyncio.gather(
            *(_grade_batch(processes, batch, reference, dict(options)) for batch in batches)
        )
        grades = dict(zip(unique, (grade for batch in graded for grade in batch), strict=True))
        return [grades[response] for response in responses]

    async def close(self) -> None:
        """End every process for good. Leaves that are being graded get reward 0.0 and an error."""
        # Every name, used or not: a closed one cannot be started later.
        await asyncio.gather(*(self._for(name).close() for name in self._targets))

    def _for(self, name: str) -> Processes:
        target = look_up(self._targets, name)
        return self._processes.setdefault(name, Processes(target, self._limits))


async def _grade_batch(
    processes: Processes, batch: tuple[str, ...], reference: str, options: dict[str, Any]
) -> list[Grade]:
    grades: list[Grade] = []
    while rest := batch[len(grades) :]:
        try:
            grades += _accept(await processes.grade(rest, reference, options))
        except LeafError as error:
            if len(rest) == 1:
                return [*grades, Grade(reward=0.0, error=str(error))]
            break
        except BrokenPoolError:
            break
    alone = (_grade_alone(processes, leaf, reference, options) for leaf in batch[len(grades) :])
    return [*grades, *await asyncio.gather(*alone)]


async def _grade_alone(
    processes: Processes, response: str, reference: str, options: dict[str, Any]
) -> Grade:
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            await processes.start()
            (grade,) = _accept(await processes.grade((response,), reference, options))
            return grade
        except LeafError as error:
            return Grade(reward=0.0, error=str(error))
        except (BrokenPoolError, ConfigError) as error:
            reason = str(error)
    return Grade(reward=0.0, error=reason)


def _accept(outcome: list[Grade] | Refusal) -> list[Grade]:
    if isinstance(outcome, Refusal):
        raise RequestError(outcome.field, outcome.detail)
    return outcome
