"""Grades the leaves of trees off the event loop: in worker processes, or by a server of the user's own."""

import asyncio
import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.rewards.base import Grade, Grader, Stats
from server.rewards.limits import HttpLimits, Limits
from server.rewards.processes import Processes
from server.rewards.registry import SLOW_TO_LOAD, is_url, look_up, reward_targets
from shared.digests import sha256
from shared.errors import ConfigError, RequestError

log = logging.getLogger("spoke.rewards")

CHECKS = 4096
"""Questions whose check is remembered."""


class RewardPool:
    """Every reward that a server offers, each with processes or connections of its own.

    Args:
        own: name -> `package.module:function` or URL of a user's own rewards; the built-in ones are always there.
        workers: processes of each function in use.
        timeout_s: limit of one leaf. Code that cannot be interrupted is killed half a second later.
        memory_bytes: address space of each process; None for no bound.
        http: what each URL may use.

    Raises:
        ConfigError: a path or a URL is malformed, or a name is taken.
    """

    stats: dict[str, Stats]
    """Counters by name of every reward, to be read at any time."""

    def __init__(
        self,
        own: Mapping[str, str] | None = None,
        *,
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_bytes: int | None = 2 << 30,
        http: HttpLimits | None = None,
    ) -> None:
        self._targets = reward_targets(own or {})
        self._limits = Limits(workers=workers, timeout_s=timeout_s, memory_bytes=memory_bytes)
        self._http = http or HttpLimits()
        self.stats = {name: Stats() for name in sorted(self._targets)}
        self._graders: dict[str, Grader] = {}
        self._checked: OrderedDict[str, None] = OrderedDict()

    def names(self) -> list[str]:
        """The rewards that a request may name, sorted."""
        return sorted(self._targets)

    async def start(self, names: Iterable[str] | None = None) -> None:
        """Start processes now rather than at a function's first use.

        Args:
            names: which rewards; None for all but those that are slow to load (`math`).

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

        Grades an empty response; a question that passed is not tried again soon.

        Raises:
            RequestError: no reward has that name, `unfinished` is no finite number, or the function refuses the
                reference or the options. Status 503: the reward's server does not answer, or a function that is
                loaded at its first use cannot be.
        """
        unfinished = options.get("unfinished", 0.0)
        if not (isinstance(unfinished, int | float) and abs(unfinished) <= sys.float_info.max):
            raise RequestError(
                "reward.options.unfinished", f"{unfinished!r} is not a finite number"
            )
        grader = self._for(name)
        question = _digest(name, reference, options)
        if question not in self._checked:
            try:
                await grader.start()
            except ConfigError as error:
                log.error("%s", error)  # for the owner: it may quote files and modules
                detail = f"{name} cannot be loaded on this server; its log says why"
                raise RequestError("reward.name", detail, status=503) from error
            await grader.check(reference, options)
        self._checked[question] = None
        self._checked.move_to_end(question)
        while len(self._checked) > CHECKS:
            self._checked.popitem(last=False)

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
        grader, stats = self._for(name), self.stats[name]
        await grader.start()
        unique = tuple(dict.fromkeys(responses))
        began = time.monotonic()
        grades = await grader.grade(unique, reference, options)
        stats.seconds += time.monotonic() - began
        stats.leaves += len(unique)
        stats.failures += sum(grade.error is not None for grade in grades)
        by_response = dict(zip(unique, grades, strict=True))
        return [by_response[response] for response in responses]

    async def close(self) -> None:
        """End every process for good. Leaves that are being graded get reward 0.0 and an error."""
        # Every name, used or not: a closed one cannot be started later.
        await asyncio.gather(*(self._for(name).close() for name in self._targets))

    def _for(self, name: str) -> Grader:
        target = look_up(self._targets, name)
        if name not in self._graders:
            self._graders[name] = self._open(name, target)
        return self._graders[name]

    def _open(self, name: str, target: str) -> Grader:
        if not is_url(target):
            return Processes(target, self._limits, self.stats[name])
        from server.rewards.http import (
            Remote,
        )  # worker processes import this file, and need no httpx

        return Remote(name, target, self._http, self.stats[name])


def _digest(*question: object) -> str:
    return sha256(json.dumps(question, sort_keys=True, default=repr).encode())
