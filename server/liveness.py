"""Whether the engine gives a sign of life, asked once for all who want to know."""

import asyncio
import time

from server.engines.base import Engine
from shared.errors import EngineError

FRESH_S = 1.0
"""How long an answer stands: anybody may ask, and every question is work for the engine."""


async def alive(engine: Engine, bound_s: float) -> None:
    """Ask the engine for a sign of life.

    Raises:
        EngineError: it gives none within the bound, seconds.
    """
    try:
        async with asyncio.timeout(bound_s):
            await engine.check()
    except TimeoutError:
        raise EngineError(f"the engine gave no sign of life in {bound_s:g} s") from None


class Pulse:
    """One question at a time, whose answer is everybody's who asks meanwhile or soon after.

    Args:
        bound_s: longest wait for the engine, seconds.
        fresh_s: how long an answer stands, seconds.
    """

    def __init__(self, bound_s: float, fresh_s: float = FRESH_S) -> None:
        self._bound_s = bound_s
        self._fresh_s = fresh_s
        self._answer: asyncio.Task[str | None] | None = None
        self._answered = 0.0

    async def feel(self, engine: Engine) -> None:
        """Returns where the engine lives.

        Raises:
            EngineError: it does not, or says nothing within the bound.
        """
        answer = self._answer
        if answer is None or (answer.done() and time.monotonic() - self._answered > self._fresh_s):
            answer = self._answer = asyncio.create_task(self._ask(engine))
        # Shielded: one caller that goes away must not take the answer from the others.
        fault = await asyncio.shield(answer)
        if fault is not None:
            raise EngineError(fault)

    async def _ask(self, engine: Engine) -> str | None:
        """What is wrong; None for nothing."""
        try:
            await alive(engine, self._bound_s)
        except EngineError as error:
            return str(error)
        finally:
            self._answered = time.monotonic()
        return None
